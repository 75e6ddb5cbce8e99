"""The task: language tokens, the list of languages, directions and their validation losses."""

import pytest
import torch
import toy_task
from fairseq.logging import metrics
from toy_task import DIRECTIONS, LANGS, set_up


@pytest.fixture(scope="module")
def ready(data):
    """``(task, model, criterion)`` with the validation set of all directions, not trained."""
    _, task, model, criterion = set_up(data, smoe_strata="2-2")
    task.load_dataset("valid")
    return task, model.eval(), criterion


def whole_set(task):
    dataset = task.datasets["valid"]
    return dataset.collater([dataset[i] for i in range(len(dataset))])


def test_the_target_language_stands_in_front_of_source_and_target(ready):
    task, _, _ = ready
    dictionary = task.source_dictionary
    batch = whole_set(task)
    pad, eos = dictionary.pad(), dictionary.eos()
    for source, target, previous, direction in zip(
        batch["net_input"]["src_tokens"],
        batch["target"],
        batch["net_input"]["prev_output_tokens"],
        batch["direction"],
    ):
        token = dictionary.index(f"__{DIRECTIONS[direction].split('-')[1]}__")
        assert token != dictionary.unk()
        assert source[source != pad][0] == token
        assert target[0] == token
        assert previous[:2].tolist() == [eos, token]


def test_language_tokens_can_be_chosen_otherwise(data):
    _, task, _, _ = set_up(data, "--no-decoder-langtok", "--encoder-langtok", "src")
    task.load_dataset("valid")
    dictionary = task.source_dictionary
    batch = whole_set(task)
    for source, target, direction in zip(
        batch["net_input"]["src_tokens"], batch["target"], batch["direction"]
    ):
        token = dictionary.index(f"__{DIRECTIONS[direction].split('-')[0]}__")
        assert source[source != dictionary.pad()][0] == token
        assert not dictionary[target[0]].startswith("__")


def test_a_batch_knows_the_direction_of_each_sentence(ready, text):
    task, _, _ = ready
    batch = whole_set(task)
    size = toy_task.SPLIT_SIZES["valid"]
    assert torch.bincount(batch["direction"]).tolist() == [size] * len(DIRECTIONS)
    assert sorted(batch["id"].tolist()) == list(range(size * len(DIRECTIONS)))
    dictionary = task.target_dictionary
    for target, direction in zip(batch["target"], batch["direction"]):
        language = DIRECTIONS[direction].split("-")[1]
        words = [dictionary[i] for i in target[1:] if i > dictionary.unk()]
        assert all(word.startswith(language) for word in words) and words


def test_directions_are_sampled_by_size_by_default(data):
    cfg, _, _, _ = set_up(data)
    assert cfg.task.sampling_method == "temperature"
    assert cfg.task.sampling_temperature == 1.0


def test_languages_come_from_the_data_folder(data):
    """The same vocabulary as with --langs, whichever directions are trained: language tokens keep
    their place."""
    symbols = [
        set_up(data, lang_pairs=pairs, **options)[1].source_dictionary.symbols
        for pairs, options in (
            (",".join(DIRECTIONS), {"langs": ",".join(LANGS)}),
            (",".join(DIRECTIONS), {}),
            ("en-bb", {}),
        )
    ]
    assert symbols[0] == symbols[1] == symbols[2]
    assert [s for s in symbols[0] if s.startswith("__")][: len(LANGS)] == [
        f"__{lang}__" for lang in LANGS
    ]


# --------------------------------------------------------------------------------------
# validation losses


def test_validation_loss_of_a_direction_is_that_of_its_sentences_alone(ready):
    """Per token, in bits; all directions in one batch or each in its own."""
    task, model, criterion = ready
    dataset = task.datasets["valid"]
    batch = whole_set(task)
    together = validate(task, model, criterion, batch)
    for index, direction in enumerate(DIRECTIONS):
        own = [i for i, d in zip(batch["id"].tolist(), batch["direction"]) if d == index]
        alone = validate(task, model, criterion, dataset.collater([dataset[i] for i in own]))
        assert together[f"nll_loss_{direction}"] == pytest.approx(alone["nll_loss"], abs=1e-3)
        assert [n for n in alone if n.startswith("nll_loss_")] == [f"nll_loss_{direction}"]


def test_validation_losses_average_to_the_overall_one(ready):
    """Also when the batches are unevenly filled, weighted by tokens."""
    task, model, criterion = ready
    dataset = task.datasets["valid"]
    indices = list(range(len(dataset)))
    batches = [
        dataset.collater([dataset[i] for i in part]) for part in (indices[:50], indices[50:])
    ]
    logs = [log_of(task, model, criterion, batch) for batch in batches]
    found = reduced(task, logs, criterion)
    tokens = [
        sum(log.get(f"direction_ntokens_{direction}", 0) for log in logs)
        for direction in DIRECTIONS
    ]
    assert sum(tokens) == sum(log["ntokens"] for log in logs)
    mean = sum(found[f"nll_loss_{d}"] * n for d, n in zip(DIRECTIONS, tokens)) / sum(tokens)
    assert found["nll_loss"] == pytest.approx(float(mean), abs=1e-3)


def log_of(task, model, criterion, batch):
    return task.valid_step(batch, model, criterion)[2]


def reduced(task, logs, criterion):
    """What fairseq would log for these batches."""
    with metrics.aggregate(new_root=True) as aggregator:
        task.reduce_metrics(logs, criterion)
    return aggregator.get_smoothed_values()


def validate(task, model, criterion, batch):
    return reduced(task, [log_of(task, model, criterion, batch)], criterion)
