"""Formulas for the traffic between ranks and the memory of a rank under expert parallelism.

W ranks train together. Groups of N ranks share the experts (``--moe-expert-parallel-size``). Expert
e is on rank e mod N of each group, so each expert has W / N replicas. docs/scaling.md derives the
formulas and compares them with the bytes that a training of four ranks gave to torch.
"""

from dataclasses import dataclass

from fairseq_smoe.moe.strata import own_experts

COUNT_BYTES = 8  # bytes of a row count: int64
FULL = 4  # bytes of a number in full precision, which gates and optimizer always use

# --------------------------------------------------------------------------------------
# the model


@dataclass(frozen=True)
class Block:
    """What of an expert block determines its bytes.

    Attributes:
        embed_dim: D.
        hidden_dim: mean number of hidden units of a row.
        strata: experts of each stratum.
        visible: experts that each gate sees, as pairs of the first one and the one after the last.
        visits: tokens at each gate per token that enters the block, under uniform gates.
        choices: rows of a token at each gate, under uniform gates.
        token_hidden: mean number of hidden units of a token at each gate besides those of its rows.
        expert_params: numbers in the parameters of all experts, with the padding of those that are
            smaller than others.
        heads: number of parts of a token of the layer that are tokens here, of D numbers each.
        idle: experts that no token can visit; those of a pool that are not alive.
        scaled: whether the outputs of passes are multiplied by trained numbers.
    """

    embed_dim: int
    hidden_dim: float
    strata: tuple
    visible: tuple
    visits: tuple
    choices: tuple
    token_hidden: tuple
    expert_params: int
    heads: int = 1
    idle: tuple = ()
    scaled: bool = False

    @classmethod
    def of(cls, block, heads=1):
        """Of a :class:`~fairseq_smoe.moe.block.SMoEBlock`."""
        experts, choices = block.experts, tuple(block.expected_choices())
        return cls(
            experts.embed_dim,
            experts.hidden_dim(),
            block.strata,
            tuple((seen.start, seen.stop) for seen in block.visible),
            tuple(block.expected_visits()),
            choices,
            tuple(map(experts.token_hidden_dim, block.visible, choices)),
            experts.num_stored(),
            heads,
            idle=tuple(  # at the start, the first places of a stratum are taken
                e
                for own, alive in zip(own_experts(block.strata), block.num_alive())
                for e in own[alive:]
            ),
            scaled=block.pass_scale is not None,
        )

    def expected_visits(self, tokens):
        """Tokens at each gate, if ``tokens`` enter the layer, under uniform gates; if they are
        split, their heads."""
        return [tokens * self.heads * visits for visits in self.visits]

    def expected_rows(self, tokens):
        """Rows that a rank sends at each gate, under uniform gates. An upper bound: rows whose
        expert is full are not sent."""
        return [visits * k for visits, k in zip(self.expected_visits(tokens), self.choices)]

    def expected_received(self, tokens, size, rank):
        """Rows that a rank of a group of ``size`` receives at each gate: as many as it sends, if it
        holds an even share of the experts that the gate sees."""
        alive = [[e for e in range(*seen) if e not in self.idle] for seen in self.visible]
        return [
            rows * size * sum(e % size == rank for e in experts) / len(experts)
            for rows, experts in zip(self.expected_rows(tokens), alive)
        ]

    def slowdown(self, size):
        """How many times as long the experts take as with evenly spread rows: all ranks wait for
        the busiest one in every pass, so this is its rows over the mean rank's, pass by pass."""
        by_rank = [self.expected_received(1, size, rank) for rank in range(size)]
        return sum(map(max, zip(*by_rank))) / sum(self.expected_rows(1))


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model.

    Attributes:
        blocks: a :class:`Block` for each of its expert layers.
        shared_params: number of parameters that are not experts'.
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
    from fairseq_smoe.translation.layers import expert_layers

    layers = [layer for _, layer in expert_layers(model)]
    here = sum(p.numel() for layer in layers for p in layer.routed_block.experts.stacked())
    blocks = tuple(Block.of(layer.routed_block, layer.heads) for layer in layers)
    return Sizes(blocks, sum(p.numel() for p in model.parameters()) - here)


