"""``python -m fairseq_smoe prepare`` in processes and on a Dask cluster of as many workers, all on
this machine: what it takes, and whether the files are the same when workers and scheduler die.

    python scripts/bench_cluster.py --work /tmp/cluster --to results/bench_cluster
    python scripts/bench_cluster.py --pairs 20000000 --rounds 1 --work /tmp/large

The contestants prepare the same made-up text one after another, --rounds times:

* one: a single process, which cleans the pair as a whole.
* processes: --workers of them.
* cluster: a scheduler and --workers workers of one thread.
* killed: the same; a random worker is killed --worker-kills times, and everything but the command
  --scheduler-kills times, at random moments of the time that the cluster took. The command is then
  given again.

The table has the median of the seconds, the most memory of the largest process, first until the
text is clean, then of the whole, and the most bytes on disk.
"""

import argparse
import filecmp
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench_prepare import PAIR, duration, made_text
from benchmarking import publish
from dask_processes import DaskProcesses
from process_memory import Peaks

from fairseq_smoe.preparation.options import STEPS
from fairseq_smoe.text_table import aligned

CONTESTANTS = ("one", "processes", "cluster", "killed")
UNTIL_CLEAN = STEPS[: STEPS.index("clean") + 1]
FIGURES = ("seconds", "clean_mib", "own_mib", "disk_gib")
SAMPLE_LINES = 100_000  # SentencePiece works in one process, and is not what is compared
WHOLE_PAIR = 10**9  # lines of a piece: more than any pair has


class Killer:
    """Runs commands on a cluster, parts of which it kills at random moments.

    Args:
        dask: a :class:`~dask_processes.DaskProcesses`.
        seconds: that the work takes if nothing is killed.
        workers, schedulers: how often each is killed.

    Attributes:
        kills: number so far.
    """

    def __init__(self, dask, seconds, workers, schedulers, seed=1):
        self.dask = dask
        self._random = random.Random(seed)
        kinds = [self._kill_worker] * workers + [self._kill_scheduler] * schedulers
        moments = sorted(self._random.uniform(0, seconds) for _ in kinds)
        self._random.shuffle(kinds)
        self._waiting = list(zip(moments, kinds))
        self._worked = 0  # seconds so far
        self.kills = 0

    def finish(self, command):
        """Give a command until it is done."""
        while True:
            process = start([*command, "--scheduler", self.dask.address])
            if self._watch(process):
                return end(process)
            process.wait()
            self.dask.start()

    def _watch(self, process, tick=0.1):
        """Wait for the end of a process, or of the scheduler: False."""
        while process.poll() is None:
            time.sleep(tick)
            self._worked += tick
            if self._waiting and self._waiting[0][0] <= self._worked:
                self.kills += 1
                if not self._waiting.pop(0)[1]():
                    return False
        return True

    def _kill_worker(self):
        self.dask.kill_worker(self._random.randrange(len(self.dask.workers)))
        self.dask.start_worker()
        return True

    def _kill_scheduler(self):
        self.dask.kill()
        return False


def start(command):
    return subprocess.Popen([sys.executable, *map(str, command)])


def end(process):
    if process.wait():
        sys.exit(process.returncode)


def compare(args):
    """A dict for each contestant."""
    text = made_text(args.work, args.pairs, args.repeated)
    data, expected = args.work / "data", args.work / "expected"
    shutil.rmtree(expected, ignore_errors=True)
    turns = {contestant: [] for contestant in args.contestants}
    for _ in range(args.rounds):
        for contestant, turn in turns.items():
            shutil.rmtree(data, ignore_errors=True)
            undisturbed = median(turns["cluster"], "seconds") if contestant == "killed" else 0
            turn.append(run(contestant, text, data, args, undisturbed))
            if expected.exists():
                turn[-1]["same"] = same_files(expected, data)
            else:
                data.rename(expected)
    return [
        {
            "contestant": contestant,
            **{name: median(turn, name) for name in FIGURES},
            "all_seconds": [t["seconds"] for t in turn],
            "kills": sum(t.get("kills", 0) for t in turn),
            "same": all(t.get("same", True) for t in turn),
        }
        for contestant, turn in turns.items()
    ]


def median(turns, name):
    return statistics.median(turn[name] for turn in turns)


