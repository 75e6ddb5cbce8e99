"""Running the steps of a preparation that are not complete."""

import resource
import time
from dataclasses import asdict

from fairseq_smoe.errors import OptionError
from fairseq_smoe.files import disk_space_for, only_process_in, remove_unfinished
from fairseq_smoe.preparation import options, steps
from fairseq_smoe.preparation.open_pool import open_pool
from fairseq_smoe.preparation.outputs import remove_outputs
from fairseq_smoe.preparation.plan import make_plan
from fairseq_smoe.preparation.record import Record


def prepare(args):
    """Run the steps that the arguments of ``python -m fairseq_smoe prepare`` ask for."""
    plan = make_plan(args)
    with disk_space_for(plan.target):
        try:
            plan.work.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, FileNotFoundError, PermissionError) as error:
            raise OptionError(f"--to {plan.target}: {error.strerror}; choose another") from error
        with only_process_in(plan.target):
            _run_steps(plan, args)


def _run_steps(plan, args):
    for pattern in ("*", "shard*/*", "work/**/*"):
        remove_unfinished(plan.target, pattern)
    record = Record(plan.target)
    settings = {**asdict(plan), **asdict(plan.rules)}
    if args.redo:
        if args.redo not in args.steps:
            raise OptionError(f"--redo {args.redo}: is not among --steps {' '.join(args.steps)}")
        # check everything before anything is removed
        record.require_earlier(args.redo, settings)
        steps.check_input(plan, args.redo)
        record.forget(args.redo)
        remove_outputs(plan, args.redo)
    with open_pool(plan.workers, plan.scheduler, plan.work) as pool:
        for step in options.STEPS:
            if step in args.steps:
                _run_step(step, plan, pool, record, settings)
    if record.is_complete("report"):
        print(f"{plan.target}: complete, see report.md; the folder work in it may be deleted")


def _run_step(step, plan, pool, record, settings):
    record.begin(step, settings)
    if record.is_complete(step):
        print(f"{step}: already complete")
        return
    print(f"{step} ...", flush=True)
    started, earlier = time.monotonic(), len(pool.parts)
    try:
        steps.check_input(plan, step)
        getattr(steps, step)(plan, pool)
    except Exception:
        if step in options.FREE_AFTER_FAILURE:
            record.forget(step)
        raise
    record.complete(
        step,
        seconds=round(time.monotonic() - started, 1),
        parts=pool.parts[earlier:],
        largest_process_so_far_mib=_peak_memory_mib(),
    )


def _peak_memory_mib():
    users = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(user).ru_maxrss for user in users) // 1024
