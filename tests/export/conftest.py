"""Models that have learned a small task from text, and what fairseq-generate makes of its test
sets; and the libraries that read what is exported."""

import sys
from types import SimpleNamespace

import pytest
import toy_task
from prepared_folder import run as prepare

from fairseq_smoe.evaluation.test_set import to_text

try:
    import torchaudio  # noqa: F401
except (ImportError, OSError):
    # transformers imports it wherever it finds it, also where it was built for another torch
    sys.modules["torchaudio"] = None

# the rows of which exported models are compared with fairseq-generate
MODELS = {
    "dense": ["--moe-freq", "0"],
    "vanilla": ["--smoe-strata", "4"],
    "strata": ["--smoe-strata", "2-2"],
}
UPDATES = {name: 250 for name in MODELS}
UPDATES["dense"] = 400  # the tokens of languages become likely, which CTranslate2 does not score
MOST_WORDS = 200  # of a translation
LETTERS = str.maketrans("01234567", "knopqrst")


@pytest.fixture(scope="session")
def words_data(make_once):
    """The toy task in words of letters, most of which are one piece, as ``prepare`` leaves it."""

    def make(folder):
        text = folder / "text"
        toy_task.write_corpus(text)
        for path in text.glob("*.*-*.*"):
            path.write_text(path.read_text().translate(LETTERS))
        options = {"pairs": "en-aa,en-bb", "vocab-size": "36", "clean": "none"}
        prepare(text, folder / "data", **options)

    return make_once("words-data", make) / "data"


@pytest.fixture(scope="session")
def learned(make_once, words_data):
    """``learned(name)``: folder of a training of one of :data:`MODELS`."""

    def learned(name):
        def make(folder):
            updates = {"max_update": UPDATES[name], "total_num_update": UPDATES[name]}
            more = {**updates, "warmup_updates": 50, "dropout": 0}
            toy_task.train(words_data, folder, *MODELS[name], **more)

        return make_once(f"words-{name}", make)

    return learned


@pytest.fixture(scope="session")
def generated(learned, words_data):
    """``generated(name)``: what fairseq-generate makes of the test sets, ``{direction: sources,
    lines, pieces, scores, cut_off}``. The scores are mean log2-probabilities; translations are cut
    off at the maximal length."""
    found = {}

    def of_direction(name, direction):
        outcome = toy_task.generate(
            words_data,
            learned(name) / "checkpoint_best.pt",
            direction,
            *("--beam", "5", "--max-len-b", str(MOST_WORDS)),
        )
        source = direction.split("-")[0]
        pair = "-".join(sorted(direction.split("-"), key=lambda lang: lang != "en"))
        text = words_data / f"test.{pair}.{source}.txt"
        found = [outcome.sentences[i] for i in sorted(outcome.sentences)]
        return SimpleNamespace(
            sources=text.read_text().splitlines(),
            lines=[to_text(pieces) for _, pieces in found],
            pieces=[pieces.split() for _, pieces in found],
            scores=[score for score, _ in found],
            cut_off=[len(pieces.split()) >= MOST_WORDS for _, pieces in found],
        )

    def generated(name):
        if name not in found:
            found[name] = {d: of_direction(name, d) for d in toy_task.DIRECTIONS}
            assert sum(len(own.lines) for own in found[name].values()) >= 200
        return found[name]

    return generated


@pytest.fixture(scope="session")
def transformers(tmp_path_factory):
    """The library, which copies code that travels with models into a folder of the tests."""
    library = pytest.importorskip("transformers")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        modules = tmp_path_factory.mktemp("hugging-face")
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
        patch.syspath_prepend(modules)
        yield library
