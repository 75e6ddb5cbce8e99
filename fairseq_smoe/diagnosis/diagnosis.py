"""What ``python -m fairseq_smoe doctor`` finds, and its verdict."""

from dataclasses import asdict, dataclass

import torch

from fairseq_smoe.diagnosis import machine
from fairseq_smoe.diagnosis.software import installed_software
from fairseq_smoe.preparation.pool import available_cores
from fairseq_smoe.text_table import aligned

LITTLE_DISK = 5  # GiB; a checkpoint of the paper's M4 models has 2
LITTLE_GPU_MEMORY = 0.5  # of all


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found.

    Attributes:
        software: list of :class:`~fairseq_smoe.diagnosis.software.Installed`
        gpus: list of :class:`~fairseq_smoe.diagnosis.machine.GPU`
        facts: ``{what: value}`` of the machine.
        problems: lines that name what prevents training, and what to do.
        warnings: lines about what may go wrong.
    """

    software: list
    gpus: list
    facts: dict
    problems: list
    warnings: list

    def as_dict(self):
        return asdict(self)


def examine(folder):
    """Look at what is installed, and at the machine.

    Args:
        folder: where checkpoints will be written.

    Returns:
        :class:`Diagnosis`
    """
    software, gpus = installed_software(), machine.gpus()
    facts = {
        "processor": machine.processor(),
        "cores": available_cores(),
        "memory": machine.free_memory(),
        "disk": machine.free_disk(folder),
        "folder": str(folder),
        "driver": machine.driver_version(),
        "cuda": torch.version.cuda,
        "nccl": machine.nccl_version(),
    }
    problems = [
        f"GPU {gpu.number} ({gpu.name}): torch {torch.__version__} has no code for compute "
        f"capability {gpu.capability[0]}.{gpu.capability[1]}; install a build of torch that has"
        for gpu in gpus
        if not gpu.has_kernels
    ]
    problems += [
        f"{package.name} is not installed: pip install fairseq-smoe, which brings it"
        for package in software
        if package.version is None
    ]
    return Diagnosis(software, gpus, facts, problems, warnings_of(software, gpus, facts))


def warnings_of(software, gpus, facts):
    """Lines about what may go wrong, each with a remedy."""
    found = [
        f"{package.name} {package.version} has not been tested: "
        f"{', '.join(f'{version}*' for version in package.tested)} has"
        for package in software
        if package.version and not package.is_tested
    ]
    if not gpus and machine.has_driver():
        if facts["cuda"] is None:
            found.append(
                f"a driver for GPUs is loaded, but torch {torch.__version__} is built for the CPU "
                "alone: install a CUDA build of torch to use them"
            )
        else:
            found.append(
                f"a driver for GPUs is loaded, but torch finds none: the driver "
                f"({facts['driver']}) may be too old for CUDA {facts['cuda']}, or "
                "CUDA_VISIBLE_DEVICES hides them"
            )
    found += [
        f"GPU {gpu.number} ({gpu.name}): {gpu.free:.0f} of {gpu.memory:.0f} GiB are free; another "
        "process uses the rest"
        for gpu in gpus
        if gpu.free < LITTLE_GPU_MEMORY * gpu.memory
    ]
    if facts["disk"] < LITTLE_DISK:
        found.append(
            f"{facts['folder']}: {facts['disk']:.1f} GiB are free; checkpoints of the paper's "
            "models need more, so choose another --save-dir"
        )
    return found


def describe(diagnosis):
    """Lines about the software and the machine."""
    rows = [
        (package.name, package.version or "missing", _tested(package))
        for package in diagnosis.software
    ]
    facts = diagnosis.facts
    memory = "" if facts["memory"] is None else f", {facts['memory']:.0f} GiB of memory free"
    lines = [
        *aligned(("software", "version", "tested with"), rows, left=3),
        "",
        f"processor: {facts['processor']}, {facts['cores']} cores{memory}",
        f"disk: {facts['disk']:.0f} GiB free in {facts['folder']}",
    ]
    if not diagnosis.gpus:
        return [*lines, "GPU: none that torch can use; training needs --cpu"]
    lines.append(f"driver {facts['driver']}, CUDA {facts['cuda']}, NCCL {facts['nccl']}")
    for gpu in diagnosis.gpus:
        capability = f"{gpu.capability[0]}.{gpu.capability[1]}"
        lines += [
            f"GPU {gpu.number}: {gpu.name}, compute capability {capability}, {gpu.free:.0f} of "
            f"{gpu.memory:.0f} GiB free, bfloat16: {'yes' if gpu.bf16 else 'no'}",
            f"  experts in bfloat16: {gpu.backend}",
        ]
    return lines


def _tested(package):
    return ", ".join(version.rstrip(".") for version in package.tested)


def verdict(diagnosis, results):
    """``(whether all is well, one line)``

    Args:
        results: list of :class:`~fairseq_smoe.diagnosis.self_test.Result`; empty if the self-test
            was left out.
    """
    failed = [result for result in results if result.failure]
    if diagnosis.problems or failed:
        first = diagnosis.problems[0] if diagnosis.problems else _told(failed[0])
        more = len(diagnosis.problems) + len(failed) - 1
        return False, f"not ready: {first}{f' (and {more} more)' if more else ''}"
    gpus = [f"GPU {gpu.number} ({gpu.name})" for gpu in diagnosis.gpus]
    does = "trains and translates" if results else "has what it takes to train (not tried)"
    return True, f"ready: {does} on {', '.join([*gpus, 'the CPU'])}"


def _told(result):
    precision = f" in {result.precision}" if result.precision else ""
    return f"{result.check} on {result.device}{precision}: {result.failure}"
