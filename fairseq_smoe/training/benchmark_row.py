"""Training a row of the paper's tables with fairseq-train."""

import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.benchmarks.cleaning import recorded_cleaning
from fairseq_smoe.benchmarks.runs import RUN_FILE, read_run, run_folder
from fairseq_smoe.benchmarks.training_command import (
    batch_tokens,
    split_batch,
    training_command,
    vocab_size,
)
from fairseq_smoe.errors import OptionError
from fairseq_smoe.files import write_whole
from fairseq_smoe.translation.task_files import LANGS_FILE


@dataclass(frozen=True)
class RowTraining:
    """A training that is ready to start.

    Attributes:
        command: words of the fairseq-train command.
        summary: one line about the size of its batches.
        folder: the run folder.
        facts: content for the run's ``run.json``.
        data: folder of the binarised text.
    """

    command: list
    summary: str
    folder: Path
    facts: dict
    data: Path

    def start(self, dry_run=False):
        """Replace this process with fairseq-train. The plugin has to be registered with fairseq
        already.

        Args:
            dry_run: only print and check the command.

        Raises:
            OptionError: an option or the data is wrong.
        """
        first = os.environ.get("RANK", "0") == "0"
        if first:
            print(shlex.join(self.command), flush=True)
            print(self.summary, file=sys.stderr)
        _check_options(self.command)
        if dry_run:
            return
        _check_data(self.data, self.facts)
        if first:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / RUN_FILE, json.dumps(self.facts, indent=1) + "\n")
        # exec instead of a child process, so that signals reach fairseq
        program = Path(sys.executable).parent / self.command[0]
        program = program if program.exists() else shutil.which(self.command[0])
        sys.stdout.flush()
        os.execv(program, self.command)


def plan_training(args):
    """The :class:`RowTraining` that the arguments of ``python -m fairseq_smoe train`` ask for.

    Raises:
        OptionError: names the option or folder that is wrong.
    """
    benchmark = benchmarks.load(args.benchmark)
    row = benchmark.row(args.row)
    default_data = benchmark.name if args.scale == "paper" else f"{benchmark.name}-{args.scale}"
    data = (args.data or Path("data") / default_data).absolute()
    folder = args.run or run_folder(args.runs, benchmark, row, args.scale, args.seed)
    folder = folder.absolute()
    tokens = args.batch_tokens
    if tokens is None:
        tokens = batch_tokens(benchmark, args.scale)
    more = _checked(args.more)
    on_gpu, processes = _devices(args.cpu, more)
    max_tokens, steps = split_batch(tokens, processes, args.max_tokens, _longest(benchmark, more))
    more = [*more, *_precision(on_gpu, args.fp32, more)]
    command = training_command(
        benchmark, row, args.scale, data, folder, args.seed, max_tokens, steps, more
    )
    facts = {
        "benchmark": benchmarks.reference(args.benchmark),
        "row": row.name,
        "scale": args.scale,
        "seed": args.seed,
        "batch_tokens": tokens,
        "data": str(data),
        "cleaning": recorded_cleaning(data),
        "command": command,
    }
    _check_same_run(folder, facts)
    summary = (
        f"{benchmark.title}, {row.name}, scale {args.scale}: {processes} process(es) x "
        f"{max_tokens} tokens x {steps} step(s) = {processes * max_tokens * steps} target "
        f"tokens an update, padding included (wanted: {tokens}), on "
        f"{'GPUs' if on_gpu else 'the CPU'}"
    )
    return RowTraining(command, summary, folder, facts, data)


def _checked(more):
    """Return ``more``, the options for fairseq-train, if none of them changes the batch size."""
    for word in more:
        option = word.partition("=")[0]
        if option in ("--update-freq", "--batch-size", "--max-sentences"):
            raise OptionError(f"{option}: follows from --batch-tokens and --max-tokens; give these")
    return more