def run(contestant, text, data, args, undisturbed):
    """Prepare the text.

    Args:
        undisturbed: seconds that the cluster takes.

    Returns:
        ``{what is measured: number}``
    """
    command = ["-m", "fairseq_smoe", "prepare", "--from", text, "--to", data]
    command += ["--pairs", "-".join(PAIR), "--vocab-size", args.vocab_size]
    command += ["--sample-lines", SAMPLE_LINES]
    command += ["--lines-per-shard", max(1, args.pairs // 4), "--piece-lines"]
    if contestant == "one":
        return measure(data, [*command, WHOLE_PAIR, "--workers", 1], alone)
    command.append(args.piece_lines)
    if contestant == "processes":
        return measure(data, [*command, "--workers", args.workers], alone)
    kills = (args.worker_kills, args.scheduler_kills) if contestant == "killed" else (0, 0)
    with DaskProcesses(args.work / "dask", args.workers) as dask:
        killer = Killer(dask, undisturbed, *kills)
        return measure(data, command, killer.finish) | {"kills": killer.kills}


def alone(command):
    """Run a command on processes of its own."""
    end(start(command))


def measure(data, command, finish):
    """What a command needs that makes ``data``, and is run by ``finish(command)``."""
    begun = time.monotonic()
    with Peaks(data) as first:
        finish([*command, "--steps", *UNTIL_CLEAN])
    with Peaks(data) as second:
        finish([*command, "--steps", *STEPS[len(UNTIL_CLEAN) :]])
    return {
        "seconds": round(time.monotonic() - begun, 1),
        "clean_mib": first.own_mib,
        "own_mib": max(first.own_mib, second.own_mib),
        "disk_gib": round(max(first.disk_bytes, second.disk_bytes) / 2**30, 2),
    }


def same_files(first, second):
    """Whether two data folders have the same files with the same bytes, but for those of work."""
    names = [
        sorted(name for path in folder.rglob("*") if counts(name := path.relative_to(folder), path))
        for folder in (first, second)
    ]
    if names[0] != names[1]:
        return False
    _, different, unreadable = filecmp.cmpfiles(first, second, names[0], shallow=False)
    return not different and not unreadable


def counts(name, path):
    return path.is_file() and name.parts[0] not in ("work", "steps.json", ".lock")


def as_markdown(results, args):
    base = next((r["seconds"] for r in results if r["contestant"] == "processes"), None)
    header = (
        f"{args.pairs:,} pairs, {args.workers} workers",
        "killed",
        "same files",
        "time",
        "of that of processes",
        "MiB until it is clean",
        "MiB at most",
        "GiB on disk at most",
    )
    rows = [
        (
            r["contestant"],
            str(r["kills"]),
            "yes" if r["same"] else "NO",
            duration(r["seconds"]),
            f"{r['seconds'] / base:.2f}" if base else "",
            str(r["clean_mib"]),
            str(r["own_mib"]),
            f"{r['disk_gib']:.2f}",
        )
        for r in results
    ]
    return "\n".join(aligned(header, rows, left=1))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pairs", type=int, default=500_000, help="pairs of lines (default: %(default)s)")
    add("--workers", type=int, default=2, help="processes (default: %(default)s)")
    add("--piece-lines", type=int, default=1_000_000, help="(default: %(default)s)")
    add("--vocab-size", type=int, default=8000, help="(default: %(default)s)")
    add("--repeated", type=float, default=0.1, help="share of lines (default: %(default)s)")
    add("--worker-kills", type=int, default=10, help="(default: %(default)s)")
    add("--scheduler-kills", type=int, default=3, help="(default: %(default)s)")
    add("--rounds", type=int, default=3, help="turns per contestant (default: %(default)s)")
    add("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS, help="(default: all)")
    add("--work", type=Path, required=True, metavar="DIR", help="folder for text and data")
    add("--to", type=Path, metavar="DIR", help="write results.json and table.md there")
    args = parser.parse_args()
    if "killed" in args.contestants and "cluster" not in args.contestants:
        parser.error("--contestants killed: name cluster as well, whose time is needed")
    args.contestants = [name for name in CONTESTANTS if name in args.contestants]
    results = compare(args)
    publish(as_markdown(results, args), args, {"results": results}, None)
    if not all(r["same"] for r in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
