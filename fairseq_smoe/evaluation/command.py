"""The steps of ``python -m fairseq_smoe evaluate``. ``set_up_fairseq`` has to be called before."""

import json
import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from fairseq import utils
from tqdm import tqdm

from fairseq_smoe.accounting.flops import count_parameters, flops_per_token
from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.benchmarks.cleaning import NOT_RECORDED, recorded_cleaning
from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation import set_up_fairseq
from fairseq_smoe.evaluation.batches import TokenBudget
from fairseq_smoe.evaluation.defaults import CPU_TOKENS, GPU_TOKENS, MOST_CPU_PROCESSES
from fairseq_smoe.evaluation.folder import EvaluationFolder
from fairseq_smoe.evaluation.on_ranks import help_the_first, translate_on_ranks
from fairseq_smoe.evaluation.row_check import check_row
from fairseq_smoe.evaluation.saved_model import (
    identify,
    read_saved_model,
    trained_directions,
)
from fairseq_smoe.evaluation.score_table import score_table
from fairseq_smoe.evaluation.scoring import score_folder
from fairseq_smoe.evaluation.test_set import find_test_sets
from fairseq_smoe.evaluation.translator import Settings, Translator
from fairseq_smoe.evaluation.workers import translate_in_turn, translate_side_by_side

DIRECTIONS = "directions"  # what the first rank tells the others before it loads the model
PARTS = "parts"  # folder of what ranks have translated so far


def evaluate(args, training, checkpoint, ranks=None):
    """Translate what is not translated yet, then score.

    Args:
        args: options of ``fairseq_smoe.commands.evaluate``.
        training: :class:`~fairseq_smoe.benchmarks.runs.Run`
        checkpoint: the file.
        ranks: :class:`~fairseq_smoe.evaluation.ranks.Ranks` to share the work, of which this is the
            first; None for this process and those that it starts.
    """
    devices = _devices(args, ranks)
    benchmark = benchmarks.load(args.benchmark) if args.benchmark else training.benchmark
    saved = read_saved_model(
        checkpoint, args.data or training.facts.get("data"), args.model_overrides
    )
    if args.benchmark:
        check_row(benchmark, benchmark.row(args.row), args.scale, saved)
    directions = _directions(args, benchmark, saved)
    data = Path(utils.split_paths(saved.task_options.data)[0])
    if not data.is_dir():
        raise OptionError(
            f"{data}: no such folder; if the data was moved, say where to with --data"
        )
    optional = not (args.directions or benchmark)
    subsets = list(dict.fromkeys(args.subset or ["test"]))
    test_sets = [t for s in subsets for t in find_test_sets(data, s, directions, optional)]
    sentences = {test_set: test_set.check() for test_set in test_sets}
    settings = Settings.of(args)
    origin = {
        "checkpoint": {**identify(checkpoint), "num_updates": saved.num_updates},
        "settings": {
            **settings.recorded(),
            "decoder_langtok": bool(saved.task_options.decoder_langtok),
            # only if there are any, as in evaluations of earlier versions
            **({"model_overrides": args.model_overrides} if args.model_overrides else {}),
        },
    }
    folders = {
        subset: EvaluationFolder(training.folder / "evaluation" / subset, origin)
        for subset in subsets
    }
    with ExitStack() as held:
        for folder in folders.values():
            held.enter_context(folder.for_this_process_alone())
            folder.forget_others(directions)
        waiting = [t for t in test_sets if not folders[t.subset].is_done(t, sentences[t])]
        for test_set in waiting:
            folders[test_set.subset].forget(test_set.direction)
        if ranks is not None:
            ranks.show_folder(folders[subsets[0]].path / PARTS)
            ranks.tell(DIRECTIONS, json.dumps(directions))
        model, task = saved.build(directions)
        facts = {"model": _model_facts(model, saved), "cleaning": _cleaning(args, training, data)}
        tokens = _tokens(args, devices[0])
        if len(devices) == 1:
            translator = Translator(model, task, settings, devices[0], TokenBudget(tokens))
            translate = partial(translate_in_turn, translator)
            if ranks is not None:
                keys = {
                    (t.direction, t.subset): json.dumps([origin, t.fingerprint()]) for t in waiting
                }
                parts = {subset: folder.path / PARTS for subset, folder in folders.items()}
                translate = partial(translate_on_ranks, ranks, translator, parts, keys)
        else:
            translate = _side_by_side(model, task, settings, devices, tokens, saved, directions)
        _translate(translate, waiting, sentences, folders)
        if not args.no_score:
            for subset, folder in folders.items():
                scores = score_folder(folder.path, args, facts)
                about = f"training text cleaned: {scores['cleaning']}"
                print(f"\n{scores['name']}, {subset}; {about}\n\n{score_table(scores)}")


