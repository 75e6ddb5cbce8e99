"""Scores of an evaluation folder: ``{direction}.hyp.*`` against ``{direction}.ref.*``."""

import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from fairseq_smoe.benchmarks.runs import read_run
from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation import translation_metrics
from fairseq_smoe.evaluation.comet_score import Comet
from fairseq_smoe.files import read_lines, write_whole

logger = logging.getLogger(__name__)

METRICS = ("piece-bleu", "bleu", "spbleu", "chrf++", "comet")
SCORES_FILE = "scores.json"


def add_scoring_options(parser):
    group = parser.add_argument_group("scores")
    group.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        metavar="METRIC",
        help="of piece-bleu (over SentencePiece pieces, what Tables 1 and 2 of the paper most "
        "likely hold), bleu (sacrebleu's default), spbleu (over the pieces of Flores-200; "
        "Table 3), chrf++ and comet. Default: all that need nothing else installed or downloaded",
    )
    add_tokenizer_option(group)
    group.add_argument(
        "--comet",
        metavar="MODEL",
        help="also score with COMET: a model's name or checkpoint (pip install unbabel-comet)",
    )


def add_tokenizer_option(parser):
    parser.add_argument(
        "--flores200-spm",
        metavar="FILE",
        help="SentencePiece model of Flores-200 for spbleu; default: the one that sacrebleu keeps, "
        f"{translation_metrics.cached_flores200_model()}",
    )


def score_folder(folder, args, extra):
    """Score every direction of an evaluation folder and write its ``scores.json``.

    Args:
        folder: RUN/evaluation/SUBSET, with ``{direction}.json`` for every translated direction.
        args: options of :func:`add_scoring_options`.
        extra: facts to add to the file; they replace those found here.

    Returns:
        what was written.

    Raises:
        OptionError: nothing is translated, a file is damaged, or a metric cannot be computed.
    """
    folder = Path(folder)
    directions = read_directions(folder)
    language_token = directions[0].has_language_token
    metrics = {
        name: Comet(args.comet)
        if name == "comet"
        else make_metric(name, args.flores200_spm, language_token)
        for name in choose_metrics(args)
    }
    common = _common_facts(folder, directions)
    scores = {}
    for direction in tqdm(directions, desc="scores", unit="direction"):
        scores[direction.name] = {
            "sentences": direction.facts["sentences"],
            **{name: _score(direction, metric) for name, metric in metrics.items()},
            "requested_capacity": _sides(direction.facts.get("requested_capacity")),
        }
    written = {
        "subset": folder.name,
        **_run_facts(folder),
        "metrics": {name: metric.signature for name, metric in metrics.items()},
        **common,
        "directions": scores,
        **extra,
    }
    write_whole(folder / SCORES_FILE, json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    return written


@dataclass(frozen=True)
class TranslatedDirection:
    """Hypotheses and references of one direction in an evaluation folder.

    Attributes:
        facts: what ``{direction}.json`` holds.
    """

    folder: Path
    name: str
    facts: dict

    @cached_property
    def pieces(self):
        """``(hypotheses, references)``: lists of lines of pieces joined by spaces."""
        return self._read("pieces")

    @cached_property
    def txt(self):
        """``(hypotheses, references)``: lists of lines of text."""
        return self._read("txt")

    def sources(self):
        """Lines of source text, which only COMET needs."""
        path = self.folder / f"{self.name}.src.txt"
        if not path.exists():
            raise OptionError(
                f"--comet: {path} is missing; COMET needs the source text, one sentence a line"
            )
        return read_lines(path, "evaluate again")

    @property
    def has_language_token(self):
        """Whether fairseq's targets began with the token of the target language."""
        return self.facts.get("settings", {}).get("decoder_langtok", True)

    def _read(self, suffix):
        paths = [self.folder / f"{self.name}.{side}.{suffix}" for side in ("hyp", "ref")]
        hypotheses, references = lines = [read_lines(path, "evaluate again") for path in paths]
        for path, found in zip(paths, lines):
            if len(found) != self.facts["sentences"]:
                raise OptionError(
                    f"{path}: line {min(len(found), self.facts['sentences']) + 1}: "
                    f"{len(found)} lines where {self.name}.json counts {self.facts['sentences']} "
                    f"sentences; delete {self.name}.json and evaluate again"
                )
        for number, line in enumerate(references, start=1):
            if not line.strip():
                raise OptionError(
                    f"{paths[1]}: line {number}: the reference is empty; take that sentence out of "
                    "the test text, prepare and evaluate again"
                )
        return hypotheses, references


def read_directions(folder):
    """The :class:`TranslatedDirection` of every ``{direction}.json``, in alphabetical order."""
    found = []
    for path in sorted(folder.glob("*-*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.get("direction") == path.stem:
            found.append(TranslatedDirection(folder, path.stem, facts))
    if not found:
        raise OptionError(
            f"{folder}: holds no translations; python -m fairseq_smoe evaluate makes them"
        )
    return found


def choose_metrics(args):
    """Names of the requested metrics, or by default of all that can be computed here."""
    chosen = list(dict.fromkeys(args.metrics or METRICS[:-1]))
    if not args.metrics and not args.flores200_spm:
        if not translation_metrics.has_flores200_model():
            chosen.remove("spbleu")
            logger.warning(
                "spbleu is left out: sacrebleu's Flores-200 tokenizer is missing; give its file "
                "with --flores200-spm, or save it as "
                f"{translation_metrics.cached_flores200_model()}"
            )
    if args.comet and "comet" not in chosen:
        chosen.append("comet")
    if "comet" in chosen and not args.comet:
        raise OptionError("--metrics comet: give a model with --comet, e.g. Unbabel/wmt22-comet-da")
    return chosen


def make_metric(name, flores200_spm=None, language_token=True):
    """The metric with this name (``translation_metrics.py``); not comet."""
    if name == "piece-bleu":
        return translation_metrics.PieceBleu(language_token)
    if name == "bleu":
        return translation_metrics.bleu()
    if name == "chrf++":
        return translation_metrics.chrf_plus_plus()
    return translation_metrics.spbleu(flores200_spm)


def _score(direction, metric):
    if isinstance(metric, Comet):
        return metric.score(direction.sources(), *direction.txt)
    return metric.corpus_score(*getattr(direction, metric.suffix))


def _sides(capacity):
    return {side: (capacity or {}).get(side) for side in ("encoder", "decoder")}


def _run_facts(folder):
    """The content of run.json, and the run's name."""
    run = read_run(folder.resolve().parent.parent)
    facts = {key: run.facts.get(key) for key in ("benchmark", "row", "scale", "seed", "data")}
    return {**facts, "name": run.name}


def _common_facts(folder, directions):
    """``num_updates`` and ``settings``, on which all directions have to agree."""
    first = None
    for direction in directions:
        facts = {
            "num_updates": direction.facts["checkpoint"]["num_updates"],
            "settings": direction.facts.get("settings", {}),
        }
        if first is not None and facts != first:
            raise OptionError(
                f"{folder}: {directions[0].name} was translated with {first}, {direction.name} "
                f"with {facts}; evaluate again"
            )
        first = facts
    return first
