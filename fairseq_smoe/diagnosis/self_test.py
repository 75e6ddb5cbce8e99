"""A test of seconds: the block in every precision, a training step, a translation."""

import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.diagnosis.block_check import BlockCheck
from fairseq_smoe.diagnosis.untrained import made_up_batch, untrained_model

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STRATA = (2, 2, 2, 2)
ROW, SCALE = "smoe-2-2-2-2", "tiny"
TOKENS = 200  # of the made-up batch
UPDATES = 5
TRAINING = ("--lr", "1e-3", "--warmup-updates", "1")
SAME_SCORE = 1e-3  # largest difference of a translation's score between devices, in nats


@dataclass(frozen=True)
class Result:
    """The outcome of a check.

    Attributes:
        check: what was done: "block", "training", "translation" or "collectives".
        device: e.g. "cuda:0".
        precision: "fp32", "fp16" or "bf16"; None where there is none.
        failure: what went wrong, in one line; None if nothing did.
        seconds: that it took.
    """

    check: str
    device: str
    precision: str | None
    failure: str | None
    seconds: float

    def as_dict(self):
        return asdict(self)


def self_test(devices):
    """Run all checks. The plugin has to be registered with fairseq already.

    Args:
        devices: e.g. ``["cpu", "cuda:0"]``, the CPU first.

    Yields:
        A :class:`Result` each.
    """
    for device in devices:
        kinds = dict.fromkeys(("fp32", *_half_precisions(device)))
        for precision in kinds:
            yield _timed(block_failure, "block", device, precision)
        for precision in kinds:
            yield _timed(training_failure, "training", device, precision)
        yield _timed(translation_failure, "translation", device, "fp32")
        yield _timed(lambda device, _: collectives_failure(device), "collectives", device, None)


def _half_precisions(device):
    """fp16 everywhere; bf16 where the device computes in it, which before compute capability 8.0
    torch only imitates."""
    if device == "cpu" or torch.cuda.get_device_capability(device)[0] >= 8:
        return "fp16", "bf16"
    return ("fp16",)


def _timed(check, name, device, precision):
    begun = time.perf_counter()
    try:
        failure = check(device, precision)
    except Exception as error:  # whatever it is, it is what this test is to find
        failure = " ".join(f"{type(error).__name__}: {error}".split())
    return Result(name, device, precision, failure, round(time.perf_counter() - begun, 1))


def block_failure(device, precision):
    """What of a block, forward and backward, differs from float64 on the CPU; None if nothing."""
    dtype = PRECISIONS[precision]
    check = BlockCheck(STRATA, tokens=300, padding=7, device=device, dtype=dtype)
    failures = check.failures()
    if not failures:
        return None
    worst = max(failures, key=failures.get)
    return f"{worst} is {failures[worst]:.2g} from float64's"


def training_failure(device, precision):
    """What is wrong with a few updates of a tiny model on one batch; None if nothing is."""
    from fairseq_smoe.training.trainer import SMoETrainer  # once fairseq knows the plugin

    more = [*TRAINING, *(["--cpu"] if device == "cpu" else [])]
    more += [f"--{precision}"] if precision != "fp32" else []
    losses = []
    # the trainer takes the current GPU
    with nullcontext() if device == "cpu" else torch.cuda.device(device):
        cfg, task, model, criterion = _tiny_model(more)
        trainer = SMoETrainer(cfg, task, model, criterion)
        batch = made_up_batch(task.source_dictionary, TOKENS, seed=1)
        while trainer.get_num_updates() < UPDATES:
            log = trainer.train_step([batch])
            if log is not None:  # in float16 the first updates may overflow, and are left out
                losses.append(float(log["loss"]))
    if not losses[-1] < losses[0]:
        return f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {UPDATES} updates"
    return None


def translation_failure(device, precision):
    """Whether a batch is translated otherwise than its sentences one by one on the CPU; None if it
    is not."""
    _, task, model, _ = _tiny_model(["--cpu"])
    batch = made_up_batch(task.source_dictionary, TOKENS, seed=1)
    lengths = batch["net_input"]["src_lengths"].tolist()
    rows = zip(batch["net_input"]["src_tokens"], lengths)
    alone = [_translate(task, model, "cpu", row[None, -length:]) for row, length in rows]
    together = _translate(task, model, device, batch["net_input"]["src_tokens"])
    for number, ((expected,), found) in enumerate(zip(alone, together, strict=True), start=1):
        if expected[0] != found[0] or not abs(expected[1] - found[1]) <= SAME_SCORE:
            return f"the best translation of sentence {number} is not that of the CPU"
    return None


def _translate(task, model, device, tokens_BS):
    """``[(tokens, score), ...]``, the best translation of each sentence."""
    from fairseq.sequence_generator import SequenceGenerator

    lengths_B = tokens_BS.ne(task.source_dictionary.pad()).sum(1)
    inputs = {"src_tokens": tokens_BS.to(device), "src_lengths": lengths_B.to(device)}
    model = model.to(device).eval()
    generator = SequenceGenerator([model], task.target_dictionary, beam_size=3, max_len_b=10)
    best = [found[0] for found in generator.generate([model], {"net_input": inputs})]
    return [(found["tokens"].tolist(), float(found["score"])) for found in best]


def _tiny_model(more):
    m4 = benchmarks.load("m4")
    return untrained_model(m4, m4.row(ROW), SCALE, TOKENS, seed=1, more=more)


def collectives_failure(device):
    """Whether the ranks' way to talk does not work, tried by one rank; None if it does."""
    backend = "gloo" if device == "cpu" else "nccl"
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder) / 'store'}"
        dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
        try:
            sent = torch.arange(4.0, device=device)
            received = torch.zeros_like(sent)
            dist.all_to_all_single(received, sent)
            dist.all_reduce(received)
            same = torch.equal(received, sent)
        finally:
            dist.destroy_process_group()
    return None if same else f"{backend} delivered other numbers"
