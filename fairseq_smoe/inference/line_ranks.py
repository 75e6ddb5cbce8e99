"""Translating a file line by line on several ranks, in constant memory.

Each rank reads the whole file and translates blocks of lines of its own. A translated block is a
file in OUTPUT.parts, named by its first line (from 0) and its number of lines. The first rank
appends the blocks to OUTPUT.part in their order.
"""

import json
import re
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation.ranks import PLAN, SHARE_DONE
from fairseq_smoe.files import remove_unfinished, whole_file
from fairseq_smoe.inference.line_files import (
    BadLineError,
    Lines,
    Output,
    fingerprint,
    open_input,
    translate_block,
)

BLOCKS = 4  # at least so many for each rank, so that the last ones to end are nearly equal


def translate_lines_on_ranks(ranks, make_translator, job, source, target):
    """What :func:`~fairseq_smoe.inference.line_files.translate_lines` does, on several ranks.

    Args:
        ranks: :class:`~fairseq_smoe.evaluation.ranks.Ranks`
        source, target: paths, on file systems that all ranks' machines share.

    Raises:
        OptionError: a file is missing, in the way, no UTF-8 text, or another one on some machine.
        LostRankError: a rank has died or cannot be reached.
    """
    for flag, path in (("--input", source), ("--output", target)):
        if path is None:
            raise OptionError(f"{flag}: torchrun's processes need a file; give one")
    with open_input(source) as file:
        size = Path(source).stat().st_size
        facts = fingerprint(source, job, size)
        if ranks.is_first:
            with Output.open(target, source, job, size) as output:
                first = _First(ranks, output, size)
                ranks.tell(PLAN, json.dumps({"facts": facts, **first.plan}))
                blocks = _blocks(ranks, Lines(file, source, job.invalid_utf8), job, first.plan)
                first.translate(make_translator(), job, blocks)
            return
        plan = json.loads(ranks.ask(PLAN))
        if plan["facts"] != facts:
            raise OptionError(
                f"--input {source}: {ranks.name(ranks.rank)} sees another file there than "
                f"{ranks.name(0)}; use a folder that all machines share"
            )
        ranks.see_folder()
        translator = make_translator()
        blocks = _blocks(ranks, Lines(file, source, job.invalid_utf8), job, plan)
        with suppress(BadLineError):  # which the first rank tells
            for block in blocks:
                if block.owner == ranks.rank:
                    _translate(translator, job, block, plan["folder"])
    ranks.tell(SHARE_DONE.format(ranks.rank), "")


@dataclass
class _Block:
    """Consecutive lines.

    Attributes:
        start, number: the first one, and how many.
        owner: rank that translates them; None if they are translated.
        lines: their text.
        end: bytes of the input up to the last one.
    """

    start: int
    number: int
    owner: int | None
    lines: list
    end: int

    def file(self, folder):
        return Path(folder) / f"{self.start:012d}-{self.number}"


def _blocks(ranks, lines, job, plan):
    """The blocks of a file, the same for all ranks. If a line is no text, those before it come
    first."""
    known, loads = dict(plan["known"]), [0] * ranks.size
    for _ in zip(range(plan["done"]), lines):
        pass
    starts = deque(sorted(known))
    while True:
        start, begin = lines.number, lines.bytes_read
        while starts and starts[0] < start:
            starts.popleft()
        most = known.get(start) or min([job.chunk, *(first - start for first in list(starts)[:1])])
        text, error = [], None
        try:
            while len(text) < most and (
                start in known or lines.bytes_read - begin < plan["most_bytes"]
            ):
                text.append(next(lines))
        except StopIteration:
            pass
        except BadLineError as caught:
            error = caught
        if text:
            owner = None
            if start not in known:
                owner = loads.index(min(loads))
                loads[owner] += lines.bytes_read - begin
            yield _Block(start, len(text), owner, text, lines.bytes_read)
        if error:
            raise error
        if not text:
            return


def _translate(translator, job, block, folder):
    text = translate_block(translator, job, block.lines)
    with whole_file(block.file(folder)) as file:
        file.write("".join(f"{line}\n" for line in text).encode())


class _First:
    """What the first rank does.

    Attributes:
        plan: what all need to know to divide the file in the same way.
    """

    def __init__(self, ranks, output, size):
        self._ranks, self._output = ranks, output
        self._folder, self._size = output.parts.absolute(), size
        ranks.show_folder(self._folder)
        remove_unfinished(self._folder)
        left = max(0, size - output.part.stat().st_size)  # about
        self.plan = {
            "done": output.done,
            "known": self._known(),
            "folder": str(self._folder),
            "most_bytes": max(1, left // (BLOCKS * ranks.size)),
        }

    def _known(self):
        """``[(start, number of lines), ...]`` of blocks that an earlier command has translated and
        not yet appended."""
        known, end = [], self._output.done
        for path in sorted(self._folder.iterdir()):
            if match := re.fullmatch(r"(\d{12})-(\d+)", path.name):
                start, number = map(int, match.groups())
                if start < end:  # is appended
                    path.unlink()
                    continue
                known.append((start, number))
                end = start + number
        return known

    def translate(self, translator, job, blocks):
        waiting, error = deque(), None
        with tqdm(total=self._size, desc="translate", unit="B", unit_scale=True) as bar:
            try:
                for block in blocks:
                    if block.owner == 0:
                        _translate(translator, job, block, self._folder)
                    block.lines = None
                    waiting.append(block)
                    while waiting and waiting[0].file(self._folder).exists():
                        self._append(waiting.popleft(), bar)
            except BadLineError as caught:
                error = caught
            for block in waiting:
                self._wait_for(block)
                self._append(block, bar)
        if error:
            raise error
        self._output.finish()

    def _append(self, block, bar):
        path = block.file(self._folder)
        self._output.append(path.read_bytes())
        path.unlink()
        bar.update(block.end - bar.n)

    def _wait_for(self, block):
        path = block.file(self._folder)
        while not path.exists():
            if self._ranks.asked(SHARE_DONE.format(block.owner)) is not None:
                self._ranks.read_file(path, block.owner)
                return
            self._ranks.check_life(block.owner)
            time.sleep(0.05)
