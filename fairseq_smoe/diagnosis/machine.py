"""The processor, the GPUs, memory and disk of this machine."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from fairseq_smoe.moe.grouped_linear import KERNEL_CAPABILITIES, has_kernel

GIB = 2**30
DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl")


@dataclass(frozen=True)
class GPU:
    """A GPU that torch can use.

    Attributes:
        capability: compute capability, e.g. (9, 0).
        memory, free: GiB.
        has_kernels: whether this build of torch was made for it.
        bf16: whether it computes in bfloat16 itself.
        backend: how experts multiply in bfloat16, "grouped_mm" or "loop", and why.
    """

    number: int
    name: str
    capability: tuple
    memory: float
    free: float
    has_kernels: bool
    bf16: bool
    backend: str

    @classmethod
    def of(cls, number):
        properties = torch.cuda.get_device_properties(number)
        capability = properties.major, properties.minor
        free, _ = torch.cuda.mem_get_info(number)
        return cls(
            number,
            properties.name,
            capability,
            properties.total_memory / GIB,
            free / GIB,
            was_built_for(capability, torch.cuda.get_arch_list()),
            properties.major >= 8,
            chosen_backend(capability),
        )


def was_built_for(capability, architectures):
    """Whether a build of torch has code for a GPU: of its own architecture, of an earlier one of
    the same generation, or code that the driver compiles (compute_).

    Args:
        capability: (major, minor)
        architectures: as torch lists them, e.g. ``["sm_80", "sm_90a", "compute_90"]``.
    """
    major, minor = capability
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = number.rstrip("af")
        if not digits.isdigit():
            continue
        built = int(digits[:-1]), int(digits[-1])
        if kind == "compute" and built <= (major, minor):
            return True
        if kind == "sm" and built[0] == major and built[1] <= minor:
            return True
    return False


def chosen_backend(capability):
    """How ``--moe-expert-backend auto`` multiplies on a GPU in bfloat16, and why."""
    if has_kernel(torch.bfloat16, capability):
        return "grouped_mm: torch has a kernel for this GPU"
    expected = " and ".join(f"{major}.x" for major in KERNEL_CAPABILITIES)
    return f"loop: torch has a kernel for grouped_mm only for compute capability {expected}"


def gpus():
    """A list of :class:`GPU`."""
    return [GPU.of(number) for number in range(torch.cuda.device_count())]


def has_driver():
    """Whether a driver of NVIDIA is loaded."""
    return any(Path(path).exists() for path in DRIVER_FILES)


def driver_version():
    """The driver's version as nvidia-smi gives it; None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.split("\n")[0].strip() or None


def nccl_version():
    """e.g. "2.27.3"; None if torch has none."""
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def processor():
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return names[0] if names else os.uname().machine


def free_memory():
    """GiB that this process can still get, also by the limit of its container; None if unknown."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        free.append(limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no container, or one without a limit
    return min(free) / GIB if free else None


def free_disk(folder):
    """GiB free where a folder is, or will be."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / GIB
