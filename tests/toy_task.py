"""A toy translation task, and fairseq's command line as functions.

The three languages name the same things: ``en3``, ``aa3`` and ``bb3`` mean the same. A sentence is
translated into ``aa`` word by word in reverse order, into ``bb`` in the same order. A tiny model
learns this to a BLEU of nearly 100 in a few hundred updates.

:func:`train`, :func:`generate` and the others start the real commands of the running Python's
environment, on the CPU, with the plugin of this checkout. They check the exit code unless told not
to, and a failure shows the end of what the command printed.
"""

import json
import os
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import fork_server
from fork_server import COMMANDS

REPOSITORY = Path(__file__).parent.parent
LANGS = ("en", "aa", "bb")
DIRECTIONS = ("en-aa", "en-bb", "aa-en", "bb-en")
NUM_WORDS = 8
SPLIT_SIZES = {"train": 1500, "valid": 30, "test": 60}

# every row of the paper's tables, and the systems of docs/systems.md
MODELS = {
    "dense": ["--moe-freq", "0"],
    "vanilla": ["--smoe-strata", "8"],
    "switch": ["--smoe-strata", "8", "--moe-top1-expert"],
    "eom": ["--smoe-strata", "8", "--moe-eom", "0.1"],
    "cmr": [
        *("--smoe-strata", "8", "--moe-cmr", "--cmr-gate-loss-p", "0.8"),
        *("--cmr-gate-loss-wt", "0.01", "--cmr-gate-drop", "0.1"),
    ],
    "stacking": ["--smoe-strata", "4-4", "--smoe-stacking"],
    "smoe": ["--smoe-strata", "2-2-2-2"],
    # the systems of docs/systems.md
    "xmoe": [
        *("--smoe-strata", "2-2", "--moe-ffn-split", "2", "--moe-gate", "threshold"),
        *("--moe-threshold", "0.9,0.5"),
    ],
    "hmoe": [
        *("--smoe-strata", "8", "--moe-experts", "sized", "--moe-size-schedule", "arithmetic"),
        *("--moe-router-entropy", "0.03", "--moe-gate", "threshold", "--moe-threshold", "0.6"),
        *("--moe-threshold-weights", "renormalised"),
    ],
    "multi-head": ["--smoe-strata", "4-4", "--moe-heads", "4", "--moe-ffn-dim", "256"],
    "dynmoe": [
        *("--smoe-strata", "4-4", "--moe-gate", "top-any", "--moe-max-experts", "6"),
        *("--dyn-update-interval", "50", "--dyn-record-interval", "20"),
    ],
    "mpoe": ["--smoe-strata", "4-4", "--moe-experts", "tensor-product"],
    "pesc": ["--smoe-strata", "4-4", "--moe-experts", "adapter", "--pesc-adapter-dim", "32"],
}

# the task as a benchmark: 4 directions, the rows of M4
BENCHMARK = {
    "like": "m4",
    "title": "Toy",
    "english": "en",
    "languages": [{"code": "aa", "resource": "high"}, {"code": "bb", "resource": "low"}],
    "splits": {"train": "train", "valid": "valid", "test": "test"},
    "metric": "bleu",
    "vocab_size": 608,
    "batch_tokens": 10400,
}


def option_list(options):
    """``{"max_update": 5, "cpu": True}`` -> ``["--max-update", "5", "--cpu"]``; None and False
    leave an option out."""
    words = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return words


# a model learns the task in these updates; shorter trainings keep fairseq-train's defaults
LONG_ENOUGH = {"max_update": 400, "total_num_update": 400, "warmup_updates": 50, "dropout": 0}


# --------------------------------------------------------------------------------------
# the data


