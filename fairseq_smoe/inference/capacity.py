"""The passes of each token of a sentence and of its translation."""

import torch

from fairseq_smoe.inference.results import SIDES, Capacity, TokenCapacity
from fairseq_smoe.translation.layers import expert_layers


def capacity_of(model, source, translation, task, coder):
    """Run a model once over a sentence and its translation, and read what its gates decided.

    Args:
        source: (S,) int64, with language token and end.
        translation: (T,) int64, as the search has found it: with language token and end.
        task: of the direction.

    Returns:
        :class:`~fairseq_smoe.inference.results.Capacity`; None for a model without experts.
    """
    layers = expert_layers(model)
    if not layers:
        return None
    device = next(model.parameters()).device
    before = task.target_dictionary.eos()
    if task.args.lang_tok_replacing_bos_eos:
        before = task.data_manager.get_decoder_langtok(
            task.args.target_lang, task.args.langtoks["main"][1]
        )
    inputs = torch.cat([torch.tensor([before]), translation[:-1]])
    model(
        source.unsqueeze(0).to(device),
        torch.tensor([len(source)], device=device),
        inputs.unsqueeze(0).to(device),
    )
    routed = {side: [] for side in SIDES}
    names = {side: [] for side in SIDES}
    for name, layer in layers:
        side, number = name.split(".")[0], int(name.split(".")[2]) + 1
        routed[side].append(_routes(layer))
        names[side].append(f"layer {number}")
    tokens = {"encoder": source, "decoder": translation}
    source_side, target_side = (
        tuple(
            TokenCapacity(
                coder.symbol(token),
                tuple(passes[i] for passes, _ in routed[side]),
                tuple(experts[i] for _, experts in routed[side]),
            )
            for i, token in enumerate(tokens[side].tolist())
        )
        for side in SIDES
    )
    return Capacity(source_side, target_side, {side: tuple(names[side]) for side in SIDES})


def _routes(layer):
    """``(passes of each token, experts of each token in each pass)`` of the last forward pass of a
    layer, over one sentence."""
    stats, block, heads = layer.routing_stats, layer.routed_block, layer.heads
    passes = stats.passes.reshape(-1, heads).float().mean(dim=1).tolist()
    visited = [[] for _ in passes]
    for record, visible, places in zip(stats.gates, block.visible, block.places(stats)):
        experts = {place: [] for place in places}
        chosen = zip(record.token_C.tolist(), record.expert_C.tolist())
        for token, expert in chosen:
            # without a mask, the records number the tokens that were at the gate
            place = token if record.here_T is not None else places[token]
            if place in experts:
                experts[place].append(visible.start + expert)
        for place, own in experts.items():
            visited[place // heads].append(tuple(sorted(own)))
    return passes, [tuple(own) for own in visited]
