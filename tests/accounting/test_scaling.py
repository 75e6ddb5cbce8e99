"""Bytes by formula, by hand, and as counted in a training of four ranks."""

import json
import math
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import starmap
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import toy_task
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_smoe.__main__ import main
from fairseq_smoe.accounting import scaling
from fairseq_smoe.accounting.scaling import Block, Sizes, Traffic
from fairseq_smoe.moe.arrangements.multi_head import MultiHeadBlock
from fairseq_smoe.moe.arrangements.stacking import StackedMoEBlock
from fairseq_smoe.moe.block import SMoEBlock
from fairseq_smoe.moe.strata import visit_probabilities

pytestmark = pytest.mark.xdist_group("scaling")  # one worker makes what all of them need
RANKS = 4
WORDS = 40
SENTENCES = 20  # of a batch


# --------------------------------------------------------------------------------------
# by hand


def block_of(embed_dim, ffn_dim, strata, top_k=2, kind=SMoEBlock):
    with torch.device("meta"):
        return Block.of(kind(embed_dim, ffn_dim, strata, top_k))


# one block, D 10, F 20, two strata of two experts: half of the tokens make a second pass
BLOCK = block_of(10, 20, (2, 2))
SIZES = Sizes((BLOCK,), shared_params=1000)


def test_visits_by_hand():
    assert visit_probabilities((2, 2)) == [1, 0.5]
    # a quarter goes from gate 1 to gate 2, a quarter to 3; of the former a third to 3
    third = 1 / 4 + 1 / 4 * 1 / 3
    assert visit_probabilities((2, 2, 2, 2)) == pytest.approx([1, 1 / 4, third, 1 / 2])


def test_rows():
    assert BLOCK.expected_rows(100) == [200, 100]
    assert block_of(10, 20, (2, 2), top_k=1).expected_rows(100) == [100, 50]
    assert block_of(10, 20, (2, 2), kind=StackedMoEBlock).expected_rows(100) == [200, 200]
    # each row a fourth as wide
    assert replace(BLOCK, heads=4).expected_rows(100) == [800, 400]
    # a gate that sees one expert gives one choice
    assert block_of(10, 20, (3, 1)).expected_rows(100) == [200, 75]


def test_received_rows():
    """Of four ranks, two hold an expert of the second stratum, and get all of its rows."""
    assert BLOCK.expected_received(100, 2, 0) == BLOCK.expected_received(100, 2, 1) == [200, 100]
    by_rank = [BLOCK.expected_received(100, 4, rank) for rank in range(4)]
    assert by_rank == [[200, 0], [200, 0], [200, 200], [200, 200]]
    assert BLOCK.slowdown(1) == BLOCK.slowdown(2) == 1
    assert BLOCK.slowdown(4) == pytest.approx(400 / 300)


def test_exchange():
    # (3 + 1 sent, 2 + 4 received) rows of 10 numbers of 4 bytes, forward and backward
    rows = 2 * 10 * 10 * 4
    numbers = (4 + 2) * 8
    assert scaling.exchange_bytes(BLOCK, [3, 1], [2, 4], 4) == rows + numbers
    again = scaling.exchange_bytes(BLOCK, [3, 1], [2, 4], 4, recomputed=True)
    assert again == rows * 3 / 2 + numbers * 2


def test_traffic_of_an_update():
    experts = 4 * (2 * 10 * 20 + 20 + 10)
    assert BLOCK.expert_params == SIZES.expert_params == experts
    exchange = 2 * 600 * 10 * 2 + 6 * 8
    handed = scaling.handed_bytes(SIZES, 4, 2, 100, 2)
    assert handed == Traffic(exchange, 2000, experts / 2 * 2)
    assert scaling.sent_bytes(handed, 4, 2) == Traffic(exchange / 2, 3000, experts / 2 * 2)
    twice = scaling.handed_bytes(SIZES, 4, 2, 100, 2, steps=2)
    assert twice == Traffic(2 * exchange, 2000, experts / 2 * 2)
    # all experts on every rank, one replica of each, one rank
    assert scaling.handed_bytes(SIZES, 4, 1, 100, 2) == Traffic(0, 2000, experts * 2)
    assert scaling.handed_bytes(SIZES, 4, 4, 100, 2) == Traffic(exchange, 2000, 0)
    assert scaling.handed_bytes(SIZES, 1, 1, 100, 2) == Traffic(0, 0, 0)


