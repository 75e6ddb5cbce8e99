"""A model that has learned the toy task from text, with SentencePiece."""

from types import SimpleNamespace

import pytest
import toy_task
from prepared_folder import run as prepare


@pytest.fixture(scope="session")
def spoken_data(make_once, text):
    """The toy task as ``prepare`` leaves it."""

    def make(folder):
        options = {"pairs": "en-aa,en-bb", "vocab-size": "18", "clean": "none"}
        prepare(text, folder / "data", **options)

    return make_once("spoken-data", make) / "data"


@pytest.fixture(scope="session")
def spoken(make_once, spoken_data):
    """Folder of a training of the stratified model, with ``checkpoints/``."""

    def make(folder):
        checkpoints = folder / "checkpoints"
        toy_task.train(spoken_data, checkpoints, *toy_task.MODELS["smoe"], **toy_task.LONG_ENOUGH)

    return make_once("spoken", make)


@pytest.fixture(scope="session")
def generated(spoken, spoken_data, make_once):
    """What fairseq-generate makes of the test sets: ``{direction: lines, sources and scores}``."""
    found = {}
    for direction in toy_task.DIRECTIONS:
        outcome = toy_task.generate(
            spoken_data,
            spoken / "checkpoints" / "checkpoint_best.pt",
            direction,
            *("--remove-bpe", "sentencepiece", "--beam", "5"),
        )
        source = direction.split("-")[0]
        pair = "-".join(sorted(direction.split("-"), key=lambda lang: lang != "en"))
        path = spoken_data / f"test.{pair}.{source}.txt"
        found[direction] = SimpleNamespace(
            sources=path.read_text().splitlines(),
            lines=[outcome.sentences[i][1] for i in sorted(outcome.sentences)],
            scores=[outcome.sentences[i][0] for i in sorted(outcome.sentences)],
        )
    return found
