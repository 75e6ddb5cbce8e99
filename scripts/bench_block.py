"""How close the stratified block comes to dense arithmetic, and how far it is from one-hot dispatch.

Measures forward + backward of one block in training, in one process, the contestants taking turns:

* block: ``SMoEBlock`` as it is;
* dense: a dense FFN sublayer over as many rows as the block's experts process, i.e. the same FLOPs;
* one-hot: the same block with GShard's dispatch, which multiplies with (tokens x experts x
  capacity) tensors.

Prints medians of ratios: efficiency = time of dense / time of block, speed-up = time of one-hot /
time of block; and the peak memory of block and one-hot, each in a process of its own. Example:

    python scripts/bench_block.py --threads 2 --json results/bench_block/results.json
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fairseq_smoe.routing import (  # noqa: E402
    balance_loss,
    choose_experts,
    combine_weights,
    expert_capacity,
    gate_logits,
)
from fairseq_smoe.dispatch import plan_dispatch  # noqa: E402
from fairseq_smoe.smoe_block import GateRecord, SMoEBlock  # noqa: E402
from fairseq_smoe.strata import parse_strata  # noqa: E402


class OneHotBlock(SMoEBlock):
    """The same block, dispatching by one-hot einsums as in GShard (Lepikhin et al. 2021)."""

    def _visit(self, normed_TD, i, expert_weights):
        visible = self.visible[i]
        logits_TE = gate_logits(normed_TD, self.gates[i].weight)
        scores_TE = logits_TE.softmax(dim=1)
        experts_KT = choose_experts(logits_TE, self.top_k)
        capacity = expert_capacity(len(normed_TD), len(visible), self.capacity_factor)
        plan = plan_dispatch(experts_KT, len(visible), capacity)
        weights_KT = combine_weights(scores_TE, experts_KT, plan.kept_KT)

        combine_TEC = 0
        taken_E = torch.zeros(len(visible), dtype=torch.long)
        for k in range(len(experts_KT)):
            chosen_TE = F.one_hot(experts_KT[k], len(visible))
            place_T = ((chosen_TE.cumsum(0) - 1 + taken_E) * chosen_TE).sum(1)
            taken_E = taken_E + chosen_TE.sum(0)
            place_TC = F.one_hot(place_T.clamp(max=capacity - 1), capacity).to(scores_TE)
            weight_TE = weights_KT[k].unsqueeze(1) * chosen_TE
            combine_TEC = combine_TEC + torch.einsum("te,tc->tec", weight_TE, place_TC)
        rows_ECD = torch.einsum("tec,td->ecd", combine_TEC.bool().to(normed_TD), normed_TD)
        outputs = [
            torch.addmm(b2, torch.relu(torch.addmm(b1, rows, w1)), w2)
            for rows, (w1, b1, w2, b2) in zip(rows_ECD, expert_weights[visible.start :])
        ]
        y_TD = torch.einsum("tec,ecd->td", combine_TEC, torch.stack(outputs))
        record = GateRecord(scores_TE.detach(), experts_KT, plan.kept_KT)
        return y_TD, record, balance_loss(scores_TE, experts_KT[0])


class DenseFFN(nn.Module):
    """x + FFN(LN(x))"""

    def __init__(self, embed_dim, ffn_dim):
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.fc1 = nn.Linear(embed_dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, embed_dim)

    def forward(self, x):
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


def make_block(kind, args, strata):
    torch.manual_seed(args.seed)
    return kind(args.embed_dim, args.ffn_dim, parse_strata(strata)).train()


def step(module, x):
    """Forward and backward as in training; returns what the module returned."""
    module.zero_grad(set_to_none=True)
    out = module(x)
    y, loss = (out[0], out[1].balance_loss) if isinstance(out, tuple) else (out, 0)
    (y.square().mean() + 0.01 * loss).backward()
    return out


def seconds(module, x):
    start = time.perf_counter()
    step(module, x)
    return time.perf_counter() - start


def expert_rows(stats):
    """Token-expert pairs that were computed."""
    return sum(
        len(gate.experts_KT.reshape(-1)) if gate.kept_KT is None else int(gate.kept_KT.sum())
        for gate in stats.gates
    )


def measure(args, strata, tokens, progress):
    """Ratios of one layout at one number of tokens: a dict for the report."""
    block, one_hot = (make_block(kind, args, strata) for kind in (SMoEBlock, OneHotBlock))
    x = torch.randn(tokens, args.embed_dim, requires_grad=True)
    y, stats = step(block, x)
    torch.testing.assert_close(step(one_hot, x)[0], y, rtol=1e-3, atol=1e-4)
    rows = expert_rows(stats)
    dense = DenseFFN(args.embed_dim, args.ffn_dim)
    dense_x = torch.randn(rows, args.embed_dim, requires_grad=True)
    seconds(dense, dense_x)

    efficiency, speed_up = [], []
    # one-hot dispatch takes a minute at 13k tokens, and its ratio is far from any threshold
    one_hot_rounds = args.rounds if tokens < 8000 else 1
    for i in range(args.rounds):
        before = seconds(dense, dense_x)
        ours = seconds(block, x)
        after = seconds(dense, dense_x)
        efficiency.append((before + after) / 2 / ours)
        if i < one_hot_rounds:
            speed_up.append(seconds(one_hot, x) / ours)
        progress.update()
    result = {
        "strata": strata,
        "tokens": tokens,
        "rows": rows,
        "mean_passes": round(float(stats.passes.float().mean()), 3),
        "efficiency": round(statistics.median(efficiency), 3),
        "efficiency_quartiles": [round(q, 3) for q in quartiles(efficiency)],
        "speed_up_over_one_hot": round(statistics.median(speed_up), 2),
    }
    ours, theirs = (peak_memory(kind, args, strata, tokens) for kind in ("block", "one-hot"))
    return {**result, "peak_mib": ours, "one_hot_peak_mib": theirs, "memory_ratio": round(ours / theirs, 3)}


def quartiles(values):
    return statistics.quantiles(values, n=4)[::2] if len(values) > 1 else [values[0]] * 2


def peak_memory(kind, args, strata, tokens):
    """MiB that one step adds to the process: activations and gradients. Linux only."""
    command = [sys.executable, __file__, "--memory-of", kind, "--strata", strata]
    command += ["--tokens", str(tokens), "--threads", str(args.threads)]
    command += ["--embed-dim", str(args.embed_dim), "--ffn-dim", str(args.ffn_dim)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_memory(args):
    kind = {"block": SMoEBlock, "one-hot": OneHotBlock}[args.memory_of]
    block = make_block(kind, args, args.strata[0])
    step(block, torch.randn(16, args.embed_dim))  # loads the libraries
    block.zero_grad(set_to_none=True)
    x = torch.randn(args.tokens[0], args.embed_dim, requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (VmHWM) to what is in use now
    before = memory_kib("VmRSS")
    step(block, x)
    print((memory_kib("VmHWM") - before) // 1024)


def memory_kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def as_markdown(results):
    head = (
        "| strata | tokens | mean passes | efficiency (quartiles) | one-hot takes "
        "| peak MiB | one-hot peak MiB | ratio |\n|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    rows = [
        f"| {r['strata']} | {r['tokens']} | {r['mean_passes']} "
        f"| {r['efficiency']:.2f} ({r['efficiency_quartiles'][0]:.2f}-{r['efficiency_quartiles'][1]:.2f}) "
        f"| {r['speed_up_over_one_hot']:.1f}x | {r['peak_mib']} | {r['one_hot_peak_mib']} "
        f"| {r['memory_ratio']:.2f} |"
        for r in results
    ]
    return "\n".join([head, *rows])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--strata", nargs="+", default=["2-2-2-2", "4-12"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 13000])
    parser.add_argument("--embed-dim", type=int, default=512)
    parser.add_argument("--ffn-dim", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9, help="turns per contestant")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    parser.add_argument("--memory-of", choices=["block", "one-hot"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        return print_memory(args)
    cases = [(s, t) for s in args.strata for t in args.tokens]
    with tqdm(total=len(cases) * args.rounds, desc="rounds") as progress:
        results = [measure(args, *case, progress) for case in cases]
    print(as_markdown(results))
    if args.json:
        report = {
            "machine": platform.processor() or platform.machine(),
            "threads": args.threads,
            "torch": torch.__version__,
            "embed_dim": args.embed_dim,
            "ffn_dim": args.ffn_dim,
            "results": results,
        }
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
