"""RUN/evaluation/SUBSET: the translations of each direction, with checkpoint and settings."""

import json
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation.scoring import SCORES_FILE
from fairseq_smoe.evaluation.test_set import to_text
from fairseq_smoe.files import only_process_in, remove_unfinished, write_whole

TEXT_FILES = ("hyp.pieces", "hyp.txt", "ref.pieces", "ref.txt", "src.txt")


@dataclass(frozen=True)
class EvaluationFolder:
    """The folder of translations; each direction is complete or absent.

    ``{direction}.json`` is written last. A direction is done if this file exists with the same
    ``origin``, and all files have the right number of lines.

    Attributes:
        path: the folder.
        origin: ``{"checkpoint": ..., "settings": ...}`` that a translation has to come from.
    """

    path: Path
    origin: dict

    @contextmanager
    def for_this_process_alone(self):
        """Lock the folder.

        Raises:
            OptionError: another process holds it.
        """
        with ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OptionError(
                    f"{self.path}: {error.strerror}; translations are written there"
                ) from error
            try:
                stack.enter_context(only_process_in(self.path))
            except OptionError as error:
                raise OptionError(
                    f"{self.path}: another process evaluates there; wait for it or stop it"
                ) from error
            remove_unfinished(self.path)
            yield

    def is_done(self, test_set, sentences):
        """Whether a direction is done. Prints the reason if it was translated, but differently."""
        facts = self._facts(test_set.direction)
        if facts is None:
            return False
        wanted = {**self.origin, "test_set": test_set.fingerprint(), "sentences": sentences}
        for key, value in wanted.items():
            if facts.get(key) != value:
                say(
                    f"{self.path}: {test_set.direction} is translated again: "
                    f"not the same {key.replace('_', ' ')} as the last time"
                )
                return False
        for ending in TEXT_FILES:
            path = self._file(test_set.direction, ending)
            found = path.read_bytes().count(b"\n") if path.exists() else 0
            if found != sentences:
                say(
                    f"warning: {path}: {found} lines, expected {sentences}; "
                    f"{test_set.direction} is translated again"
                )
                return False
        return True

    def forget(self, direction):
        """Mark a direction as not done, and remove the scores of the folder."""
        # the scores first: if killed in between, they must not stay beside other translations
        for name in (SCORES_FILE, f"{direction}.json"):
            (self.path / name).unlink(missing_ok=True)

    def forget_others(self, directions):
        """Mark other directions as not done if they are of another origin: scores must not mix
        them."""
        for path in self.path.glob("*-*.json"):
            facts = self._facts(path.stem)
            if path.stem not in directions and facts is not None:
                if any(facts.get(key) != value for key, value in self.origin.items()):
                    say(f"{path}: of another checkpoint or with other settings; removed")
                    self.forget(path.stem)

    def write(self, test_set, translation):
        """Write the files of a direction.

        Args:
            translation: :class:`~fairseq_smoe.evaluation.translator.Translation`
        """
        sources, references, unknown = test_set.texts(translation.sources, translation.references)
        if unknown:
            say(
                f"warning: {test_set.target}.txt: no such text; the references of "
                f"{test_set.direction} are put together from pieces, {unknown} of them unknown"
            )
        contents = (
            translation.hypotheses,
            [to_text(pieces) for pieces in translation.hypotheses],
            translation.references,
            references,
            sources,
        )
        for ending, lines in zip(TEXT_FILES, contents, strict=True):
            text = "".join(f"{line}\n" for line in lines)
            write_whole(self._file(test_set.direction, ending), text)
        facts = {
            "direction": test_set.direction,
            "sentences": len(translation.hypotheses),
            "seconds": round(translation.seconds, 3),
            **self.origin,
            "test_set": test_set.fingerprint(),
            "requested_capacity": translation.requested_capacity,
        }
        write_whole(self._file(test_set.direction, "json"), json.dumps(facts, indent=1) + "\n")

    def _file(self, direction, ending):
        return self.path / f"{direction}.{ending}"

    def _facts(self, direction):
        try:
            facts = json.loads(self._file(direction, "json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return facts if isinstance(facts, dict) else None


def say(line):
    """Print a line, above the progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)
