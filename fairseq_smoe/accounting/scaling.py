"""Bytes between ranks, and in the memory of one, from formulas: what it costs to spread experts.

W ranks train side by side. N of them share the experts (``--moe-expert-parallel-size``), expert e
being on the rank e mod N, which leaves W / N replicas of each. docs/scaling.md derives the formulas
and compares them with what a training of four ranks gave to torch.
"""

from dataclasses import dataclass

from fairseq_smoe.moe.strata import own_experts, visible_experts

COUNT_BYTES = 8  # of a number of rows: int64
FULL = 4  # bytes of a number in full precision, which gates and optimizer have in any case

# --------------------------------------------------------------------------------------
# the model


def visit_probabilities(strata):
    """Chance of a token to stand at each gate, when every gate chooses its best expert uniformly.

    It meets gate i + 1 if the first best expert of stratum i or later is one of stratum i, whatever
    came before. The chances add up to :func:`~fairseq_smoe.moe.strata.mean_requested_capacity`.
    """
    return [1.0, *(size / sum(strata[i:]) for i, size in enumerate(strata[:-1]))]


@dataclass(frozen=True)
class Block:
    """An expert block, as far as bytes depend on it.

    Attributes:
        embed_dim, ffn_dim: D and F of its experts.
        strata: experts of each stratum.
        top_k: choices of a pass.
        stacked: whether all tokens visit every stratum, whose gate sees its own experts only.
    """

    embed_dim: int
    ffn_dim: int
    strata: tuple
    top_k: int = 2
    stacked: bool = False

    @property
    def visible(self):
        """The experts of each gate, as ranges."""
        return (own_experts if self.stacked else visible_experts)(self.strata)

    @property
    def choices(self):
        """Rows of a token at each gate; a gate that sees one expert gives one choice."""
        return [min(self.top_k, len(seen)) for seen in self.visible]

    @property
    def expert_params(self):
        """Parameters of all experts: two linear layers with biases each."""
        dim, ffn = self.embed_dim, self.ffn_dim
        return sum(self.strata) * (2 * dim * ffn + ffn + dim)

    def expected_visits(self, tokens):
        """Tokens at each gate, of so many in the block, under uniform gates."""
        chances = [1.0] * len(self.strata) if self.stacked else visit_probabilities(self.strata)
        return [tokens * chance for chance in chances]

    def expected_rows(self, tokens):
        """Rows that a rank sends at each gate, under uniform gates: at most, as those that find
        their expert full are not sent."""
        return [visits * k for visits, k in zip(self.expected_visits(tokens), self.choices)]

    def expected_received(self, tokens, size, rank):
        """Rows that a rank of ``size`` gets at each gate: as many as it sends, if it holds a
        fair share of the experts that the gate sees."""
        return [
            rows * size * sum(e % size == rank for e in seen) / len(seen)
            for rows, seen in zip(self.expected_rows(tokens), self.visible)
        ]

    def slowdown(self, size):
        """Rows of the busiest rank over those of the mean one, pass by pass: as all wait for the
        busiest one in every pass, the experts of a step take that many times as long."""
        by_rank = [self.expected_received(1, size, rank) for rank in range(size)]
        return sum(map(max, zip(*by_rank))) / sum(self.expected_rows(1))


@dataclass(frozen=True)
class Sizes:
    """A model.

    Attributes:
        blocks: a :class:`Block` for each of its expert layers.
        shared_params: parameters of all but the experts.
    """

    blocks: tuple
    shared_params: int

    @property
    def expert_params(self):
        return sum(block.expert_params for block in self.blocks)

    @property
    def num_experts(self):
        """Experts of a block; 0 in a dense model."""
        return sum(self.blocks[0].strata) if self.blocks else 0


def measure(model):
    """:class:`Sizes` of an ``SMoETransformer``, on the meta device as well, and where this process
    holds a share of the experts."""
    from fairseq_smoe.accounting.flops import count_parameters
    from fairseq_smoe.moe.arrangements.stacking import StackedMoEBlock
    from fairseq_smoe.translation.layers import expert_layers

    blocks, shared = [], count_parameters(model)
    for _, layer in expert_layers(model):
        block = layer.routed_block
        experts = block.experts
        top_k = max(gate.expected_choices() for gate in block.gates)
        stacked = isinstance(block, StackedMoEBlock)
        blocks.append(Block(experts.embed_dim, experts.ffn_dim, block.strata, top_k, stacked))
        shared -= count_parameters(block.experts)
    return Sizes(tuple(blocks), shared)


# --------------------------------------------------------------------------------------
# between ranks


@dataclass(frozen=True)
class Traffic:
    """Bytes of a rank and an update.

    Attributes:
        exchange: rows on the way to their experts and back, their gradients, and numbers of rows.
        shared: gradients of the parameters that all ranks have.
        experts: gradients of this rank's experts, for their replicas.
    """

    exchange: float
    shared: float
    experts: float

    @property
    def total(self):
        return self.exchange + self.shared + self.experts