def write_corpus(folder):
    """Write ``SPLIT.en-XX.LANG`` text files for XX in aa, bb, and the dictionary ``dict.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    for split, size in SPLIT_SIZES.items():
        for other in ("aa", "bb"):
            sentences = [rng.choices(range(NUM_WORDS), k=rng.randint(2, 5)) for _ in range(size)]
            for lang in ("en", other):
                text = "".join(say(sentence, lang) + "\n" for sentence in sentences)
                (folder / f"{split}.en-{other}.{lang}").write_text(text)
    words = [f"{lang}{i} 1\n" for lang in LANGS for i in range(NUM_WORDS)]
    (folder / "dict.txt").write_text("".join(words))


def say(sentence, lang):
    """A sentence, a list of meanings, in words of ``lang``; ``aa`` speaks backwards."""
    ordered = sentence[::-1] if lang == "aa" else sentence
    return " ".join(f"{lang}{meaning}" for meaning in ordered)


def preprocess(text, data):
    """Binarise the corpus in ``text`` into ``data``, and list the languages in ``langs.txt``."""
    for other in ("aa", "bb"):
        run(
            *("fairseq-preprocess", "--source-lang", "en", "--target-lang", other),
            *(f"--{s}pref={text}/{s}.en-{other}" for s in SPLIT_SIZES),
            *("--srcdict", text / "dict.txt", "--tgtdict", text / "dict.txt"),
            *("--destdir", data),
        )
    (data / "langs.txt").write_text("\n".join(LANGS) + "\n")


def write_dictionaries(folder, langs, num_words):
    """One dictionary for all languages, ``word0 word1 ...``, and ``langs.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    words = "".join(f"word{i} 1\n" for i in range(num_words))
    for lang in langs:
        (folder / f"dict.{lang}.txt").write_text(words)
    (folder / "langs.txt").write_text("\n".join(langs) + "\n")


def write_binarised(folder, split, pair, num_sentences, word=0):
    """What fairseq-preprocess makes of that many sentences ``word``, ``word word``, or ``word word
    word``, in both languages of a pair."""
    import torch
    from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

    folder.mkdir(parents=True, exist_ok=True)
    eos, first_word = 2, 4
    sentences = [torch.tensor([first_word + word] * length + [eos]) for length in (1, 2, 3)]
    for lang in pair.split("-"):
        path = folder / f"{split}.{pair}.{lang}"
        builder = MMapIndexedDatasetBuilder(f"{path}.bin")
        for i in range(num_sentences):
            builder.add_item(sentences[i % 3])
        builder.finalize(f"{path}.idx")


# --------------------------------------------------------------------------------------
# the commands


@dataclass
class Outcome:
    """What a command printed, and how it ended."""

    command: list
    returncode: int
    stdout: str
    stderr: str

    def tail(self, num_lines=40):
        """The command and the end of its output, for people."""
        return "\n".join(
            [
                "$ " + " ".join(map(str, self.command)),
                *self.stdout.splitlines()[-num_lines:],
                f"--- stderr (exit code {self.returncode}):",
                *self.stderr.splitlines()[-num_lines:],
            ]
        )

    def log(self, kind):
        """Records of the JSON log: ``kind`` is train_inner, train or valid."""
        # "... | train | {...}" from fairseq-train, "...[train][INFO] - {...}" from fairseq-hydra-train
        pattern = re.compile(rf"(?:\| {kind} \||\[{kind}\].* -) (\{{.*\}})$", re.MULTILINE)
        return [
            {name: as_number(value) for name, value in json.loads(text).items()}
            for text in pattern.findall(self.stdout + self.stderr)
        ]

    def losses(self):
        """Training loss of every logged interval, in order, as printed."""
        return [record["loss"] for record in self.log("train_inner")]


