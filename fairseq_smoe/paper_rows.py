"""The rows of the paper's Tables 1 and 2: options of each, and the sizes the paper prints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """One row of a table.

    Attributes:
        method: its name in the paper.
        options: command-line options that train it.
        params: printed number of parameters, truncated by the paper to the digits shown.
        mflops: printed forward FLOPs per token, in millions.
    """

    method: str
    options: str
    params: str
    mflops: int


@dataclass(frozen=True)
class PaperTable:
    """A benchmark: its architecture, vocabulary and rows; the first row is the dense model."""

    arch: str
    vocab_size: int
    rows: tuple


_CMR = "--moe-cmr --cmr-gate-loss-p 0.8 --cmr-gate-loss-wt 0.01 --cmr-gate-drop 0.1"

TABLES = {
    "m4": PaperTable(
        "smoe_transformer",
        32000,
        (
            PaperRow("Dense", "--moe-freq 0", "60M", 167),
            PaperRow("Vanilla MoE", "--smoe-strata 8", "148M", 192),
            PaperRow("Switch Transformer", "--smoe-strata 8 --moe-top1-expert", "148M", 167),
            PaperRow("MoE+EOM", "--smoe-strata 8 --moe-eom 0.1", "148M", 192),
            PaperRow("MoE+CMR", f"--smoe-strata 8 {_CMR}", "161M", 217),
            PaperRow("Stacking 2 4-expert MoE", "--smoe-strata 4-4 --smoe-stacking", "148M", 242),
            PaperRow("SMoE-4-4", "--smoe-strata 4-4", "148M", 217),
            PaperRow(
                "Stacking 4 2-expert MoE", "--smoe-strata 2-2-2-2 --smoe-stacking", "148M", 327
            ),
            PaperRow("SMoE-2-2-2-2", "--smoe-strata 2-2-2-2", "148M", 247),
        ),
    ),
    "m15": PaperTable(
        "smoe_transformer_big",
        32000,
        (
            PaperRow("Dense", "--moe-freq 0", "209M", 506),
            PaperRow("Vanilla MoE", "--smoe-strata 16", "963M", 606),
            PaperRow("Switch Transformer", "--smoe-strata 16 --moe-top1-expert", "963M", 506),
            PaperRow("MoE+EOM", "--smoe-strata 16 --moe-eom 0.1", "963M", 606),
            PaperRow("MoE+CMR", f"--smoe-strata 16 {_CMR}", "1.01B", 707),
            PaperRow("SMoE-4-12", "--smoe-strata 4-12", "963M", 656),
            PaperRow("SMoE-12-4", "--smoe-strata 12-4", "963M", 757),
            PaperRow("SMoE-8-8", "--smoe-strata 8-8", "963M", 707),
            PaperRow("SMoE-4-4-8", "--smoe-strata 4-4-8", "963M", 724),
            PaperRow("SMoE-8-4-4", "--smoe-strata 8-4-4", "963M", 805),
            PaperRow("SMoE-4-4-4-4", "--smoe-strata 4-4-4-4", "963M", 825),
            PaperRow("Vanilla MoE, 32 experts", "--smoe-strata 32", "1.77B", 606),
        ),
    ),
}