# --------------------------------------------------------------------------------------
# between ranks


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank communicates per update.

    Attributes:
        exchange: all-to-all of rows to their experts and back, their gradients, and row counts.
        shared: gradients of the parameters that all ranks have.
        experts: gradients of this rank's experts, averaged with their replicas.
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
        number_bytes: bytes of a number in the model's precision.
        recomputed: whether backward repeats the forward pass (--checkpoint-activations).
    """
    forward = 2 if recomputed else 1
    # a row is sent and its output returned; in backward the gradients of both
    rows = (forward + 1) * (sum(sent) + sum(received)) * block.embed_dim * number_bytes
    # row counts have no gradient
    return rows + forward * COUNT_BYTES * sum(stop - start for start, stop in block.visible)


def handed_bytes(sizes, ranks, size, tokens, number_bytes, steps=1, recomputed=False):
    """Bytes that a rank hands to torch's collectives per update on average, under uniform gates.

    Args:
        sizes: :class:`Sizes`
        ranks, size: W and N.
        tokens: tokens of a rank per step in every block, without padding.
        number_bytes: bytes of a number in the precision of model and gradients.
        steps: steps per update (--update-freq).
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
    """Bytes that leave a rank on average, of those handed to torch: the rows for other ranks'
    experts, and for gradients what a ring all-reduce sends, 2 (R - 1) / R of the buffer."""

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
    """Memory of a rank for the model and Adam, in bytes.

    Attributes:
        parameters, gradients: in the model's precision.
        copies: copies of both in full precision, if the model's is half.
        moments: Adam's two moments, in full precision.
        buckets: buffers into which pytorch_ddp, the default, copies gradients to reduce them.
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
    in_buckets = sizes.shared_params if size > 1 else params  # else experts as the others
    return State(
        parameters=params * number_bytes,
        gradients=params * number_bytes,
        copies=0 if number_bytes == FULL else 2 * params * FULL,
        moments=2 * params * FULL,
        buckets=in_buckets * number_bytes if ranks > 1 else 0,
    )


def activation_bytes(block, visits, sent, received, number_bytes):
    """Bytes that a rank keeps of a block for backward, for a batch with padding.

    Dropout masks, one byte per number, are not counted. Nor are tokens that have left the block,
    which the backend "grouped_mm" carries along if experts are not shared.

    Args:
        visits: tokens at each gate.
        sent, received: rows at each gate.
        number_bytes: bytes of a number in the model's precision.
    """
    dim, hidden = block.embed_dim, block.hidden_dim
    # a token's input and output of the pass, and the gate's input in full precision
    tokens = sum(visits) * dim * ((3 if block.scaled else 2) * number_bytes + FULL)
    if block.heads > 1:  # a token before and after the LayerNorm, and before it is merged
        tokens += visits[0] * dim * 3 * number_bytes
    tokens += sum(n * units for n, units in zip(visits, block.token_hidden)) * number_bytes
    # the expert's rank keeps a row's input and hidden units, the sender its output, also weighted
    return tokens + (sum(received) * (dim + hidden) + sum(sent) * 2 * dim) * number_bytes


def expected_activation_bytes(sizes, size, tokens, number_bytes, recomputed=False):
    """Bytes that the rank with the most rows keeps of all blocks, under uniform gates. With
    --checkpoint-activations these are the blocks' inputs, and one block at a time."""

    def of(block, rank):
        visits, rows = block.expected_visits(tokens), block.expected_rows(tokens)
        received = block.expected_received(tokens, size, rank)
        return activation_bytes(block, visits, rows, received, number_bytes)

    by_rank = [[of(block, rank) for block in sizes.blocks] for rank in range(size)]
    if not recomputed:
        return max(map(sum, by_rank))
    inputs = sum(tokens * block.heads * block.embed_dim * number_bytes for block in sizes.blocks)
    return inputs + max(max(blocks, default=0) for blocks in by_rank)
