"""``python -m fairseq_smoe doctor`` by its command, and what it concludes from what it finds."""

import json

import pytest
import toy_task
import torch

from fairseq_smoe.diagnosis.block_check import BlockCheck
from fairseq_smoe.diagnosis.diagnosis import Diagnosis, describe, examine, verdict, warnings_of
from fairseq_smoe.diagnosis.machine import GPU, chosen_backend, was_built_for
from fairseq_smoe.diagnosis.self_test import Result
from fairseq_smoe.diagnosis.software import TESTED, Installed


def test_versions_and_machine():
    options = ("doctor", "--cpu", "--json", "--no-self-test")
    found = json.loads(toy_task.run("python", "-m", "fairseq_smoe", *options).stdout)
    versions = {package["name"]: package["version"] for package in found["software"]}
    assert versions.keys() == {"fairseq-smoe", *TESTED} and all(versions.values())
    assert versions["torch"] == torch.__version__
    facts = found["facts"]
    assert facts["cores"] >= 1 and facts["memory"] > 0.1 and facts["disk"] > 0
    assert found["self_test"] == []


def test_without_the_self_test_it_says_so(tmp_path):
    folder = tmp_path / "not" / "there"
    command = ("python", "-m", "fairseq_smoe", "doctor", "--no-self-test", "--folder", folder)
    lines = toy_task.run(*command).stdout.splitlines()
    assert lines[-1].startswith("ready: ") and "(not tried)" in lines[-1]
    assert any(str(folder) in line for line in lines)


def test_docs_name_the_tested_versions():
    text = (toy_task.REPOSITORY / "docs/install.md").read_text(encoding="utf-8")
    tested = text[text.index("## Tested versions") :]
    for versions in TESTED.values():
        assert all(version.rstrip(".") in tested for version in versions)


H200 = GPU(0, "NVIDIA H200", (9, 0), 140, 139, True, True, chosen_backend((9, 0)))
PASSED = Result("block", "cuda:0", "bf16", None, 0.1)


def diagnosis(gpus=(), problems=(), **facts):
    facts = {"memory": 8, "disk": 50, "folder": "/runs", "driver": "580.1", "cuda": "13.0", **facts}
    facts = {"processor": "x", "cores": 2, "nccl": "2.27.3", **facts}
    return Diagnosis(examine(".").software, list(gpus), facts, list(problems), [])


def test_a_gpu_is_described():
    text = "\n".join(describe(diagnosis([H200])))
    assert "GPU 0: NVIDIA H200, compute capability 9.0, 139 of 140 GiB free" in text
    assert "experts in bfloat16: grouped_mm" in text and "NCCL 2.27.3" in text
    well, line = verdict(diagnosis([H200]), [PASSED])
    assert well and line == "ready: trains and translates on GPU 0 (NVIDIA H200), the CPU"


def test_a_failure_decides():
    failed = Result("training", "cuda:0", "fp16", "the loss went from 1 to 2", 1.0)
    well, line = verdict(diagnosis([H200]), [PASSED, failed, failed])
    assert not well
    assert line == ("not ready: training on cuda:0 in fp16: the loss went from 1 to 2 (and 1 more)")


def test_warnings_name_a_remedy():
    software = [Installed("torch", "2.11.0", ("2.13.",))]
    busy = GPU(1, "L4", (8, 9), 24, 2, True, True, chosen_backend((8, 9)))
    facts = diagnosis(disk=1).facts
    untested, memory, disk = warnings_of(software, [busy], facts)
    assert untested == "torch 2.11.0 has not been tested: 2.13.* has"
    assert "GPU 1 (L4): 2 of 24 GiB are free" in memory and "--save-dir" in disk


@pytest.mark.parametrize(
    "capability, architectures, built",
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_86"], True),  # code of the same generation runs
        ((8, 0), ["sm_86"], False),
        ((7, 0), ["sm_80", "sm_90a"], False),
        ((12, 0), ["sm_90", "compute_90"], True),  # the driver compiles it
        ((12, 0), ["sm_90", "sm_100"], False),
        ((12, 0), ["sm_120"], True),
        ((9, 0), [], False),
    ],
)
def test_builds_of_torch_have_code_for_a_gpu_or_not(capability, architectures, built):
    assert was_built_for(capability, architectures) == built


@pytest.mark.parametrize("capability, backend", [((9, 0), "grouped_mm"), ((8, 0), "loop")])
def test_backend_of_a_gpu(capability, backend):
    assert chosen_backend(capability).startswith(f"{backend}: torch has a kernel for ")


class BrokenCheck(BlockCheck):
    """A device that computes a bias wrongly."""

    def _like(self, block, backend):
        block = super()._like(block, backend)
        if backend == "grouped_mm":
            with torch.no_grad():
                block.experts.fc1_bias[0, 0] += 1
        return block


def test_a_wrong_block_is_found():
    options = {"tokens": 50, "device": "cpu", "dtype": torch.float32, "backend": "grouped_mm"}
    assert BlockCheck((2, 2), **options).failures() == {}
    assert "gradient of experts.fc2_weight" in BrokenCheck((2, 2), **options).failures()