def test_break_even():
    """Spread experts send as much as replicas at E * F / (passes * k) tokens of a rank and update,
    for any number of ranks and of those that share them (docs/scaling.md)."""
    block = block_of(1024, 4096, (4, 12))
    sizes, tokens = Sizes((block,), 10**6), 16 * 4096 / (1.25 * 2)

    def total(ranks, size):
        handed = scaling.handed_bytes(sizes, ranks, size, tokens, 2)
        return scaling.sent_bytes(handed, ranks, size).total

    for ranks, size in ((8, 8), (32, 4), (32, 16), (256, 16)):
        assert total(ranks, size) == pytest.approx(total(ranks, 1), rel=1e-3)


def test_state():
    params = 1000 + 1720 // 2
    full = scaling.state_bytes(SIZES, 4, 2, 4)
    assert full.total == params * (4 + 4 + 8) + 1000 * 4
    half = scaling.state_bytes(SIZES, 4, 2, 2)
    assert half.total == params * (2 + 2 + 8 + 8) + 1000 * 2
    assert scaling.state_bytes(SIZES, 4, 1, 2).total == 2720 * (20 + 2)
    assert scaling.state_bytes(SIZES, 1, 1, 2).total == 2720 * 20


def test_activations():
    """The busiest of four ranks gets 200 rows at both gates, and each sends 300."""
    tokens, rows = 150 * 10 * (3 * 4), (400 * (10 + 20) + 300 * 2 * 10) * 4
    assert scaling.expected_activation_bytes(SIZES, 4, 100, 4) == tokens + rows
    kept = scaling.expected_activation_bytes(SIZES, 4, 100, 4, recomputed=True)
    assert kept == tokens + rows + 100 * 10 * 4
    # of 20 numbers a token, which is also kept three times around the block
    heads = Sizes((replace(BLOCK, heads=2),), 1000)
    own, more = 2 * (tokens + rows), 3 * 100 * 20 * 4
    assert scaling.expected_activation_bytes(heads, 4, 100, 4) == own + more
    kept = scaling.expected_activation_bytes(heads, 4, 100, 4, recomputed=True)
    assert kept == own + more + 100 * 20 * 4
    dense = Sizes((), 1000)
    assert scaling.expected_activation_bytes(dense, 1, 100, 4, recomputed=True) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(
    "strata, top_k, scale",
    [((4, 4), 2, None), ((8,), 1, None), ((2, 2, 2, 2), 2, None), ((2, 2, 2, 2), 2, (1, 0, 0, 0))],
)
def test_activations_are_those_that_autograd_keeps(strata, top_k, scale, heads, dtype):
    torch.manual_seed(1)
    routed = SMoEBlock(256, 512, strata, top_k, expert_backend="loop", pass_scale=scale)
    block = routed if heads == 1 else MultiHeadBlock(routed, 256 * heads, heads)
    block = block.to(dtype).train()
    x = torch.randn(500, 256 * heads, dtype=dtype, requires_grad=True)
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y, stats = block(x, torch.arange(500) >= 490)
    for parameter in block.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    visits = [gate.num_tokens for gate in stats.gates]
    rows = [int(gate.kept_C.sum()) for gate in stats.gates]
    layout = Block.of(routed, heads)
    formula = scaling.activation_bytes(layout, visits, rows, rows, dtype.itemsize)
    # what a gate keeps besides, probabilities and indices, is small beside D numbers
    assert formula < sum(kept.values()) < 1.03 * formula


# --------------------------------------------------------------------------------------
# the command


