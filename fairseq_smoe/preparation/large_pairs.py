"""Cleaning training text of any size in bounded memory: in pieces, each a job of its own.

1. :func:`judge_piece`: what is known of lines by themselves, and the fingerprints of those that
   may stay, sorted into buckets by their value.
2. :func:`find_repeated`: of a bucket of all pieces, the lines that are equal to an earlier one.
   Equal fingerprints are in the same bucket, so that buckets can be searched one by one.
3. :func:`write_piece`: the lines that stay.
4. :func:`join_pieces`.

Every job writes files, and does nothing if they are there: an interrupted step goes on. The text is
read twice, in 1 and 3, and the result is byte for byte that of ``clean_training_text``.
"""

import json
import math
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairseq_smoe.files import whole_file, write_whole
from fairseq_smoe.preparation.binary import chunk_bounds
from fairseq_smoe.preparation.clean import (
    KEPT,
    Judgement,
    count_and_write,
    files_of,
    held_out_files,
    judge,
    repeats,
)

BYTES_A_LINE = 32  # text of fewer bytes than a piece of such lines is cleaned by a single job
PIECES_A_BUCKET = 2  # a job needs 50 bytes a line
_MARK = np.dtype([("mark", "<u8"), ("line", "<u4")])


@dataclass(frozen=True)
class Piece:
    """A run of lines of a pair's training text.

    Attributes:
        folder: where its files are.
        number: from 0.
        starts: byte offset of its first line in both sides.
        lines: the most it may have; the last piece has fewer.
    """

    folder: Path
    number: int
    starts: tuple
    lines: int

    def file(self, ending):
        return self.folder / f"{self.number:05d}.{ending}"


@dataclass(frozen=True)
class LargePair:
    """A pair whose training text is cleaned in pieces.

    Attributes:
        pair: e.g. "de-en".
        raw, clean: folders of the text, and of what is left of it.
        piece_lines: lines of a piece.
    """

    pair: str
    raw: Path
    clean: Path
    piece_lines: int

    @property
    def folder(self):
        """Intermediate files."""
        return self.clean / "pieces" / self.pair

    @property
    def paths(self):
        return files_of("train", self.pair, self.raw, self.clean)[0]

    @property
    def targets(self):
        return files_of("train", self.pair, self.raw, self.clean)[1]

    def cut(self):
        """A list of :class:`Piece`. Reads the text for the ends of its lines."""
        self.folder.mkdir(parents=True, exist_ok=True)
        bounds = [chunk_bounds(path, self.piece_lines) for path in self.paths]
        return [
            Piece(self.folder, number, (first, second), self.piece_lines)
            for number, ((first, _), (second, _)) in enumerate(zip(*bounds, strict=True))
        ]


def is_large(size, piece_lines):
    """Whether a text, of which the larger side has ``size`` bytes, is cleaned in pieces."""
    return size > BYTES_A_LINE * piece_lines


def buckets_of(pieces):
    """Number of buckets for the marks of some pieces."""
    return math.ceil(len(pieces) / PIECES_A_BUCKET)


def judge_piece(large, piece, rules, buckets):
    """Write the judgement of a piece: ``NUMBER.judged.npz``, and ``NUMBER.marks.npy`` with the
    lines that may stay and their fingerprints, bucket by bucket."""
    if piece.file("judged.npz").exists():
        return
    held_out = held_out_files(large.pair, large.clean)
    judged = judge(large.paths, rules, held_out, piece.starts, piece.lines)
    bounds = np.zeros(buckets + 1, dtype=np.int64)
    if judged.mark_N is not None:
        candidates = np.flatnonzero(judged.verdict_N == KEPT)
        marks = np.empty(len(candidates), dtype=_MARK)
        marks["mark"], marks["line"] = judged.mark_N[candidates], candidates
        bucket = marks["mark"] % np.uint64(buckets)
        bounds[1:] = np.cumsum(np.bincount(bucket.astype(np.int64), minlength=buckets))
        with whole_file(piece.file("marks.npy")) as handle:
            np.save(handle, marks[np.argsort(bucket, kind="stable")])
    with whole_file(piece.file("judged.npz")) as handle:  # last, as it stands for both
        np.savez(
            handle,
            verdict_N=judged.verdict_N,
            overlap_N=judged.overlap_N,
            words_N=judged.words_N,
            repaired=judged.repaired,
            bounds=bounds,
        )


def find_repeated(large, pieces, bucket):
    """Write the lines of a bucket that are equal to an earlier one, piece by piece:
    ``repeated-BUCKET.npy``, and ``repeated-BUCKET.bounds.npy`` with the place of each piece."""
    target, bounds_file = _repeated_files(large, bucket)
    if bounds_file.exists():
        return
    parts = [np.empty(0, dtype=_MARK)]
    for piece in pieces:
        with np.load(piece.file("judged.npz")) as judged:
            start, stop = judged["bounds"][bucket : bucket + 2]
        marks = np.load(piece.file("marks.npy"), mmap_mode="r") if stop > start else parts[0]
        parts.append(np.array(marks[start:stop]))
    sizes = [len(part) for part in parts[1:]]
    marks = np.concatenate(parts)
    del parts
    repeated = repeats(marks["mark"])
    in_piece = np.repeat(np.arange(len(pieces)), sizes)[repeated]
    bounds = np.searchsorted(in_piece, np.arange(len(pieces) + 1))
    for path, array in ((target, marks["line"][repeated]), (bounds_file, bounds)):
        with whole_file(path) as handle:
            np.save(handle, array)


def _repeated_files(large, bucket):
    name = f"repeated-{bucket:05d}"
    return large.folder / f"{name}.npy", large.folder / f"{name}.bounds.npy"


def write_piece(large, piece, buckets):
    """Write the lines of a piece that stay, and ``NUMBER.counts.json``."""
    if piece.file("counts.json").exists():
        return
    repeated = [np.empty(0, dtype=np.int64)]
    for bucket in range(buckets):
        path, bounds_file = _repeated_files(large, bucket)
        start, stop = np.load(bounds_file)[piece.number : piece.number + 2]
        if stop > start:
            repeated.append(np.load(path, mmap_mode="r")[start:stop].astype(np.int64))
    with np.load(piece.file("judged.npz")) as saved:
        arrays = [saved[name] for name in ("verdict_N", "overlap_N", "words_N")]
        judged = Judgement(*arrays, mark_N=None, repaired=int(saved["repaired"]))
    targets = [_kept_file(piece, target) for target in large.targets]
    repeated = np.concatenate(repeated)
    counts = count_and_write(large.paths, targets, judged, repeated, piece.starts)
    write_whole(piece.file("counts.json"), json.dumps(counts) + "\n")


def _kept_file(piece, target):
    return piece.file(target.name)


def join_pieces(large, pieces):
    """Join what :func:`write_piece` has written.

    Returns:
        The counts of the training text.
    """
    for target in large.targets:
        if not target.exists():
            with whole_file(target) as joined:
                for piece in pieces:
                    with open(_kept_file(piece, target), "rb") as kept:
                        shutil.copyfileobj(kept, joined, 1 << 20)
    total = {}
    for piece in pieces:
        counts = json.loads(piece.file("counts.json").read_text(encoding="utf-8"))
        for name, numbers in counts.items():
            total.setdefault(name, Counter()).update(numbers)
    return {name: dict(numbers) for name, numbers in total.items()}
