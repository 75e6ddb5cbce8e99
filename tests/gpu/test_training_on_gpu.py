"""fairseq-train in every precision on a GPU, its resuming, and what its model translates."""

import json

import pytest
import toy_task

pytestmark = pytest.mark.gpu

WAYS = {
    "fp32": {},
    "fp16": {"fp16": True},
    "bf16": {"bf16": True},
    "amp": {"amp": True},
    "fully-sharded": {"fp16": True, "ddp_backend": "fully_sharded"},
    "recomputed": {"fp16": True, "checkpoint_activations": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_twenty_updates_and_resume(data, tmp_path, device, cpu, way):
    if device == "cpu" and way == "fully-sharded":
        pytest.skip("fully_sharded needs a GPU")
    options = {**WAYS[way], **cpu, "log_interval": 5}
    model = toy_task.MODELS["smoe"]
    first = toy_task.train(data, tmp_path, *model, max_update=20, **options)
    assert (tmp_path / "checkpoint_last.pt").exists()
    losses = first.losses()
    assert len(losses) == 4 and losses[-1] < losses[0]
    second = toy_task.train(data, tmp_path, *model, max_update=30, **options)
    updates = [int(record["num_updates"]) for record in second.log("train_inner")]
    assert updates == [25, 30] and second.losses()[-1] < losses[0]


@pytest.fixture
def own_model(make_once, data, trained, device):
    """A checkpoint that this device has trained long enough to translate."""

    def make(folder):
        options = {**toy_task.LONG_ENOUGH, "cpu": False}
        toy_task.train(data, folder, *toy_task.MODELS["smoe"], **options)

    if device == "cpu":
        return trained("smoe")
    return make_once("trained-on-gpu", make) / "checkpoint_last.pt"


def test_translations_are_those_of_the_cpu(data, own_model, cpu):
    here = toy_task.generate(data, own_model, **cpu)
    there = toy_task.generate(data, own_model, cpu=True)
    assert here.bleu > 50 and len(here.sentences) == toy_task.SPLIT_SIZES["test"]
    assert here.sentences.keys() == there.sentences.keys()
    for number, (score, text) in there.sentences.items():
        assert here.sentences[number][1] == text
        assert here.sentences[number][0] == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize("half", [False, True])
def test_evaluate(data, own_model, tmp_path, device, half):
    options = ["--cpu"] if device == "cpu" else ["--fp16"] * half
    (tmp_path / "run").mkdir()
    toy_task.run(
        *("python", "-m", "fairseq_smoe", "evaluate", "--run", tmp_path / "run"),
        *("--checkpoint", own_model, "--data", data, *options),
    )
    path = tmp_path / "run/evaluation/test/scores.json"
    directions = json.loads(path.read_text())["directions"]
    assert directions.keys() == set(toy_task.DIRECTIONS)
    assert all(scores["piece-bleu"] > 80 for scores in directions.values())
