"""What the gates of a model choose on a text, and what each expert would make of it."""

from contextlib import ExitStack

import torch

from fairseq_smoe.conversion.similarity import LinearCKA
from fairseq_smoe.moe.dispatch import Runs
from fairseq_smoe.moe.expert_kinds.adapter import AdapterExperts
from fairseq_smoe.moe.strata import own_experts

_ROWS = 1024  # tokens whose outputs of all experts are in memory at a time


class BlockOnText:
    """Hooks on the gates of a block, while a text runs through the model.

    Padding never reaches a gate. A token counts once for each pass.

    Args:
        block: :class:`~fairseq_smoe.moe.block.SMoEBlock`
        compare: whether to compare the outputs of the experts, which are computed for all tokens,
            whatever the gate chooses. Only experts of the same stratum are compared: with the
            normalised tokens at all gates that see the stratum.

    Attributes:
        visits_E: how often each expert has been chosen, at all gates.
        num_tokens: tokens that have entered the block.
        similarity: of the experts of each stratum, (E, E) in numpy; None before :meth:`finish`.
    """

    def __init__(self, block, compare):
        self.visits_E = torch.zeros(sum(block.strata), dtype=torch.long)
        self.num_tokens, self.similarity = 0, None
        self._block, self._own = block, own_experts(block.strata)
        self._compared = []
        if compare:
            weight = block.gates[0].weight
            self._compared = [
                LinearCKA(size, weight.shape[1], weight.device) for size in block.strata
            ]

    @staticmethod
    def num_bytes(block):
        """Memory that the comparison needs."""
        width = block.gates[0].weight.shape[1]
        return sum(LinearCKA.num_bytes(size, width) for size in block.strata)

    def hooked(self):
        """A context manager in which this object looks on."""
        stack = ExitStack()
        for i, gate in enumerate(self._block.gates):
            handle = gate.register_forward_hook(
                lambda _, inputs, choices, i=i: self._add(i, *inputs, choices)
            )
            stack.callback(handle.remove)
        return stack

    def finish(self):
        """Compute the similarities, and free what they are computed from."""
        self.similarity = [compared.matrix() for compared in self._compared]
        self._compared = []

    @torch.no_grad()
    def _add(self, i, tokens_TD, here_T, choices):
        seen, expert_C = self._block.visible[i], choices.expert_C
        if here_T is not None:
            expert_C, tokens_TD = expert_C[here_T[choices.token_C]], tokens_TD[here_T]
        visits = expert_C.bincount(minlength=len(seen)).cpu()
        self.visits_E[seen.start : seen.stop] += visits
        self.num_tokens += len(tokens_TD) if i == 0 else 0
        for s, compared in enumerate(self._compared):
            if self._own[s].start in seen:
                for rows in tokens_TD.split(_ROWS):
                    compared.add(expert_outputs(self._block, s, rows))


def expert_outputs(block, stratum, tokens_TD):
    """The output (T, D) of each expert of a stratum for all tokens, a list."""
    experts = block.experts
    if isinstance(experts, AdapterExperts) and stratum == len(block.strata) - 1:
        ffn = experts.ffn  # what these adapters read
        tokens_TD = ffn.fc2(experts.activation_fn(ffn.fc1(tokens_TD)))
    runs = Runs(torch.full((1,), len(tokens_TD), device=tokens_TD.device), len(tokens_TD))
    shared = experts.share(tokens_TD.dtype)
    return [
        experts.multiply(tokens_TD, runs, shared, range(e, e + 1))
        for e in own_experts(block.strata)[stratum]
    ]


def look_at(text, names, compare):
    """Run a text through a model.

    As many blocks as their comparisons take half of the model's memory are looked at in one run;
    so there may be several.

    Args:
        text: :class:`~fairseq_smoe.conversion.text.Text`
        names: of the model's blocks.
        compare: see :class:`BlockOnText`.

    Returns:
        ``{name: BlockOnText}``
    """
    blocks = {name: text.model.get_submodule(name) for name in names}
    room = sum(p.numel() * p.element_size() for p in text.model.parameters()) // 2
    rounds, left = [], 0
    for name, block in blocks.items():
        needed = BlockOnText.num_bytes(block) if compare else 0
        if not rounds or needed > left:
            rounds.append([])
            left = room
        rounds[-1].append(name)
        left -= needed
    found = {}
    for number, members in enumerate(rounds, 1):
        with ExitStack() as hooks:
            seen = {name: BlockOnText(blocks[name], compare) for name in members}
            for block in seen.values():
                hooks.enter_context(block.hooked())
            part = f" {number}/{len(rounds)}" if len(rounds) > 1 else ""
            text.run(f"experts on the text{part}")
        for block in seen.values():
            block.finish()
        found |= seen
    return found