def table(capsys, *words):
    """The cells of the command's table, without its head."""
    main(["scaling", *words])
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_table(capsys):
    words = ("m15", "dense", "smoe-4-4-4-4", "--ranks", "8", "32")
    dense, dense_on_32, spread, spread_on_32 = table(capsys, *words)
    assert dense[:4] == ["Dense", "8", "", "0"] and dense_on_32[1] == "32"
    assert spread[:4] == ["SMoE-4-4-4-4", "8", "4", "4"]
    assert spread_on_32[:4] == ["SMoE-4-4-4-4", "32", "4", "4"]
    # in each of 6 blocks a token makes 2.083 passes of 2 rows of 1024 numbers of 2 bytes, which go
    # there and back in forward and backward
    assert spread[4] == f"{6 * 2.083 * 2 * 1024 * 2 * 2 * 2 / 1e3:.0f}"
    # all of 4096 tokens' but what a rank sends to itself
    assert float(spread[5]) == pytest.approx(4096 * float(spread[4]) / 1e3 * 3 / 4, rel=0.01)


def test_table_of_all_rows(capsys):
    rows = table(capsys, "m4", "--ranks", "2", "--expert-parallel-size", "1")
    assert len(rows) == 9 and all(row[2] in ("", "1") and row[4] == "0" for row in rows)


@pytest.mark.parametrize(
    "words, named",
    [
        (["--ranks", "0"], ["--ranks 0", "1 or more"]),
        (["--tokens-per-rank", "-1"], ["--tokens-per-rank -1", "1 or more"]),
        (["--update-freq", "0"], ["--update-freq 0", "1 or more"]),
        (["--expert-parallel-size", "3"], ["--expert-parallel-size 3", "8 ranks", "1, 2, 4, 8"]),
        (["--expert-parallel-size", "0"], ["--expert-parallel-size 0", "1, 2, 4, 8"]),
    ],
)
def test_wrong_options_are_named(words, named):
    with pytest.raises(SystemExit) as error:
        main(["scaling", "m15", "smoe-4-12", *words])
    assert "\n" not in str(error.value) and str(error.value).startswith("error: ")
    for text in named:
        assert text in str(error.value)


@pytest.mark.parametrize("words, named", [(["m3"], "m15"), (["m15", "smoe-1"], "smoe-4-12")])
def test_wrong_names_are_answered_with_right_ones(words, named):
    with pytest.raises(SystemExit, match=named):
        main(["scaling", *words])


# --------------------------------------------------------------------------------------
# as counted: what fairseq's trainer of each of four ranks gives to torch in an update


@dataclass(frozen=True)
class Case:
    """An update of a model: ranks that share experts, options, batches until the update."""

    size: int
    model: str
    options: dict = field(default_factory=dict)
    num_steps: int = 1


CASES = {
    "strata": Case(4, "--smoe-strata 2-2-2-2"),
    "last gate sees one, recomputed": Case(
        4, "--smoe-strata 5-2-1", {"checkpoint_activations": True}
    ),
    "stacking, replicas, two steps": Case(2, "--smoe-strata 4-4 --smoe-stacking", num_steps=2),
    "switch beside dense, half precision": Case(
        2,
        "--smoe-strata 8 --moe-top1-expert --moe-cmr",
        {"fp16": True, "ddp_backend": "legacy_ddp"},
    ),
    "heads": Case(2, "--smoe-strata 4-4 --moe-heads 4"),
    "not spread": Case(1, "--smoe-strata 4-4"),
    "uniform gates": Case(4, "--smoe-strata 2-2-2-2", {"moe_capacity_factor": 0}),
}


def make_batch(rank, number, task):
    """Sentences of random words, of uneven length; each rank's and each step's are others."""
    return toy_task.random_batch(100 * number + rank, task, WORDS, SENTENCES, range(5, 20))


