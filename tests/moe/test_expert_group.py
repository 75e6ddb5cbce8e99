"""Blocks whose experts are shared by ranks, against one that holds all of them."""

import copy
import itertools
import re

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from fairseq_smoe.moe.arrangements.stacking import StackedMoEBlock
from fairseq_smoe.moe.block import SMoEBlock
from fairseq_smoe.moe.expert_group import default_group_size, form_expert_group

DIM, FFN = 8, 16
TOKENS = (7, 1, 0, 12)  # of each rank: one of them has none
LAYOUTS = ((4, 4), (2, 2, 2, 2), (8,))


def make_block(group, kind=SMoEBlock, strata=(4, 4), dtype=torch.float64, **options):
    torch.manual_seed(5)
    block = kind(DIM, FFN, strata, expert_group=group, **options)
    return block.to(dtype).train()


def tokens_of(rank, dtype):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(1, TOKENS[rank], DIM, generator=generator, dtype=dtype)
    padding = torch.zeros(1, TOKENS[rank], dtype=torch.bool)
    padding[:, -2:] = rank == 3  # of uneven length, as batches are
    if rank == 1:
        padding[:] = True  # nothing but padding
    return x.requires_grad_(), padding


def loss_of(block, x, padding):
    y, stats = block(x, padding)
    weights = torch.linspace(-1, 1, DIM, dtype=y.dtype)
    return y, (y * weights).tanh().sum() + stats.balance_loss


def is_shared(name):
    return re.search(r"experts\.[^.]+$", name) is None


def compare(rank, size, **options):
    """Outputs and all gradients of this rank, and the reference of all ranks, computed here."""
    tolerance = dict(rtol=0, atol=1e-4 if options.get("dtype") == torch.float32 else 1e-10)
    dtype = options.get("dtype", torch.float64)
    group = form_expert_group(size)
    block, whole = make_block(group, **options), make_block(None, **options)
    x, padding = tokens_of(rank, dtype)
    y, loss = loss_of(block, x, padding)
    loss.backward()
    for other in range(dist.get_world_size()):
        their_x, their_padding = tokens_of(other, dtype)
        their_y, their_loss = loss_of(whole, their_x, their_padding)
        their_loss.backward()
        if other == rank:
            torch.testing.assert_close(y, their_y, **tolerance)
            torch.testing.assert_close(x.grad, their_x.grad, **tolerance)

    experts = {n: p for n, p in block.named_parameters() if not is_shared(n)}
    assert all(hasattr(p, "expert") == (size > 1) for p in experts.values())
    if group is not None:
        group.average_gradients(p for p in experts.values() if p.requires_grad)
    expected = dict(whole.named_parameters())
    for name, parameter in block.named_parameters():
        if not parameter.requires_grad:
            continue
        reference, gradient = expected[name].grad / dist.get_world_size(), parameter.grad
        if group is not None and not is_shared(name):
            reference = group.share(reference)
        else:  # as data parallel training does
            gradient = torch.zeros_like(parameter) if gradient is None else gradient.clone()
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        torch.testing.assert_close(gradient, reference, msg=f"{name} {size} {options}", **tolerance)
    if group is not None:
        check_norm(block, whole, group, **tolerance)


def check_norm(block, whole, group, **tolerance):
    trained = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    named = [(n, p.grad / dist.get_world_size()) for n, p in trained.items()]
    shared = torch.stack([g.norm() for n, g in named if is_shared(n)]).norm()
    everything = torch.stack([g.norm() for _, g in named]).norm()
    own = [p.grad for n, p in block.named_parameters() if not is_shared(n) and p.requires_grad]
    norm = group.norm_with_experts(shared, own)
    torch.testing.assert_close(norm, everything, rtol=1e-5, atol=0)


def compare_all(rank, world_size):
    sizes = [size for size in (1, 2, 4) if world_size % size == 0]
    for size, strata in itertools.product(sizes, LAYOUTS):
        compare(rank, size, strata=strata)
    for size in sizes[1:]:
        # each rank's tokens have the capacity that they have alone
        compare(rank, size, capacity_factor=0.5)
        compare(rank, size, capacity_factor=None, top_k=1, strata=(8,))
        compare(rank, size, norm="released", strata=(4, 2, 2), pass_scale=(1, 0, 0.5))
        compare(rank, size, kind=StackedMoEBlock)
        compare(rank, size, dtype=torch.float32, expert_backend="grouped_mm", strata=(2, 2, 2, 2))


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_that_share_experts_compute_what_one_computes(world_size):
    run_ranks(compare_all, world_size, world_size)


def check_gathered(rank, **options):
    """Ranks that do not keep step compute alone, and afterwards together again."""
    group = form_expert_group(2)
    block, whole = make_block(group, **options).eval(), make_block(None, **options).eval()
    x, padding = tokens_of(rank, torch.float64)
    with torch.no_grad():
        block.experts.gather()
        if rank == 0:  # nobody answers an exchange
            torch.testing.assert_close(block(x, padding)[0], whole(x, padding)[0])
        block.experts.release()
        torch.testing.assert_close(block(x, padding)[0], whole(x, padding)[0])
    copy.deepcopy(block)  # as for a moving average


def test_gathered_experts_compute_alone():
    run_ranks(check_gathered, 2)


def check_checkpointed(rank):
    """Activations that are computed again exchange rows in the same order on all ranks."""
    from torch.utils.checkpoint import checkpoint

    group = form_expert_group(2)
    x, padding = tokens_of(rank * 3, torch.float64)
    gradients = []
    for again in (False, True):
        block = make_block(group)
        run = checkpoint if again else lambda f, *args, use_reentrant: f(*args)
        loss = run(lambda x: loss_of(block, x, padding)[1], x, use_reentrant=False)
        loss.backward()
        gradients.append([p.grad for p in block.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointed_activations_exchange_again():
    run_ranks(check_checkpointed, 2)


@pytest.mark.parametrize(
    "processes, strata, size",
    [(2, (8,), 2), (32, (16,), 16), (6, (4, 4), 2), (3, (8,), 1), (1, (8,), 1), (8, (4, 12), 4)],
)
def test_default_size_is_the_greatest_that_divides_all(processes, strata, size):
    assert default_group_size(processes, strata) == size
