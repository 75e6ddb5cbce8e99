"""Files with some sentences of a test set, translated."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fairseq_smoe.files import write_whole


@dataclass(frozen=True)
class Part:
    """Some translated sentences.

    Attributes:
        indices: of the sentences in the test set.
        hypotheses: pieces of each, joined by spaces.
        passes: ``{layer: [sum of passes, number of tokens]}``
        seconds: of translating.
    """

    indices: list
    hypotheses: list
    passes: dict
    seconds: float


@dataclass(frozen=True)
class PartFiles:
    """The parts of one direction, by any command that was stopped.

    Attributes:
        folder: theirs, with those of other directions.
        direction: ``"en-de"``
        key: what the translations depend on; parts with another one are removed.
    """

    folder: Path
    direction: str
    key: str

    def write(self, name, part):
        """Write a part that is complete or absent.

        Args:
            name: no other part may have it, of this command or an earlier one.

        Returns:
            The path of its file.
        """
        path = Path(self.folder) / f"{self.direction}.{name}.json"
        write_whole(path, json.dumps({"key": self.key, **asdict(part)}))
        return path

    def read(self):
        """All parts of this key, by name. No sentence is in two."""
        parts, known = {}, set()
        for path in sorted(Path(self.folder).glob(f"{self.direction}.*.json")):
            facts = json.loads(path.read_text(encoding="utf-8"))
            part = Part(**{name: facts[name] for name in Part.__dataclass_fields__})
            if facts["key"] != self.key or known.intersection(part.indices):
                path.unlink()
                continue
            known.update(part.indices)
            parts[path.name] = part
        return list(parts.values())

    def remove(self):
        for path in Path(self.folder).glob(f"{self.direction}.*.json"):
            path.unlink()