class Counting(TorchDispatchMode):
    """Counts the bytes of all that is given to torch's collectives, by what they are: below Python,
    so that those of autograd and of DistributedDataParallel are seen as well."""

    def __init__(self, group):
        super().__init__()
        self.group = group
        self.bytes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name == "c10d::alltoall_base_":
            self.add_exchanged(args[1])
        elif name == "_c10d_functional::all_to_all_single":
            self.add_exchanged(args[0])
        elif name == "c10d::allreduce_":
            among = dist.ProcessGroup.unbox(args[1]).group_name
            for tensor in args[0]:
                self.add_reduced(tensor, among)
        return function(*args, **(kwargs or {}))

    def add_exchanged(self, sent):
        self.bytes["rows" if sent.is_floating_point() else "numbers"] += sent.nbytes

    def add_reduced(self, tensor, among):
        kind = "shared"
        if tensor.dtype == torch.float64:  # what fairseq logs
            kind = "log"
        elif self.group is not None and among == self.group.ranks.group_name:
            kind = "norm"
        elif self.group is not None and among == self.group.replicas.group_name:
            kind = "experts"
        self.bytes[kind] += tensor.nbytes


@contextmanager
def recording():
    """What the expert blocks have done, block by block and step by step: tokens of each gate, and
    rows for each expert that it sees."""
    from fairseq_smoe.translation import criterion

    records = []

    def take(model, stock=criterion.take_routing_stats):
        taken = stock(model)
        for stats in taken.values():
            gates = []
            for gate in stats.gates:
                sent = gate.expert_C
                if gate.kept_C is not None:
                    sent = sent[gate.kept_C]
                rows_E = sent.bincount(minlength=gate.scores_TE.shape[1])
                gates.append((len(gate.scores_TE), rows_E.tolist()))
            records.append(gates)
        return taken

    with mock.patch.object(criterion, "take_routing_stats", take):
        yield records


def uniform_gates(rank):
    """Logits that are noise, each rank's other."""
    generator = torch.Generator().manual_seed(rank)

    def logits(tokens_TD, weight_ED, bias_E):
        noise_TE = torch.randn(len(tokens_TD), len(weight_ED), generator=generator)
        return noise_TE + 0 * weight_ED.sum()

    return mock.patch("fairseq_smoe.moe.gate.gate_logits", logits)


def state_in_use(trainer):
    """Bytes of what :class:`~fairseq_smoe.accounting.scaling.State` has, after an update, but for buckets."""
    params = list(trainer._model.parameters())
    copies = getattr(trainer.optimizer, "fp32_params", [])
    moments = [
        value
        for entry in trainer.optimizer.optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    ]
    return {
        "parameters": sum(p.nbytes for p in params),
        "gradients": sum(p.grad.nbytes for p in params),
        "copies": sum(p.nbytes + p.grad.nbytes for p in copies),
        "moments": sum(value.nbytes for value in moments),
    }


def train_update(rank, data, case):
    """One update: what was counted, what the blocks did, what is in memory."""
    from fairseq_smoe.training.trainer import SMoETrainer

    cfg, task, model, criterion = toy_task.set_up(
        data,
        *CASES[case].model.split(),
        distributed_world_size=RANKS,
        moe_expert_parallel_size=CASES[case].size,
        **CASES[case].options,
    )
    trainer = SMoETrainer(cfg, task, model, criterion)
    batches = [make_batch(rank, number, task) for number in range(CASES[case].num_steps)]
    gates = uniform_gates(rank) if case == "uniform gates" else nullcontext()
    with Counting(trainer.expert_group) as counting, recording() as records, gates:
        trainer.train_step(batches)
    return {
        "sizes": asdict(scaling.measure(model)),
        "counted": counting.bytes,
        "blocks": records,
        "state": state_in_use(trainer),
    }


def train_all_cases(rank, data, results):
    found = {case: train_update(rank, data, case) for case in CASES}
    (results / f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """``measured(case)``: what each rank has found, and the model's :class:`Sizes`."""
    folder = tmp_path_factory.mktemp("scaling")
    toy_task.write_dictionaries(folder / "data", toy_task.LANGS, WORDS)
    run_ranks(train_all_cases, RANKS, folder / "data", folder)
    by_rank = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]

    def measured(case):
        sizes = by_rank[0][case]["sizes"]
        blocks = [Block(**block) for block in sizes["blocks"]]
        return [found[case] for found in by_rank], Sizes(tuple(blocks), sizes["shared_params"])

    return measured