def as_number(value):
    """fairseq logs most numbers as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def environment(**changes):
    """One thread per process: such small models are slower with more."""
    path = f"{COMMANDS}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **changes}


def run(*command, check=True, stdin="", cwd=REPOSITORY, timeout=900, own_process=False):
    """Run a command of this Python's environment to its end; see fork_server.py for how it starts.

    Args:
        own_process: start it as a user does.
    """
    command = list(map(str, command))
    start = fork_server.run_process if own_process else fork_server.run
    done = start(command, env=environment(), cwd=cwd, input=stdin, timeout=timeout)
    outcome = Outcome(command, done.returncode, done.stdout, done.stderr)
    assert not check or outcome.returncode == 0, outcome.tail()
    return outcome


def train_command(data, save_dir, *more, **options):
    """``fairseq-train`` for the toy task. ``more`` and ``options`` (see :func:`option_list`) are
    added to, or replace, the defaults below."""
    defaults = {
        "user_dir": "fairseq_smoe",
        "cpu": True,
        "task": "smoe_translation",
        "lang_pairs": ",".join(DIRECTIONS),
        "arch": "smoe_transformer_tiny",
        "criterion": "moe_label_smoothed_cross_entropy",
        "optimizer": "adam",
        "lr": 5e-3,
        "lr_scheduler": "polynomial_decay",
        "warmup_updates": 20,
        "total_num_update": 1000,
        "max_tokens": 700,
        "seed": 1,
        "num_workers": 0,
        "save_dir": save_dir,
        "no_epoch_checkpoints": True,
        "log_format": "json",
        "log_interval": 10,
    }
    return ["fairseq-train", str(data), *option_list({**defaults, **options}), *map(str, more)]


def train(data, save_dir, *more, check=True, **options):
    """Run :func:`train_command`."""
    return run(*train_command(data, save_dir, *more, **options), check=check)


@dataclass
class Translations(Outcome):
    """Output of fairseq-generate or fairseq-interactive.

    ``sentences`` maps a sentence's number to ``(score, translation)``; the score is the mean
    log2-probability of the tokens.
    """

    sentences: dict = field(default_factory=dict)

    @classmethod
    def read(cls, outcome):
        sentences = {}
        for line in outcome.stdout.splitlines():
            match = re.fullmatch(r"H-(\d+)\t(\S+)\t(.*)", line)
            if match:
                sentences[int(match[1])] = (float(match[2]), match[3])
        return cls(**vars(outcome), sentences=sentences)

    @property
    def bleu(self):
        """The score that fairseq-generate prints at the end."""
        match = re.search(r"^Generate .*BLEU4? = ([\d.]+)", self.stdout, re.MULTILINE)
        assert match, self.tail()
        return float(match[1])


def generate(data, checkpoint, direction="en-aa", *more, check=True, **options):
    """``fairseq-generate`` on the test set of one direction."""
    return Translations.read(
        run(
            "fairseq-generate",
            data,
            *_translation_options(checkpoint, direction, more, options),
            check=check,
        )
    )


def interactive(data, checkpoint, lines, direction="en-aa", *more, **options):
    """``fairseq-interactive`` on some lines of text."""
    options = {"buffer_size": len(lines), **options}
    return Translations.read(
        run(
            "fairseq-interactive",
            data,
            *_translation_options(checkpoint, direction, more, options),
            stdin="".join(line + "\n" for line in lines),
        )
    )


def _translation_options(checkpoint, direction, more, options):
    source, target = direction.split("-")
    defaults = {
        "user_dir": "fairseq_smoe",
        "cpu": True,
        "task": "smoe_translation",
        "source_lang": source,
        "target_lang": target,
        "path": checkpoint,
        "beam": 4,
        "max_tokens": 2000,
    }
    return [*option_list({**defaults, **options}), *map(str, more)]


# --------------------------------------------------------------------------------------
# the same in this process


def set_up(data, *more, **options):
    """What ``fairseq-train`` sets up before it trains: ``(cfg, task, model, criterion)``."""
    import torch
    from fairseq import options as fairseq_options
    from fairseq import tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    import fairseq_smoe

    fairseq_smoe.register()
    parser = fairseq_options.get_training_parser()
    words = train_command(data, "unused", *more, **options)[1:]
    cfg = convert_namespace_to_omegaconf(fairseq_options.parse_args_and_arch(parser, words))
    torch.manual_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    return cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion)


def load(data, checkpoint, direction="en-aa", **options):
    """What ``fairseq-generate`` loads: ``(task, model)``, the task with its test set. ``options``
    replace those of the training."""
    from fairseq import checkpoint_utils

    import fairseq_smoe

    fairseq_smoe.register()
    source, target = direction.split("-")
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(checkpoint)],
        arg_overrides={
            **{"data": str(data), "source_lang": source, "target_lang": target},
            **options,
        },
    )
    task.load_dataset("test", task_cfg=cfg.task)
    return task, model.eval()


def random_batch(seed, task, words, number, lengths):
    """A batch of random sentences of uneven length, which are padded.

    Args:
        words: number of words ``word0``, ``word1``, ... in the task's dictionary.
        number: of sentences.
        lengths: ``range`` of their lengths.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    pad, eos = task.source_dictionary.pad(), task.source_dictionary.eos()
    first = task.source_dictionary.index("word0")

    def sentences():
        tokens = torch.randint(first, first + words, (number, lengths.stop), generator=generator)
        length_N = torch.randint(lengths.start, lengths.stop, (number,), generator=generator)
        place = torch.arange(lengths.stop)
        tokens[place == length_N[:, None]] = eos
        return tokens.masked_fill(place > length_N[:, None], pad), length_N + 1

    source, source_lengths = sentences()
    target, _ = sentences()
    shifted = target.roll(1, dims=1)
    shifted[:, 0] = eos
    return {
        "id": torch.arange(number),
        "nsentences": number,
        "ntokens": int(target.ne(pad).sum()),
        "net_input": {
            "src_tokens": source,
            "src_lengths": source_lengths,
            "prev_output_tokens": shifted,
        },
        "target": target,
    }
