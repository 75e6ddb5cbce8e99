"""The passes of each token, as the translator returns them."""

import pytest
import toy_task

from fairseq_smoe import Translator
from fairseq_smoe.inference.results import Capacity


@pytest.mark.parametrize("name", ["vanilla", "smoe", "stacking", "cmr", "multi-head", "dense"])
def test_every_pass_visits_experts_that_its_gate_sees(name, spoken_data, tmp_path):
    toy_task.train(spoken_data, tmp_path, *toy_task.MODELS[name], max_update=40)
    translator = Translator.load(tmp_path / "checkpoint_last.pt")
    (found,) = translator.translate(["en1 en2 en3"], "en", "aa", with_capacity=True)
    if name == "dense":
        assert found.capacity is None
        return
    (capacity,) = found.capacity
    sources = [token.piece for token in capacity.source]
    assert sources[0] == "__aa__" and sources[-1] == "</s>"
    assert "".join(sources[1:-1]) == "▁en1▁en2▁en3"
    pieces = [token.piece for token in capacity.target]
    assert pieces == ["__aa__", *found.hypotheses[0].pieces, "</s>"]
    assert capacity.layers == {"encoder": ("layer 2",), "decoder": ("layer 2",)}
    several = name in ("smoe", "stacking", "multi-head")
    for token in (*capacity.source, *capacity.target):
        (passes,), (experts,) = token.passes, token.experts
        assert all(experts) and max(map(max, experts)) < 8
        if name == "multi-head":
            assert 1 <= passes <= 2
            continue
        assert len(experts) == passes and all(len(own) == 2 for own in experts)
        assert passes == 1 or several
        firsts = [min(own) for own in experts]  # a later gate sees later strata only
        bounds = {"smoe": (0, 2, 4, 6), "stacking": (0, 4)}.get(name, (0,))
        # whichever strata a token has passed through, its i-th gate is not before the i-th
        assert all(first >= bound for first, bound in zip(firsts, bounds))
    assert 1 <= Capacity.mean(capacity.target) <= 4
    if name == "stacking":
        assert Capacity.mean(capacity.source) == 2


def test_passes_are_those_of_the_model(spoken):
    """As when the model runs over the same sentence in a batch with padding."""
    import torch

    from fairseq_smoe.translation.layers import expert_layers

    translator = Translator.load(spoken)
    texts = ["en1 en2 en3 en4", "en5"]
    found = translator.translate(texts, "en", "aa", with_capacity=True)
    tasks = translator._tasks
    encode = translator._coder.encode
    tokens = [tasks.encode(("en", "aa"), encode(text, "en"))["source"] for text in texts]
    padded = torch.full((2, len(tokens[0])), 1)
    for row, own in zip(padded, tokens):
        row[-len(own) :] = own
    model = translator._models[0]
    tasks.set_beam_size(1)
    with torch.inference_mode():
        model.encoder(padded, torch.tensor(list(map(len, tokens))))
    ((_, layer),) = [pair for pair in expert_layers(model) if pair[0].startswith("encoder")]
    for row, own in zip(layer.routing_stats.passes, found):
        (capacity,) = own.capacity
        assert [t.passes[0] for t in capacity.source] == row[-len(capacity.source) :].tolist()