def _check_options(command):
    """Find options that fairseq would refuse, before anything is written.

    Raises:
        OptionError: has fairseq's message.
    """
    from fairseq import options as fairseq_options

    from fairseq_smoe.translation.options import SMoETransformerOptions, check_options

    def refuse(message):
        raise OptionError(f"fairseq-train: {message}")

    parser = fairseq_options.get_training_parser()
    parser.error = refuse
    parsed = fairseq_options.parse_args_and_arch(parser, command[1:])
    check_options(SMoETransformerOptions.from_namespace(parsed))


def _precision(on_gpu, fp32, more):
    """Options for the device. On a GPU this is half precision, unless ``more`` chooses a precision:
    fairseq would mix up the two."""
    if not on_gpu:
        return ["--cpu"]
    others = ("--bf16", "--amp", "--memory-efficient-bf16", "--memory-efficient-fp16")
    return [] if fp32 or any(option in more for option in others) else ["--fp16"]


def _value(words, option, default):
    """The value of an option in the words of a command line; the last one if it is repeated."""
    value = default
    for word, following in zip(words, [*words[1:], None]):
        name, equals, attached = word.partition("=")
        if name == option:
            value = attached if equals else following
    return value


def _number(words, option, default):
    """As :func:`_value`, for an option whose value has to be a positive integer."""
    value = str(_value(words, option, default))
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise OptionError(f"{option} {value}: expected a number from 1")
    return int(value)


def _longest(benchmark, more):
    """Number of tokens of the longest sentence that the training accepts."""
    return max(
        _number(more, option, benchmark.training[option][0])
        for option in ("--max-source-positions", "--max-target-positions")
    )


def _devices(cpu, more):
    """``(whether on GPUs, number of processes)``, as fairseq will determine them."""
    gpus = 0
    if not cpu:
        import torch

        gpus = torch.cuda.device_count()
    if "WORLD_SIZE" in os.environ:  # under torchrun
        return gpus > 0, int(os.environ["WORLD_SIZE"])
    return gpus > 0, _number(more, "--distributed-world-size", max(gpus, 1))


def _check_same_run(folder, facts):
    """Refuse to resume a run folder with another model or batch size."""
    if not folder.is_dir():
        return
    earlier = read_run(folder).facts
    for name in ("benchmark", "row", "scale", "seed", "batch_tokens"):
        if earlier and earlier.get(name) != facts[name]:
            raise OptionError(
                f"{folder}: was trained with {name} {earlier.get(name)}, not {facts[name]}; choose "
                "another folder with --runs or --run"
            )
    if earlier and earlier.get("data", facts["data"]) != facts["data"]:
        print(
            f"warning: {folder}: was trained with --data {earlier['data']}, and continues with "
            f"{facts['data']}",
            file=sys.stderr,
        )


def _check_data(data, facts):
    """Check that the folder has data; warn if its vocabulary does not have the scale's size."""
    benchmark, scale = benchmarks.load(facts["benchmark"]), facts["scale"]
    scaled = "" if scale == "paper" else f" --scale {scale}"
    remedy = f"bash data-prep/{benchmark.name}.sh {data}{scaled}"
    if benchmark.name not in benchmarks.PAPERS:
        remedy = (
            f"python -m fairseq_smoe prepare --benchmark {facts['benchmark']} --from TEXT --to "
            f"{data}{scaled}"
        )
    if not (data / LANGS_FILE).exists():
        raise OptionError(f"--data {data}: holds no prepared text; make it with: {remedy}")
    dictionary = data / f"dict.{benchmark.english}.txt"
    if not dictionary.exists():
        raise OptionError(f"{dictionary}: no such file; make the data again: {remedy}")
    with open(dictionary, encoding="utf-8") as lines:
        pieces = sum(1 for _ in lines)
    expected = vocab_size(benchmark, scale)
    if abs(pieces - expected) > expected // 10:
        print(
            f"warning: {dictionary} has {pieces} pieces, but scale {scale} of {benchmark.title} "
            f"has {expected}: the size of the model will not be that of the scale",
            file=sys.stderr,
        )