def help_to_evaluate(args, training, checkpoint, ranks):
    """What the ranks behind the first do: translate their shares."""
    (device,) = _devices(args, ranks)
    directions = json.loads(ranks.ask(DIRECTIONS))
    translator = load_translator(
        checkpoint,
        args.data or training.facts.get("data"),
        args.model_overrides,
        directions,
        Settings.of(args),
        device,
        _tokens(args, device),
    )
    help_the_first(ranks, translator)


def _tokens(args, device):
    return args.max_tokens or (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS)


def load_translator(checkpoint, data, overrides, directions, settings, device, tokens):
    """A :class:`Translator` in a new process."""
    set_up_fairseq()
    model, task = read_saved_model(checkpoint, data, overrides).build(directions)
    return Translator(model, task, settings, device, TokenBudget(tokens))


def _devices(args, ranks=None):
    """A device for every process of this command. Without GPUs, several processes with few threads
    are faster than one with many threads, because beam search consists of small steps.

    Raises:
        OptionError: half precision without a GPU, or fewer GPUs than ranks on this machine.
    """
    gpus = 0 if args.cpu else torch.cuda.device_count()
    if ranks is not None and gpus:
        return [ranks.gpu(gpus, "--cpu")]
    if not gpus:
        if args.fp16:
            raise OptionError("--fp16: needs a GPU, and none is in use; leave it out")
        processes = 1 if ranks is not None else args.processes
        processes = processes or min(len(os.sched_getaffinity(0)), MOST_CPU_PROCESSES)
        if processes > 1:
            # a thread pool that exists before a fork does not work in the child
            torch.set_num_threads(1)
        return [torch.device("cpu")] * processes
    return [torch.device("cuda", i % gpus) for i in range(args.processes or gpus)]


def _directions(args, benchmark, saved):
    """The directions to translate, in order.

    Raises:
        OptionError: a direction is malformed, or the model does not know its languages.
    """
    if not args.directions:
        return benchmark.directions() if benchmark else trained_directions(saved)
    languages = saved.languages()
    for direction in args.directions:
        if direction.count("-") != 1:
            raise OptionError(
                f"--directions {direction}: expected source and target joined by one hyphen, e.g. "
                "en-de"
            )
        for language in direction.split("-"):
            if language not in languages:
                raise OptionError(
                    f"--directions {direction}: {language} is none of the model's languages, "
                    f"{', '.join(languages)}"
                )
    return list(dict.fromkeys(args.directions))


def _cleaning(args, training, data):
    """How the training text was cleaned. A folder given with --data may have other text."""
    recorded = training.facts.get("cleaning")
    if recorded is None and not args.data:
        recorded = recorded_cleaning(data)
    return recorded or NOT_RECORDED


def _model_facts(model, saved):
    return {
        "parameters": count_parameters(model),
        "flops_per_token": flops_per_token(model, saved.model_options),
    }


def _side_by_side(model, task, settings, devices, tokens, saved, directions):
    """``translate(jobs, progress)`` with a process for each of ``devices``."""
    if devices[0].type == "cpu":
        # forks share the model's memory
        translator = Translator(model, task, settings, devices[0], TokenBudget(tokens))
        cores = len(os.sched_getaffinity(0))
        threads = max(1, cores // len(devices))  # with more threads, they wait for each other
        if asked := os.environ.get("OMP_NUM_THREADS"):
            threads = min(threads, int(asked.split(",")[0]))
        make = [partial(_with_threads, translator, threads)] * len(devices)
        return lambda *rest: translate_side_by_side(make, *rest, start_method="fork")
    data, overrides = saved.task_options.data, saved.overrides
    make = [
        partial(load_translator, saved.path, data, overrides, directions, settings, device, tokens)
        for device in devices
    ]
    return lambda *rest: translate_side_by_side(make, *rest, start_method="spawn")


def _with_threads(translator, threads):
    torch.set_num_threads(threads)
    return translator


def _translate(translate, test_sets, sentences, folders):
    """Translate and write ``test_sets``."""
    total = sum(sentences.values())
    done = total - sum(sentences[test_set] for test_set in test_sets)
    jobs = {(test_set.direction, test_set.subset): test_set for test_set in test_sets}
    with tqdm(total=total, initial=done, desc="translate", unit="sentence") as bar:
        for job, translation in translate(list(jobs), bar.update):
            test_set = jobs[job]
            folders[test_set.subset].write(test_set, translation)
