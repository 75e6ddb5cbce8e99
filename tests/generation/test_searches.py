"""Constraints, diverse beams and matching lengths, none of which take the language token for a
word."""

from argparse import Namespace

import fairseq.search
import pytest
import torch
import toy_task
from fairseq.hub_utils import GeneratorHubInterface
from fairseq.token_generation_constraints import pack_constraints
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_task import NUM_WORDS, interactive

SIZE = 12  # sentences


@pytest.fixture(scope="module")
def search(data, trained):
    """``search(phrases=None, **options)``: hypotheses of some sentences of the test set, as
    lists of ``(score, words)``, best first."""
    task, model = toy_task.load(data, trained("smoe"))
    dataset = task.dataset("test")
    # from the middle of the data, as in any batch but the first
    indices = sorted(range(20, 20 + SIZE), key=lambda i: -len(dataset[i]["source"]))

    def search(phrases=None, **options):
        generator = task.build_generator([model], Namespace(**{"beam": 4, **options}))
        batch = dataset.collater([dataset[i] for i in indices])
        constraints = None
        if phrases is not None:
            dictionary = task.target_dictionary
            packed = pack_constraints(
                [
                    [
                        dictionary.encode_line(c, append_eos=False, add_if_not_exist=False)
                        for c in cs
                    ]
                    for cs in phrases
                ]
            )
            # the collater sorts the sentences
            constraints = packed[[indices.index(i) for i in batch["id"].tolist()]]
        found = task.inference_step(generator, [model], batch, constraints=constraints)
        rows = {
            i: [
                (
                    float(hypothesis["score"]),
                    # without the first token, but with any other language token
                    task.target_dictionary.string(hypothesis["tokens"][1:]).split(),
                )
                for hypothesis in hypotheses
            ]
            for i, hypotheses in zip(batch["id"].tolist(), found)
        }
        return [rows[i] for i in indices]

    search.sources = [
        task.source_dictionary.string(dataset[i]["source"][1:]).split() for i in indices
    ]
    return search


def position(words, phrase):
    """Where a phrase begins, or None."""
    starts = range(len(words) - len(phrase) + 1)
    return next((i for i in starts if words[i : i + len(phrase)] == phrase), None)


phrases = st.lists(
    st.sampled_from([f"{lang}{i}" for lang in ("aa", "bb") for i in range(NUM_WORDS)]),
    min_size=1,
    max_size=2,
).map(" ".join)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(phrases, max_size=2), min_size=SIZE, max_size=SIZE),
    st.sampled_from(["ordered", "unordered"]),
    st.sampled_from([1, 2, 5]),
)
def test_constraints_are_in_the_translation(search, constraints, kind, beam):
    found = search(constraints, constraints=kind, beam=beam)
    plain = search(beam=beam)
    for hypotheses, expected, without in zip(found, constraints, plain):
        if not expected:
            assert hypotheses[0][1] == without[0][1]
        score, words = hypotheses[0]
        assert score > -torch.inf
        for phrase in expected:
            assert position(words, phrase.split()) is not None


def test_constraints_on_the_command_line(data, trained):
    """They follow the sentence, separated by tabs."""
    lines = ["en1 en2 en3\taa5\taa7 aa6", "en4 en5", "en2 en7\tbb0"]
    options = (data, trained("smoe"), lines, "en-aa")
    for kind in ("ordered", "unordered"):
        printed = interactive(*options, "--constraints", kind)
        words = {i: sentence.split() for i, (_, sentence) in printed.sentences.items()}
        first, second = position(words[0], ["aa5"]), position(words[0], ["aa7", "aa6"])
        assert first is not None and second is not None
        assert kind == "unordered" or first < second
        assert words[1] == ["aa5", "aa4"]
        assert "bb0" in words[2]
        assert "C-0\taa7 aa6" in printed.stdout


def test_one_group_of_beams_is_plain_beam_search(search):
    for grouped, plain in zip(search(diverse_beam_groups=1), search()):
        assert [words for _, words in grouped] == [words for _, words in plain]
        assert [score for score, _ in grouped] == pytest.approx([score for score, _ in plain])


@pytest.mark.parametrize("beam, groups", [(4, 4), (4, 2), (6, 3)])
def test_groups_of_beams_differ(search, beam, groups):
    """With a penalty greater than any difference of scores, no two groups begin with the same
    word; all hypotheses differ, and the best is that of plain beam search with a group's size."""
    options = {"diverse_beam_groups": groups, "diverse_beam_strength": 50.0}
    plain = search(beam=beam // groups)
    for hypotheses, first in zip(search(beam=beam, **options), plain):
        sentences = [tuple(words) for _, words in hypotheses]
        assert len(set(sentences)) == beam
        assert len({words[0] for words in sentences}) >= groups
        assert sentences[0] == tuple(first[0][1])


def test_as_many_words_as_the_source(search):
    for hypotheses, source in zip(search(match_source_len=True), search.sources):
        for score, words in hypotheses:
            assert score == -torch.inf or len(words) == len(source)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_phrase_is_repeated(search, size):
    def repeats(words):
        phrases = [tuple(words[i : i + size]) for i in range(len(words) + 1 - size)]
        return len(phrases) > len(set(phrases))

    changed = 0
    for hypotheses, plain in zip(search(no_repeat_ngram_size=size), search()):
        assert not any(repeats(words) for score, words in hypotheses if score > -torch.inf)
        changed += hypotheses[0] != plain[0]
        if not any(repeats(words) for _, words in plain):
            assert hypotheses[0] == plain[0]
    assert changed or size > 1


def test_parts_of_a_test_set(data, trained):
    """--num-shards and --shard-id: every sentence is in one part."""
    options = {"gen_subset": "valid", "max_tokens": 60, "num_shards": 2}
    parts = [
        toy_task.generate(data, trained("smoe"), shard_id=i, **options).sentences for i in (0, 1)
    ]
    assert all(len(part) > 5 for part in parts) and not parts[0].keys() & parts[1].keys()
    assert len(parts[0] | parts[1]) == toy_task.SPLIT_SIZES["valid"]


def test_fairseqs_own_strategies_are_left_alone(search):
    """Other tasks have the stock ones, and the stock hub interface."""
    assert fairseq.search.DiverseBeamSearch.__module__ == "fairseq.search"
    assert type(GeneratorHubInterface.__new__(GeneratorHubInterface)) is GeneratorHubInterface