def exchange_bytes(block, sent, received, number_bytes, recomputed=False):
    """What a rank hands to ``all_to_all_single`` in forward and backward of a block.

    Args:
        sent, received: rows at each gate.
        number_bytes: of a number of the model's precision.
        recomputed: whether backward goes through forward once more (--checkpoint-activations).
    """
    forward = 2 if recomputed else 1
    # a row goes to its expert and its output comes back, in backward so do their gradients
    rows = (forward + 1) * (sum(sent) + sum(received)) * block.embed_dim * number_bytes
    # numbers have no gradient
    return rows + forward * COUNT_BYTES * sum(len(seen) for seen in block.visible)


def handed_bytes(sizes, ranks, size, tokens, number_bytes, steps=1, recomputed=False):
    """What a mean rank hands to torch in an update, under uniform gates.

    Args:
        sizes: :class:`Sizes`
        ranks, size: W and N.
        tokens: of a rank and a step, in every block: no padding.
        number_bytes: of a number of the model's precision, as its gradients have it.
        steps: until the update (--update-freq).
        recomputed: see :func:`exchange_bytes`.

    Returns:
        :class:`Traffic`
    """
    exchange = 0
    if size > 1:
        for block in sizes.blocks:
            rows = block.expected_rows(tokens)
            exchange += steps * exchange_bytes(block, rows, rows, number_bytes, recomputed)
    shared = sizes.shared_params * number_bytes if ranks > 1 else 0
    experts = sizes.expert_params // size * number_bytes if ranks > size else 0
    return Traffic(exchange, shared, experts)


def sent_bytes(handed, ranks, size):
    """What leaves a mean rank, of what it has handed to torch: the rows that are not for its own
    experts, and of gradients twice the buffer but for a part of it, as a ring all-reduce does."""

    def ring(members):
        return 2 * (members - 1) / members

    return Traffic(
        handed.exchange * (size - 1) / size,
        handed.shared * ring(ranks),
        handed.experts * ring(ranks // size),
    )


# --------------------------------------------------------------------------------------
# in memory


@dataclass(frozen=True)
class State:
    """Bytes of a rank that stay from update to update, with Adam.

    Attributes:
        parameters, gradients: in the model's precision.
        copies: both once more in full precision, where the model's is half.
        moments: the two of Adam, in full precision.
        buckets: in which pytorch_ddp, the default, copies gradients to add them up.
    """

    parameters: int
    gradients: int
    copies: int
    moments: int
    buckets: int

    @property
    def total(self):
        return self.parameters + self.gradients + self.copies + self.moments + self.buckets


def state_bytes(sizes, ranks, size, number_bytes):
    """:class:`State` of a rank; see :func:`handed_bytes` for the arguments."""
    params = sizes.shared_params + sizes.expert_params // size
    in_buckets = sizes.shared_params if size > 1 else params  # or else experts are as all others
    return State(
        parameters=params * number_bytes,
        gradients=params * number_bytes,
        copies=0 if number_bytes == FULL else 2 * params * FULL,
        moments=2 * params * FULL,
        buckets=in_buckets * number_bytes if ranks > 1 else 0,
    )


def activation_bytes(block, visits, sent, received, number_bytes):
    """What a rank keeps of a block for backward, in a batch with padding and without dropout, whose
    masks are one byte a number; expert by expert, as ranks that share them compute.

    Args:
        visits: tokens at each gate.
        sent, received: rows at each gate.
        number_bytes: of a number of the model's precision.
    """
    dim, ffn = block.embed_dim, block.ffn_dim
    # a token's input and output of the pass, and what the gate takes, in full precision
    tokens = sum(visits) * dim * (2 * number_bytes + FULL)
    # a row's input and hidden units are with its expert; its output is back, and once more weighted
    return tokens + (sum(received) * (dim + ffn) + sum(sent) * 2 * dim) * number_bytes


def expected_activation_bytes(sizes, size, tokens, number_bytes, recomputed=False):
    """What the rank with the most rows keeps of all blocks, under uniform gates; with
    --checkpoint-activations the blocks' input, and one block at a time."""

    def of(block, rank):
        visits, rows = block.expected_visits(tokens), block.expected_rows(tokens)
        received = block.expected_received(tokens, size, rank)
        return activation_bytes(block, visits, rows, received, number_bytes)

    by_rank = [[of(block, rank) for block in sizes.blocks] for rank in range(size)]
    if not recomputed:
        return max(map(sum, by_rank))
    inputs = sum(tokens * block.embed_dim * number_bytes for block in sizes.blocks)
    return inputs + max(max(blocks, default=0) for blocks in by_rank)