def exchange_of(rank, size, sizes, found, number_bytes, recomputed):
    """By the formula, for the rows that the ranks' tokens made."""
    group = range(rank // size * size, (rank // size + 1) * size)
    exchange = 0
    for i, gates in enumerate(found[rank]["blocks"]):
        block = sizes.blocks[i % len(sizes.blocks)]
        received = [
            sum(
                rows
                for other in group
                for e, rows in zip(seen, found[other]["blocks"][i][number][1])
                if e % size == rank % size
            )
            for number, seen in enumerate(starmap(range, block.visible))
        ]
        sent = [sum(rows_E) for _, rows_E in gates]
        exchange += scaling.exchange_bytes(block, sent, received, number_bytes, recomputed)
    return exchange


@pytest.mark.parametrize("case", CASES)
def test_counted_bytes_are_those_of_the_formulas(case, measured):
    size, options = CASES[case].size, CASES[case].options
    number_bytes = 2 if "fp16" in options else 4
    recomputed = "checkpoint_activations" in options
    found, sizes = measured(case)
    total = Counter()
    for rank, own in enumerate(found):
        counted = Counter(own["counted"])
        handed = scaling.handed_bytes(sizes, RANKS, size, 1, number_bytes)
        state = asdict(scaling.state_bytes(sizes, RANKS, size, number_bytes))
        exchange = 0
        if size > 1:
            exchange = exchange_of(rank, size, sizes, found, number_bytes, recomputed)
        assert len(own["blocks"]) == CASES[case].num_steps * len(sizes.blocks)
        assert counted["rows"] + counted["numbers"] == exchange
        shared, experts = handed.shared, handed.experts
        if size == 1:  # the experts' are among all others
            shared, experts = shared + experts, 0
        elif "ddp_backend" in options:  # legacy_ddp always reduces a buffer for all parameters
            shared = own["state"]["gradients"]
        assert (counted["shared"], counted["experts"]) == (shared, experts)
        assert counted["norm"] == (4 if size > 1 else 0)
        assert counted["log"] < 300
        assert own["state"] == {kind: state[kind] for kind in own["state"]}
        total.update(counted, exchange_by_formula=exchange)
        for i, gates in enumerate(own["blocks"]):
            choices = sizes.blocks[i % len(sizes.blocks)].choices
            chosen = sum(tokens * k for (tokens, _), k in zip(gates, choices))
            total.update(rows_chosen=chosen, rows_kept=sum(sum(rows_E) for _, rows_E in gates))
    print(f"{case}, bytes of {RANKS} ranks together: {dict(total)}")


def test_rows_under_uniform_gates_are_those_expected(measured):
    found, sizes = measured("uniform gates")
    tokens = [[gates[0][0] for gates in own["blocks"]] for own in found]
    chances = visit_probabilities(sizes.blocks[0].strata)
    # a token's visits to gates are independent; four standard deviations of the mean of all
    deviation = math.sqrt(sum(p * (1 - p) for p in chances) / sum(map(sum, tokens))) / sum(chances)
    counted, expected = [], []
    for rank, own in enumerate(found):
        counted.append(own["counted"]["rows"] + own["counted"]["numbers"])
        expected.append(0)
        for i, block in enumerate(sizes.blocks):
            mean = sum(of_blocks[i] for of_blocks in tokens) / RANKS
            sent = block.expected_rows(tokens[rank][i])
            received = block.expected_received(mean, RANKS, rank)
            expected[-1] += scaling.exchange_bytes(block, sent, received, 4)
    print(f"exchanged {counted}, expected {list(map(round, expected))}, deviation {deviation:.2%}")
    assert sum(counted) == pytest.approx(sum(expected), rel=4 * deviation)
    # a rank has a fourth of the tokens
    assert counted == pytest.approx(expected, rel=8 * deviation)
