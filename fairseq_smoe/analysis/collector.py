"""Counting the routing of all tokens that a model processes, with forward hooks."""

import torch

from fairseq_smoe.analysis.counts import BlockCounts
from fairseq_smoe.translation.layers import expert_layers

SIDES = ("encoder", "decoder")
FLUSH_AT = 1 << 16  # tokens, or heads, of a block that are counted together: a few MB


class RoutingCollector:
    """Hooks on the expert blocks of a model that count requested capacity and choices of experts.

    Tokens are those that the embedding looks up. In the encoder this is the source with its
    language token and end of sentence. In the decoder it is the *input* (``prev_output_tokens``),
    which begins with end of sentence; in beam search, every beam's last token at every step. A
    block works on the tokens that were embedded last, whether or not both sides share an embedding.

    Tokens are collected and counted :data:`FLUSH_AT` at a time, so that a step of beam search costs
    a few appends to lists, and the host rarely waits for a GPU.

    Use it as a context manager, or call :meth:`remove`, to take the hooks off again.
    """

    def __init__(self, model, num_types):
        """
        Args:
            model: an ``SMoETransformer``, in evaluation mode when it runs.
            num_types: V, the size of the vocabulary.
        """
        self._embedded = None
        self.blocks = []
        self._handles = []
        numbers = dict.fromkeys(SIDES, 0)
        for name, layer in expert_layers(model):
            path = name.split(".")
            side = next(side for side in SIDES if side in path)
            numbers[side] += 1
            block = _BlockCollector(layer, side, numbers[side], int(path[-1]) + 1, num_types)
            self.blocks.append(block)
            self._handles.append(layer.expert_block.register_forward_hook(self._counting_in(block)))
        embeddings = {getattr(model, side).embed_tokens for side in SIDES}
        self._handles += [e.register_forward_hook(self._remember) for e in embeddings]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.remove()

    def remove(self):
        """Remove the hooks from the model; the counts are kept."""
        for handle in self._handles:
            handle.remove()

    def take(self):
        """Return one :class:`BlockCounts` per expert block, encoder first, and reset the counts."""
        return [block.take() for block in self.blocks]

    def _remember(self, module, inputs, output):
        # a copy: beam search reorders the tensor of its hypotheses in place
        self._embedded = inputs[0].clone()

    def _counting_in(self, block):
        def count(module, inputs, output):
            block.add(self._embedded, output[1])

        return count


class _BlockCollector:
    """The counts of one block so far, and the statistics that are not counted yet."""

    def __init__(self, layer, side, block, layer_number, num_types):
        expert_block = layer.routed_block
        self.name = dict(side=side, block=block, layer=layer_number, strata=expert_block.strata)
        self.heads = layer.heads
        self.first_experts = [experts.start for experts in expert_block.visible]
        self.num_types = num_types
        self._reset()

    def _reset(self):
        num_strata, num_experts = len(self.name["strata"]), sum(self.name["strata"])
        self._forget_waiting()
        self._types_VP = torch.zeros(self.num_types, num_strata + 1, dtype=torch.long)
        self._best_E = torch.zeros(num_experts, dtype=torch.long)
        self._chosen_E = torch.zeros(num_experts, dtype=torch.long)
        self._visits, self._num_chosen = [0] * num_strata, [0] * num_strata

    def _forget_waiting(self):
        self._waiting = 0
        self._tokens, self._passes = [], []
        self._best = [[] for _ in self.first_experts]
        self._chosen = [[] for _ in self.first_experts]

    def add(self, tokens, stats):
        """Add a forward pass: (B, S) tokens and their ``BlockStats``."""
        if stats.passes.shape != (*tokens.shape, *[self.heads] * (self.heads > 1)):
            raise ValueError(
                f"tokens of shape {tuple(tokens.shape)} were embedded, but the block worked on "
                f"{tuple(stats.passes.shape)}"
            )
        self._tokens.append(tokens.reshape(-1).repeat_interleave(self.heads))
        self._passes.append(stats.passes.reshape(-1))
        for i, gate in enumerate(stats.gates):
            best, chosen = gate.best_T, gate.expert_C
            if gate.here_T is not None:
                best, chosen = best[gate.here_T], chosen[gate.here_C]
            self._best[i].append(best)
            self._chosen[i].append(chosen)
            self._visits[i] += len(best)
            self._num_chosen[i] += len(chosen)
        self._waiting += stats.passes.numel()
        if self._waiting >= FLUSH_AT:
            self._flush()

    def _flush(self):
        if not self._waiting:
            return
        tokens_T, passes_T = torch.cat(self._tokens), torch.cat(self._passes)
        num_passes = self._types_VP.shape[1]
        self._types_VP += _histogram(tokens_T * num_passes + passes_T, self._types_VP.shape)
        for counts_E, of_gates in ((self._best_E, self._best), (self._chosen_E, self._chosen)):
            for first_expert, waiting in zip(self.first_experts, of_gates):
                # gates count from the first expert that they see
                counts_E += _histogram(torch.cat(waiting) + first_expert, counts_E.shape)
        self._forget_waiting()

    def take(self):
        self._flush()
        self._types_VP[:, 0] = 0  # padding makes no pass
        counts = BlockCounts(
            **self.name,
            types_VP=self._types_VP.numpy(),
            first_E=self._best_E.numpy(),
            choices_E=self._chosen_E.numpy(),
            visits_L=torch.tensor(self._visits).numpy(),
            chosen_L=torch.tensor(self._num_chosen).numpy(),
            heads=self.heads,
        )
        self._reset()
        return counts


def _histogram(values, shape):
    """How often each of 0 .. prod(shape) - 1 occurs, in that shape, on the CPU."""
    return torch.bincount(values, minlength=shape.numel()).cpu().view(shape)
