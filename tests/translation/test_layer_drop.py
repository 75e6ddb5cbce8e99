"""Which layers are dropped is the same in every process, at the rate that was asked for."""

import torch
from fairseq.modules import LayerDropModuleList
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairseq_smoe.translation.layer_drop import begin_update, drop_alike, drops_layers

SEEDS = st.integers(0, 2**31)


def side(name, p, num_layers=6):
    layers = LayerDropModuleList(p, [nn.Linear(1, 1) for _ in range(num_layers)])
    return drop_alike(layers, name)


def kept(layers):
    numbers = {layer: i for i, layer in enumerate(layers._modules.values())}
    return [numbers[layer] for layer in layers]


@settings(deadline=None)
@given(SEEDS, st.floats(0, 1), st.integers(1, 4), st.lists(SEEDS, max_size=3))
def test_every_process_keeps_the_same_layers(seed, p, passes, drawn_between):
    """Whatever each of them has drawn from torch's generator, and whatever updates it has seen."""
    ranks = side("encoder", p), side("encoder", p)
    for earlier in drawn_between:
        begin_update(ranks[1], earlier)
        kept(ranks[1])
    found = []
    for layers in ranks:
        begin_update(layers, seed)
        torch.rand(len(found) * 10)
        before = torch.get_rng_state()
        found.append([kept(layers) for _ in range(passes)])
        assert torch.equal(torch.get_rng_state(), before), "leaves dropout's numbers alone"
    assert found[0] == found[1]
    if p == 0:
        assert found[0] == [list(range(6))] * passes


@settings(max_examples=10, deadline=None)
@given(SEEDS, st.floats(0.05, 0.95))
def test_each_layer_is_dropped_at_the_rate_and_by_itself(first_seed, p):
    encoder, decoder = side("encoder", p), side("decoder", p)
    dropped = torch.zeros(2, 1500, 6)
    for update in range(1500):
        for draws, layers in zip(dropped, (encoder, decoder)):
            begin_update(layers, first_seed + update)
            draws[update] = 1
            draws[update, kept(layers)] = 0
    rates = dropped.mean(1).flatten()
    spread = (p * (1 - p) / 1500) ** 0.5
    assert (rates - p).abs().max() < 5 * spread
    together = torch.corrcoef(torch.cat(list(dropped), dim=1).t())
    assert (together - torch.eye(12)).abs().max() < 0.16, "of 1,500 coins: 6 standard deviations"


def test_all_layers_are_kept_when_translating():
    layers = side("decoder", 0.9).eval()
    assert kept(layers) == list(range(6)) and drops_layers(layers)


def test_it_is_left_to_fairseq_where_nothing_is_dropped():
    layers = nn.ModuleList([nn.Linear(1, 1)])
    assert drop_alike(layers, "encoder") is layers and not drops_layers(layers)
