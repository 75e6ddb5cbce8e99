"""The loss in chunks (--chunked-loss) and the fused Adam, each compared with fairseq's.

Forward and backward of output layer and loss, and a step of the optimizer for the parameters of the
dense model. Both sides take turns in one process. Peak memory is measured in a process of its own,
and is what the loss takes in addition to features and weight. Example:

    python scripts/bench_loss.py --chunks 128 256 512
"""

import argparse
import subprocess
import sys

import torch
from benchmarking import add_common_options, in_turns, publish, quartiles, told
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from fairseq.optim.adam import Adam
from fairseq.utils import log_softmax
from process_memory import added_by

from fairseq_smoe.training.fused_adam import FusedAdam
from fairseq_smoe.translation.chunked_loss import label_smoothed_loss
from fairseq_smoe.translation.memory import keep_freed_memory

SMOOTHING = 0.1


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser, rounds=5)
    add = parser.add_argument
    add("--tokens", type=int, default=4096, help="(default: %(default)s)")
    add("--vocabulary", type=int, default=32000, help="(default: %(default)s)")
    add("--width", type=int, default=512, help="(default: %(default)s)")
    add("--chunks", type=int, nargs="+", default=[128, 256, 512, 1024], help="tokens of a chunk")
    # for the processes that are started to measure memory
    add("--memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    if device == "cpu":
        keep_freed_memory()  # as a training does
    if args.memory_of is not None:
        print_memory(args, device)
        return
    stock, results = loss_step(args, 0, device), []
    for chunk in args.chunks:
        ratios = in_turns(loss_step(args, chunk, device), stock, args.rounds)
        results.append({"what": f"loss, chunks of {chunk}", **times(ratios)})
        results[-1]["peak_mib"] = [peak_memory(args, c) for c in (chunk, 0)]
    ratios = in_turns(
        adam_step(FusedAdam, args, device), adam_step(Adam, args, device), args.rounds
    )
    results.append({"what": "step of fused_adam", **times(ratios)})
    publish(as_markdown(results, args), args, {"results": results}, None)


def times(ratios):
    low, median, high = quartiles(ratios)
    return {"time": median, "quartiles": [low, high]}


def as_markdown(results, args):
    title = f"{args.tokens} tokens, vocabulary {args.vocabulary}, d {args.width}"
    lines = [
        f"| {title} | time relative to fairseq's (quartiles) | peak MiB | fairseq's |",
        "|---|---:|---:|---:|",
    ]
    for r in results:
        memory = " | ".join(map(str, r.get("peak_mib", ["", ""])))
        lines.append(f"| {r['what']} | {told(r['time'], *r['quartiles'])} | {memory} |")
    return "\n".join(lines)


def loss_step(args, chunk, device):
    """A function that computes the loss and its gradients; fairseq's for a ``chunk`` of 0."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = (args.vocabulary, args.width)
    features = torch.randn(args.tokens, args.width, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(size, device=device) / args.width**0.5).to(dtype).requires_grad_()
    target = torch.randint(4, args.vocabulary, (args.tokens,), device=device)

    def step(tokens=None):
        rows, goal = features[:tokens], target[:tokens]
        features.grad = weight.grad = None
        if chunk:
            loss, *_ = label_smoothed_loss(rows, weight, goal, SMOOTHING, chunk)
        else:
            log_p = log_softmax(rows @ weight.T, dim=-1)
            loss, _ = label_smoothed_nll_loss(log_p, goal, SMOOTHING, ignore_index=1)
        loss.backward()

    return step


def adam_step(kind, args, device):
    layers = 18 * 4 * [(args.width, args.width)] + 12 * 2 * [(4 * args.width, args.width)]
    shapes = [(args.vocabulary, args.width), *layers, *(len(layers) * [(args.width,)])]
    parameters = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return kind(parameters, lr=1e-3, betas=(0.9, 0.98)).step


def peak_memory(args, chunk):
    command = [sys.executable, __file__, f"--memory-of={chunk}"]
    for name in ("tokens", "vocabulary", "width", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--cpu"] * args.cpu
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


def print_memory(args, device):
    step = loss_step(args, args.memory_of, device)
    step(tokens=8)  # loads the libraries
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        print((torch.cuda.max_memory_allocated() - before) >> 20)
        return
    print(added_by(step))


if __name__ == "__main__":
    main()
