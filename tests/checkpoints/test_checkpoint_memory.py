"""A checkpoint in parts is loaded without a second copy of the model in memory."""

import re
import shutil
import subprocess
import sys
import threading

import pytest
import toy_task
from omegaconf import OmegaConf
from toy_task import REPOSITORY, environment

from fairseq_smoe.checkpoints import transform

LOAD = """
import sys
import fairseq_smoe
from fairseq import checkpoint_utils
from fairseq_smoe.checkpoints import parts
fairseq_smoe.register()
def wait_after(name):
    print(name, flush=True)
    sys.stdin.readline()
wait_after("ready")
models = checkpoint_utils.load_model_ensemble_and_task([sys.argv[1]])
wait_after("loaded")
copy = parts.whole(parts.read_checkpoint(sys.argv[1]))
wait_after("copied")
"""


@pytest.fixture
def large(data, tmp_path):
    """``(path, bytes of the model, bytes of a part of it)`` of a checkpoint in 8 parts, mostly of
    experts, with as much again of an optimizer."""
    cfg, _, model, _ = toy_task.set_up(
        data, "--smoe-strata", "8-8-8", encoder_embed_dim=256, encoder_ffn_embed_dim=1024
    )
    named = dict(model.named_parameters())
    moments = {i: {"exp_avg": p.detach().clone()} for i, p in enumerate(named.values())}
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": model.state_dict(),
        "optimizer_history": [{"num_updates": 1, "optimizer_name": "", "lr_scheduler_state": {}}],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "task_state": {},
        "last_optimizer_state": {"state": moments, "param_groups": []},
        "trained_parameters": list(named),
    }
    transform.write_in_parts(state, 8, tmp_path / "checkpoint.pt")
    sizes = {name: p.numel() * p.element_size() for name, p in named.items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert experts > 100e6 and experts > 0.85 * sum(sizes.values())
    yield tmp_path / "checkpoint.pt", sum(sizes.values()), experts // 8
    shutil.rmtree(tmp_path)


class Loading:
    """The process, and the most memory of its own, not of files, that it has had at any time."""

    def __init__(self, path, code=LOAD):
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            env=environment(),
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.ended = threading.Event()
        self.peak = 0

    def memory(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            return int(re.search(r"RssAnon:\s+(\d+) kB", status.read())[1]) * 1024

    def reach(self, name):
        """Go on until the process says so; the peak on the way."""
        self.peak = 0
        sampling = threading.Thread(target=self._sample)
        self.ended.clear()
        sampling.start()
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        reached = self._line()
        self.ended.set()
        sampling.join()
        assert reached == name, self.process.communicate()[1][-2000:]
        return max(self.peak, self.memory())

    def _line(self):
        return self.process.stdout.readline().strip()

    def _sample(self):
        while not self.ended.wait(0.001):
            self.peak = max(self.peak, self.memory())


def test_loading_needs_one_copy_of_the_model(large):
    path, model, part = large
    loading = Loading(path)
    try:
        assert loading._line() == "ready"
        before = loading.memory()
        needed = loading.reach("loaded") - before
        assert 0.95 * model < needed < model + part
        # that a copy would be seen
        assert loading.reach("copied") - before - needed > 1.6 * model
    finally:
        loading.process.kill()
        loading.process.communicate()
