"""Options of self-contrast decoding, of every command that translates. Imports no fairseq."""

import argparse
import math
from dataclasses import asdict, dataclass, fields
from typing import Optional

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.kind import KindOptions, option

RANK = "rank-"


@dataclass
class ContrastOptions(KindOptions):
    """SCMoE (Shi et al. 2024, arXiv 2405.14507). Off without ``scmoe_beta``."""

    scmoe_beta: Optional[float] = option(
        None,
        "self-contrast decoding (SCMoE): translate with (1 + BETA) times the log-probabilities of "
        "the model, minus BETA times those that it gives when every token visits a single, worse "
        "expert; the paper has 0.1 to 0.9 (default: off)",
    )
    scmoe_alpha: float = option(
        0.1,
        "with --scmoe-beta: only tokens are taken that the model gives at least this fraction of "
        "its greatest probability, from 0 (all) to 1 (the most probable alone)",
    )
    scmoe_weak: str = option(
        "rank-2",
        "with --scmoe-beta: the expert that tokens visit in the weak view. rank-K: the K-th best "
        "that a gate sees, or its last; random: any, drawn by --seed, sentence and position",
    )
    scmoe_weak_encoder: bool = option(
        False, "with --scmoe-beta: the weak view has an encoder of its own, which is weak, too"
    )

    @property
    def on(self):
        return self.scmoe_beta is not None

    def check(self, strata=None, options=None):
        """
        Raises:
            OptionError: names the flag, the value and what would be right.
        """
        self.rank()
        if not self.on:
            return self.refuse_given("", "--scmoe-beta")
        if not 0 <= self.scmoe_beta < math.inf:
            raise OptionError(f"--scmoe-beta {self.scmoe_beta}: expected 0 or more")
        if not 0 <= self.scmoe_alpha <= 1:
            raise OptionError(f"--scmoe-alpha {self.scmoe_alpha}: expected a fraction from 0 to 1")

    def rank(self):
        """Rank of the weak view's expert, from 1; None for a random one.

        Raises:
            OptionError: ``scmoe_weak`` is neither.
        """
        text = str(self.scmoe_weak)
        if text == "random":
            return None
        rank = text.removeprefix(RANK)
        if text != f"{RANK}{rank}" or not (rank.isascii() and rank.isdigit()) or int(rank) < 1:
            raise OptionError(
                f"--scmoe-weak {text}: expected rank-K with a number K from 1, such as rank-2, or "
                "random"
            )
        return int(rank)

    @classmethod
    def of(cls, *sources):
        """Each option of the first of ``sources`` that has it."""
        found = cls()
        for f in fields(cls):
            for source in reversed(sources):
                setattr(found, f.name, getattr(source, f.name, getattr(found, f.name)))
        return found

    def given(self):
        """``{name: value}`` of all options; empty if it is off."""
        return asdict(self) if self.on else {}


def add_contrast_options(parser):
    """Add the options to a parser or a group of its options."""
    for f in fields(ContrastOptions):
        flag = "--" + f.name.replace("_", "-")
        text = f.metadata["help"]
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        if f.default is not None:
            text += " (default: %(default)s)"
        kind, metavar = (str, "RULE") if f.type is str else (_number, f.name[6:].upper())
        parser.add_argument(flag, type=kind, default=f.default, metavar=metavar, help=text)


def _number(text):
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected a number") from None
