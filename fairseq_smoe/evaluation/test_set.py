"""The files of a test set in one direction: binarised, and as text where the data folder has it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fairseq.data import indexed_dataset

from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation.saved_model import subsets_in
from fairseq_smoe.evaluation.translation_metrics import UNKNOWN
from fairseq_smoe.files import read_lines
from fairseq_smoe.translation.data_manager import find_pairs, pair_of


@dataclass(frozen=True)
class TestSet:
    """One direction of a split.

    Attributes:
        folder: the data folder.
        subset: ``"test"``
        direction: ``"de-en"``
        pair: the pair in the files' names: ``"en-de"`` or ``"de-en"``.
    """

    folder: Path
    subset: str
    direction: str
    pair: str

    @property
    def source(self):
        """Path of the source side without ending; .bin and .idx are the binarised files, .txt the
        text."""
        return self.folder / f"{self.subset}.{self.pair}.{self.direction.split('-')[0]}"

    @property
    def target(self):
        """The same of the target side."""
        return self.folder / f"{self.subset}.{self.pair}.{self.direction.split('-')[1]}"

    def check(self):
        """Number of sentences.

        Raises:
            OptionError: a reference is empty, or the text and the binarised file differ in length.
        """
        dataset = indexed_dataset.MMapIndexedDataset(str(self.target))
        lengths = dataset.sizes.tolist()  # a copy, because the dataset's memory is unmapped
        for number, length in enumerate(lengths, start=1):
            if length <= 1:  # the sentence has no tokens but its end
                raise OptionError(_empty(f"{self.target}.bin", "sentence", number))
        for path in (self.source, self.target):
            lines = read_text(path)
            if lines is not None and len(lines) != len(lengths):
                raise OptionError(
                    f"{path}.txt: {len(lines)} lines, but {path.name}.bin has {len(lengths)} "
                    "sentences; prepare the data again"
                )
        for number, line in enumerate(read_text(self.target) or (), start=1):
            if not line.strip():
                raise OptionError(_empty(f"{self.target}.txt", "line", number))
        return len(lengths)

    def fingerprint(self):
        """A hash of all its files."""
        digest = hashlib.sha256()
        for path in (self.source, self.target):
            for ending in (".bin", ".idx", ".txt"):
                file = Path(f"{path}{ending}")
                if file.exists():
                    digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def texts(self, sources, references):
        """Lines of text of source and reference.

        Args:
            sources, references: pieces of every sentence, for a data folder without text.

        Returns:
            ``(source lines, reference lines, number of unknown pieces in the references)``; the
            number is 0 if the data folder has text.
        """
        unknown = 0
        lines = read_text(self.target)
        if lines is None:
            lines = [to_text(pieces) for pieces in references]
            unknown = sum(pieces.split(" ").count(UNKNOWN) for pieces in references)
        return read_text(self.source) or [to_text(pieces) for pieces in sources], lines, unknown


def find_test_sets(folder, subset, directions, optional=False):
    """The :class:`TestSet` of every direction.

    Args:
        folder: the data folder.
        optional: leave out directions without files.

    Raises:
        OptionError: a direction has no files; with ``optional``, no direction has any.
    """
    folder = Path(folder)
    present = find_pairs(folder, subset)
    pairs = {direction: pair_of(direction, present) for direction in directions}
    missing = [direction for direction, pair in pairs.items() if pair is None]
    if missing and not (optional and len(missing) < len(pairs)):
        some = ", ".join([*sorted(present)[:5], *["..."] * (len(present) > 5)])
        has = f"has {some} of it" if present else f"has {', '.join(subsets_in(folder)) or 'none'}"
        raise OptionError(
            f"--subset {subset}: no {subset} sentences of {missing[0]} in {folder}, which {has}; "
            "choose another with --subset, --directions or --data"
        )
    return [TestSet(folder, subset, d, pair) for d, pair in pairs.items() if pair is not None]


def read_text(side):
    """Lines of the text of one side; only newlines end a line. None if there is no text.

    Raises:
        OptionError: it is no UTF-8 text.
    """
    path = Path(f"{side}.txt")
    return read_lines(path, "prepare it again") if path.exists() else None


def to_text(pieces):
    """SentencePiece pieces joined by spaces, to text."""
    return pieces.replace(" ", "").replace("▁", " ").strip()


def _empty(path, what, number):
    return (
        f"{path}: {what} {number}: the reference is empty; take that sentence out of the test text "
        "and prepare it again"
    )
