"""Learning the weights with which experts are merged: the merged block is to compute what the block
computes (Zhang et al. 2024, arXiv 2407.09590, stage 3).

Letters in names: N tokens, D model dim, E experts before, G groups.
"""

from dataclasses import dataclass

import torch
from torch.func import functional_call
from tqdm import tqdm

from fairseq_smoe.conversion.merging import differentiable_mean

PARTS = 16  # of the text; with each of the first three quarters of them, a step is made per epoch
_ROWS = 4096  # tokens that go through the block at a time


@dataclass(frozen=True)
class Learned:
    """What has been learned.

    Attributes:
        weights_GE: with the lowest error on the tokens held out.
        error: this error; see :func:`learn_weights`.
        equal_error: that of equal weights.
        epoch: after which it was reached; 0 for equal weights.
    """

    weights_GE: torch.Tensor
    error: float
    equal_error: float
    epoch: int


def block_inputs(text, name):
    """The tokens that enter a block while a text runs through the model, (N, D), without padding.

    Args:
        name: of the :class:`~fairseq_smoe.moe.block.SMoEBlock` in ``text.model``.
    """
    found = []

    def keep(_, inputs):
        x, padding_mask = (*inputs, None)[:2]
        found.append(x.flatten(0, -2) if padding_mask is None else x[~padding_mask])

    handle = text.model.get_submodule(name).register_forward_pre_hook(keep)
    try:
        text.run(f"tokens of {name.partition('.expert_block')[0]}")
    finally:
        handle.remove()
    return torch.cat(found)


def learn_weights(block, smaller, state, merger, inputs, epochs, rate):
    """Learn them by stochastic gradient descent, from equal weights on.

    What is minimised is the error, |f(x) - g(x)|^2 / |f(x) - x|^2, where f is the block and g the
    merged one, summed over all tokens of a part of the text. The gate's choices are those of the
    merged gate, as in translation. The weights of a group always sum to 1, and may be negative.

    Args:
        block: in evaluation mode.
        smaller: a block of the merged size, whose own values do not matter, in evaluation mode.
        state: of ``block``, as for :meth:`~fairseq_smoe.conversion.merging.Merger.apply`.
        merger: :class:`~fairseq_smoe.conversion.merging.Merger`
        inputs: the tokens (N, D) of every part of the text; the last quarter of the parts is held
            out.
        epochs, rate: steps with each part, and their size.

    Returns:
        :class:`Learned`
    """
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    equal_GE = merger.equal_weights().to(inputs[0])
    member_GE = (equal_GE > 0).to(equal_GE)
    state = {
        n: v.to(inputs[0] if v.is_floating_point() else inputs[0].device) for n, v in state.items()
    }
    constant = {n: v for n, v in block.state_dict().items() if n.startswith(("norms", "experts."))}
    held_out = max(len(inputs) // 4, 1)
    with torch.no_grad():
        pairs = [[(x, block(x)[0]) for x in part.split(_ROWS)] for part in inputs]
    sizes = [sum((y - x).square().sum() for x, y in part).clamp(min=1e-30) for part in pairs]

    def weights(shift_E):
        return equal_GE + member_GE * shift_E - equal_GE * (member_GE @ shift_E).unsqueeze(1)

    def error(part, size, weights_GE):
        parameters = constant | merger.apply(state, weights_GE, differentiable_mean)
        squares = [
            (functional_call(smaller, parameters, (x,))[0] - y).square().sum() for x, y in part
        ]
        return sum(squares) / size

    @torch.no_grad()
    def error_held_out(weights_GE):
        held = zip(pairs[-held_out:], sizes[-held_out:])
        total = sum(error(part, size, weights_GE) * size for part, size in held)
        return float(total / sum(sizes[-held_out:]))

    shift_E = torch.zeros(equal_GE.shape[1]).to(equal_GE).requires_grad_()
    first = error_held_out(equal_GE)
    best = Learned(equal_GE, first, first, 0)
    for epoch in tqdm(range(1, epochs + 1), unit="epoch", desc="weights", disable=None):
        for part, size in zip(pairs[:-held_out], sizes):
            (gradient_E,) = torch.autograd.grad(error(part, size, weights(shift_E)), shift_E)
            with torch.no_grad():
                shift_E -= rate * gradient_E
        found = error_held_out(weights(shift_E).detach())
        if found < best.error:
            best = Learned(weights(shift_E).detach(), found, first, epoch)
    return best
