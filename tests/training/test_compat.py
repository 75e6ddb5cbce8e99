"""Every repair in compat.py is needed, and works. Those that show only in a whole training have
their tests in test_cli_resume.py (two processes) and test_cli_training.py (precisions)."""

import sys

import pytest
import torch
import toy_task
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf

import fairseq_smoe
from fairseq_smoe.errors import NonFiniteGateError, OptionError

fairseq_smoe.register()


@pytest.fixture
def under_torchrun(monkeypatch):
    variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fairseq counts GPUs itself")
def test_torchrun_decides_the_number_of_processes_on_a_cpu(under_torchrun):
    cfg = OmegaConf.structured(FairseqConfig).distributed_training
    assert cfg.distributed_world_size <= 1
    distributed_utils.infer_init_method(cfg)
    assert (cfg.distributed_world_size, cfg.distributed_rank) == (2, 1)
    assert cfg.distributed_init_method == "env://"
    assert cfg.distributed_backend == "gloo"
    assert cfg.distributed_no_spawn


def test_a_single_process_stays_single():
    cfg = OmegaConf.structured(FairseqConfig).distributed_training
    before = cfg.distributed_world_size
    distributed_utils.infer_init_method(cfg)
    assert cfg.distributed_world_size == before
    assert cfg.distributed_init_method is None or torch.cuda.device_count() > 1


def test_ddp_gets_no_gpu_for_a_model_on_the_cpu(tmp_path, monkeypatch):
    """As fairseq calls it for --ddp-backend pytorch_ddp."""
    from fairseq.models import distributed_fairseq_model

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # torch.distributed puts its own there
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = distributed_fairseq_model.DistributedDataParallel(
            torch.nn.Linear(2, 2), device_ids=[0], output_device=0
        )
        assert wrapped.device_ids is None
        wrapped(torch.ones(1, 2)).sum().backward()
        with pytest.raises(ValueError, match="device_ids"):
            torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2), device_ids=[0])
    finally:
        torch.distributed.destroy_process_group()


# --------------------------------------------------------------------------------------
# errors in one line


def printed_at_the_end_by(error, capsys):
    sys.excepthook(type(error), error, error.__traceback__)
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", [OptionError, NonFiniteGateError])
def test_user_errors_are_printed_in_one_line(kind, capsys):
    assert (
        printed_at_the_end_by(kind("--flag 3: too much"), capsys) == "error: --flag 3: too much\n"
    )


def test_user_errors_are_found_inside_those_of_fairseq(capsys):
    try:
        try:
            raise OptionError("--flag 3: too much")
        except OptionError as error:
            raise RuntimeError("Cannot load model parameters") from error
    except RuntimeError as wrapped:
        assert printed_at_the_end_by(wrapped, capsys) == "error: --flag 3: too much\n"


def test_other_errors_keep_their_traceback(capsys):
    try:
        raise ValueError("a mistake in the program")
    except ValueError as error:
        printed = printed_at_the_end_by(error, capsys)
    assert "Traceback" in printed and "a mistake in the program" in printed


def test_repairs_are_applied_once_however_often_the_plugin_is_registered():
    hook, infer = sys.excepthook, distributed_utils.infer_init_method
    fairseq_smoe.register()
    assert sys.excepthook is hook and distributed_utils.infer_init_method is infer


def test_the_log_file_has_every_record_once(data, tmp_path):
    outcome = toy_task.train(
        data,
        tmp_path,
        max_update=20,
        validate_interval_updates=5,
        log_interval=1,
        log_file=tmp_path / "log",
        no_save=True,
    )
    assert len(outcome.log("valid")) >= 4
    records = [n for n in (tmp_path / "log").read_text().splitlines() if n.startswith("{")]
    assert len(records) >= 24
    assert len(set(records)) == len(records)


FORK_WITH_GARBAGE = """
import gc, os, sys, torch, fairseq_smoe
if "with-plugin" in sys.argv:
    fairseq_smoe.register()
gc.disable()
loader = iter(torch.utils.data.DataLoader(range(9), num_workers=1))
next(loader)
loader.itself = loader
del loader
child = os.fork()
if child:
    os.waitpid(child, 0)
else:
    gc.collect()
    os._exit(0)
"""


@pytest.mark.parametrize("words, told", [((), True), (("with-plugin",), False)])
def test_a_data_worker_does_not_end_those_of_its_parent(words, told):
    outcome = toy_task.run("python", "-c", FORK_WITH_GARBAGE, *words, own_process=True)
    assert ("can only test a child process" in outcome.stderr) == told
