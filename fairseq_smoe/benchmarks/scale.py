"""Sizes at which a benchmark can be trained: the paper's, and two for smaller machines.

Everything but the experts shrinks, so that the rows remain those of the tables.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Divisors of the paper's sizes, and training options that replace the paper's.

    Attributes:
        width: divides the model dim and the FFN's hidden size.
        heads: divides the attention heads.
        vocabulary: divides the pieces of the vocabulary.
        batch: divides the target tokens of an update.
        layers: of encoder and of decoder, at most.
        options: ``{option of fairseq-train: value}`` that replace the benchmark's: few updates
            need a higher learning rate and no dropout.
    """

    width: int
    heads: int
    vocabulary: int
    batch: int
    layers: int
    options: dict


_NO_DROPOUT = {"--dropout": "0", "--attention-dropout": "0"}

SCALES = {
    "paper": Scale(
        width=1,
        heads=1,
        vocabulary=1,
        batch=1,
        layers=6,
        options={"--save-interval-updates": "2000"},
    ),
    # a row of m4 takes half an hour to an hour of one CPU core
    "small": Scale(
        width=4,
        heads=2,
        vocabulary=4,
        batch=13,
        layers=6,
        options={
            "--lr": "2e-3",
            "--warmup-updates": "400",
            "--max-update": "3000",
            "--save-interval-updates": "1000",
            **_NO_DROPOUT,
        },
    ),
    # minutes: to try the commands out
    "tiny": Scale(
        width=8,
        heads=4,
        vocabulary=32,
        batch=20,
        layers=2,
        options={
            "--lr": "5e-3",
            "--warmup-updates": "50",
            "--max-update": "300",
            "--save-interval-updates": "100",
            **_NO_DROPOUT,
        },
    ),
}
