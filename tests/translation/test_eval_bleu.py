"""--eval-bleu: BLEU of the validation sentences during training."""

import pytest
import torch
import toy_task
from sacrebleu.metrics import BLEU
from toy_task import DIRECTIONS

from fairseq_smoe.errors import OptionError


@pytest.fixture(scope="module")
def run(make_once, data):
    """A model that makes mistakes, trained with --eval-bleu: ``(folder, printed BLEU scores)``."""

    def make(folder):
        outcome = toy_task.train(
            data,
            folder,
            "--eval-bleu",
            "--maximize-best-checkpoint-metric",
            *toy_task.MODELS["smoe"],
            **{**toy_task.LONG_ENOUGH, "max_update": 160},
            best_checkpoint_metric="bleu",
            eval_bleu_sentences=0,
        )
        (folder / "stdout").write_text(outcome.stdout + outcome.stderr)

    folder = make_once("eval-bleu", make)
    printed = toy_task.Outcome([], 0, (folder / "stdout").read_text(), "")
    return folder, printed.log("valid")


def test_logged_bleu_is_that_of_fairseq_generate(run, data):
    folder, records = run
    scores = records[-1]
    direction = max(DIRECTIONS, key=lambda d: scores[f"valid_bleu_{d}"])
    assert 2 < scores[f"valid_bleu_{direction}"] < 99
    out = toy_task.generate(
        *(data, folder / "checkpoint_last.pt", direction),
        gen_subset="valid",
        beam=1,
        max_len_a=2,
        max_len_b=20,
    )
    references = dict(
        line[2:].split("\t", 1) for line in out.stdout.splitlines() if line.startswith("T-")
    )
    order = sorted(out.sentences)
    expected = BLEU(tokenize="none").corpus_score(
        [out.sentences[i][1] for i in order], [[references[str(i)] for i in order]]
    )
    assert len(order) == toy_task.SPLIT_SIZES["valid"]
    assert scores[f"valid_bleu_{direction}"] == pytest.approx(expected.score, abs=0.006)


def test_bleu_is_the_mean_of_the_directions_and_chooses_the_best_checkpoint(run):
    folder, records = run
    for scores in records:
        mean = sum(scores[f"valid_bleu_{d}"] for d in DIRECTIONS) / len(DIRECTIONS)
        assert scores["valid_bleu"] == pytest.approx(mean, abs=0.01)
    assert len(records) > 1
    assert records[-1]["valid_best_bleu"] == max(r["valid_bleu"] for r in records)
    best = torch.load(folder / "checkpoint_best.pt", weights_only=False)
    assert best["extra_state"]["best"] == records[-1]["valid_best_bleu"]


def test_two_processes_add_up_what_they_have_translated(run, data, tmp_path):
    """Also when one of them is out of batches before the other."""
    folder, records = run
    command = toy_task.train_command(
        *(data, tmp_path, "--eval-bleu", *toy_task.MODELS["smoe"]),
        *("--reset-optimizer", "--reset-lr-scheduler", "--reset-meters", "--reset-dataloader"),
        restore_file=folder / "checkpoint_last.pt",
        max_update=1,
        lr=1e-12,  # the model stays as it is
        warmup_updates=None,
        eval_bleu_sentences=0,
        max_tokens_valid=250,
        ddp_backend="legacy_ddp",
    )
    outcome = toy_task.run(
        *("torchrun", "--standalone", "--nproc_per_node", 2, "--no-python", *command)
    )
    assert "training on 2 devices" in outcome.stdout
    (scores,) = outcome.log("valid")
    for name in ("valid_bleu", *(f"valid_bleu_{d}" for d in DIRECTIONS)):
        assert scores[name] == pytest.approx(records[-1][name], abs=0.011)


@pytest.fixture(scope="module")
def ready(data, run):
    def load(**values):
        _, task, model, criterion = toy_task.set_up(
            data, "--eval-bleu", *toy_task.MODELS["smoe"], **values
        )
        state = torch.load(run[0] / "checkpoint_last.pt", weights_only=False)
        model.load_state_dict(state["model"])
        task.load_dataset("valid")
        return task, model.eval(), criterion

    return load


def sums_of(task, model, parts):
    dataset = task.datasets["valid"]
    batches = [dataset.collater([dataset[i] for i in part]) for part in parts]
    return [task.validation_bleu.statistics(batch, model) for batch in batches]


@pytest.mark.parametrize("beam", [1, 3])
def test_batches_that_mix_directions_add_up_to_the_same(ready, beam):
    task, model, _ = ready(eval_bleu_sentences=0, eval_bleu_beam=beam)
    size = len(task.datasets["valid"])
    shuffled = torch.randperm(size, generator=torch.Generator().manual_seed(1)).tolist()
    in_order = list(range(size))
    (together,) = sums_of(task, model, [in_order])
    apart = sum(sums_of(task, model, [in_order[i : i + 30] for i in range(0, size, 30)]))
    mixed = sum(sums_of(task, model, [shuffled[:7], shuffled[7:50], shuffled[50:]]))
    assert torch.equal(together, apart)
    assert torch.equal(together, mixed)
    assert (together[:, -1] > 0).all()


def test_only_the_first_sentences_of_each_direction_are_translated(ready):
    task, model, criterion = ready(eval_bleu_sentences=4)
    dataset = task.datasets["valid"]
    (sums,) = sums_of(task, model, [range(len(dataset))])
    for d in range(len(DIRECTIONS)):
        start = 30 * d
        # without end of sentence and language token
        words = sum(len(dataset[start + i]["target"]) - 2 for i in range(4))
        assert sums[d, -1] == words
    none = dataset.collater([dataset[i] for i in (10, 40, 70)])
    log = task.valid_step(none, model, criterion)[2]
    assert log["bleu_statistics"].shape == sums.shape  # every process logs the same names
    assert not log["bleu_statistics"].any()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"eval_bleu_beam": 0}, "--eval-bleu-beam 0: expected 1 or more"),
        ({"eval_bleu_sentences": -1}, "--eval-bleu-sentences -1: expected 0 or more"),
        ({"ddp_backend": "fully_sharded"}, "fully_sharded"),
    ],
)
def test_wrong_options(data, options, words):
    with pytest.raises(OptionError, match=words):
        toy_task.set_up(data, "--eval-bleu", **options)
