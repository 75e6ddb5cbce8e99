"""Writing sentences as fairseq's binary files (``.bin`` and ``.idx``, the mmap format)."""

import struct
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import sentencepiece as spm

from fairseq_smoe.files import whole_file
from fairseq_smoe.preparation.vocabulary import FAIRSEQ_SPECIALS, fairseq_ids, read_dictionary

CHUNK_LINES = 50_000
UNKNOWN = FAIRSEQ_SPECIALS.index("<unk>")
MAX_COUNTED_LENGTH = 512  # tokens; longer sentences are counted as this long

# header of an .idx file: magic, version, code of the type of a token, number of sentences
_HEADER = struct.Struct("<9sQBQ")
_TYPE_CODES = {np.dtype(np.uint16): 8, np.dtype(np.uint32): 9}


def token_type(dictionary_size):
    """The smallest integer type that holds a dictionary's ids, by fairseq's rule."""
    return np.dtype(np.uint16 if dictionary_size < 65500 else np.uint32)


def chunk_bounds(path, chunk_lines=CHUNK_LINES):
    """``[(first byte, last byte + 1), ...]`` of every ``chunk_lines`` lines of a file."""
    starts, lines, offset = [0], 0, 0
    with open(path, "rb") as handle:
        while block := handle.read(1 << 22):
            ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n"))
            # of the lines that end in this block, those after which a chunk starts
            first = chunk_lines - lines % chunk_lines - 1
            starts += (offset + ends[first::chunk_lines] + 1).tolist()
            lines += len(ends)
            offset += len(block)
    if starts[-1] != offset:
        starts.append(offset)
    return list(zip(starts, starts[1:]))


def encode_chunks(chunks, model_path, dictionary, dtype):
    """Encode parts of text files of one SentencePiece model.

    Args:
        chunks: for each, the text file, its first and last byte offset, and the file to write
            (.npz). If that exists, the chunk is skipped.
        dictionary: path of fairseq's dictionary.
    """
    chunks = [chunk for chunk in chunks if not chunk[-1].exists()]
    if not chunks:
        return
    model = spm.SentencePieceProcessor(model_file=str(model_path))
    table = fairseq_ids(model, read_dictionary(dictionary)).astype(dtype)
    for path, start, stop, target in chunks:
        with open(path, "rb") as handle:
            handle.seek(start)
            text = handle.read(stop - start).decode("utf-8")
        lines = text.removesuffix("\n").split("\n")
        sentences = model.encode_as_numpy(lines, add_eos=True, num_threads=1)
        sizes = np.fromiter(map(len, sentences), np.int32, len(sentences))
        with whole_file(target) as handle:
            np.savez(handle, ids=table[np.concatenate(sentences)], sizes=sizes)


def binarise(chunks, targets):
    """Join encoded chunks to one or more binary files; line i goes to file ``i % len(targets)``.

    Shards of one corpus are thus alike, even if the corpus joins several sources.

    Args:
        chunks: the files of :func:`encode_chunks`, in order.
        targets: paths without their endings.

    Returns:
        dict of ``lines``, ``tokens`` (including the end of each line), ``unknown`` tokens, and
        ``lengths``: how many lines have 0, 1, 2, ... tokens.
    """
    num_shards, line = len(targets), 0
    sizes = [[] for _ in targets]
    lengths, unknown = np.zeros(MAX_COUNTED_LENGTH + 1, dtype=np.int64), 0
    with ExitStack() as stack:
        data = [stack.enter_context(whole_file(f"{target}.bin")) for target in targets]
        for path in chunks:
            with np.load(path) as chunk:
                ids, chunk_sizes = chunk["ids"], chunk["sizes"]
            shard_L = (line + np.arange(len(chunk_sizes))) % num_shards
            for shard in range(num_shards):
                mine = shard_L == shard
                data[shard].write(ids[np.repeat(mine, chunk_sizes)].data)
                sizes[shard].append(chunk_sizes[mine])
            line += len(chunk_sizes)
            unknown += int((ids == UNKNOWN).sum())
            counted = np.minimum(chunk_sizes, MAX_COUNTED_LENGTH)
            lengths += np.bincount(counted, minlength=len(lengths))
    for target, parts in zip(targets, sizes):
        write_index(f"{target}.idx", np.concatenate(parts), ids.dtype)
    last = int(np.flatnonzero(lengths)[-1]) + 1
    return {
        "lines": line,
        "tokens": sum(int(part.sum()) for parts in sizes for part in parts),
        "unknown": unknown,
        "lengths": lengths[:last].tolist(),
    }


def write_index(path, sizes, dtype):
    """Write an ``.idx`` file; ``sizes`` (sentences,) int32 in tokens."""
    with whole_file(path) as handle:
        handle.write(_HEADER.pack(b"MMIDIDX\x00\x00", 1, _TYPE_CODES[dtype], len(sizes)))
        handle.write(sizes.astype("<i4", copy=False).data)
        start = 0
        for i in range(0, len(sizes), CHUNK_LINES):  # 8 bytes a sentence are much for all
            ends = start + np.cumsum(sizes[i : i + CHUNK_LINES], dtype=np.int64) * dtype.itemsize
            handle.write(np.concatenate([[start], ends[:-1]]).astype("<i8", copy=False).data)
            start = ends[-1]


def read_sizes(path):
    """The lengths of the sentences of an ``.idx`` file; (sentences,) int32 in tokens."""
    with open(path, "rb") as handle:
        *_, sentences = _HEADER.unpack(handle.read(_HEADER.size))
        return np.fromfile(handle, dtype="<i4", count=sentences)


def chunk_files(folder, name, number):
    """The files with the chunks of the file ``name``."""
    return [Path(folder) / f"{name}.{i:05d}.npz" for i in range(number)]
