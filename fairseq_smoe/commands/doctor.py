"""Say what is installed, which GPUs there are, and whether training and translation work."""

import json
import logging
import sys
import warnings
from pathlib import Path

import fairseq_smoe


def add_arguments(parser):
    parser.epilog = "Ends with exit code 1 if something does not work."
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="where checkpoints will be written, for its free space (default: this folder)",
    )
    parser.add_argument(
        "--no-self-test", action="store_true", help="only look, which takes less than 20 seconds"
    )
    parser.add_argument("--cpu", action="store_true", help="test the CPU alone")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args):
    warnings.filterwarnings("ignore")  # fairseq's imports have many
    from fairseq_smoe.diagnosis.diagnosis import describe, examine, verdict

    diagnosis = examine(args.folder.absolute())
    if not args.json:
        print("\n".join(describe(diagnosis)), flush=True)
    results = [] if args.no_self_test else list(_self_test(diagnosis, args))
    well, line = verdict(diagnosis, results)
    if args.json:
        tests = [result.as_dict() for result in results]
        print(json.dumps({**diagnosis.as_dict(), "self_test": tests, "verdict": line}, indent=1))
    else:
        for warning in diagnosis.warnings:
            print(f"warning: {warning}")
        print(f"\n{line}")
    sys.exit(0 if well else 1)


def _self_test(diagnosis, args):
    """Yield the results, and print each as it comes."""
    logging.disable(logging.INFO)
    fairseq_smoe.register()
    from fairseq_smoe.diagnosis.self_test import self_test

    gpus = [] if args.cpu else [f"cuda:{gpu.number}" for gpu in diagnosis.gpus]
    if not args.json:
        print("\nself-test")
    for result in self_test(["cpu", *gpus]):
        if not args.json:
            outcome = f"FAILED: {result.failure}" if result.failure else "ok"
            kind = f"{result.check} {result.precision or ''}"
            print(f"  {result.device:8}{kind:18}{result.seconds:5.1f} s  {outcome}", flush=True)
        yield result
