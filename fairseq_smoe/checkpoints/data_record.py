"""What a checkpoint records of its data: the dictionaries, the languages and the language tokens.

A model reads ids. Only with the same dictionary and the same language tokens as in training do they
mean the same.
"""

import logging
from dataclasses import asdict, dataclass

from fairseq_smoe.errors import CheckpointError

logger = logging.getLogger(__name__)

_ENTRY = "data_record"  # in the task's state in a checkpoint
START_ANEW = "or start a new training in an empty --save-dir"


@dataclass(frozen=True)
class DataRecord:
    """What a checkpoint records of its data.

    Attributes:
        dictionaries: ``{language: entries}``, one entry per line in the order of their ids;
            None in checkpoints of earlier versions.
        languages: in their order; None if unknown.
        options: ``{name: value}`` of the task's options that decide on language tokens.
    """

    dictionaries: dict | None
    languages: list | None
    options: dict

    @classmethod
    def of(cls, dictionaries, languages, options):
        """The record of the data at hand.

        Args:
            dictionaries: ``{language: fairseq's Dictionary}``; languages may share one.
            languages, options: see above.
        """
        texts = {id(d): "\n".join(d.symbols) for d in dictionaries.values()}
        return cls(
            {name: texts[id(d)] for name, d in dictionaries.items()}, list(languages), options
        )

    @classmethod
    def in_task_state(cls, state):
        """The record in the task's part of a checkpoint; None if there is none."""
        return cls(**state[_ENTRY]) if _ENTRY in state else None

    def to_task_state(self):
        """The entry of the task's part of a checkpoint."""
        return {_ENTRY: asdict(self)}

    def check(self, current, checkpoint, data):
        """Compare with the record of the data at hand.

        Args:
            current: its record.
            checkpoint, data: how to name the checkpoint and the data folder in messages.

        Raises:
            CheckpointError: names the first difference.
        """
        # the dictionary last, which ends with the language tokens
        if self.languages is not None and self.languages != current.languages:
            raise CheckpointError(
                f"--langs {_shown(current.languages)}: {checkpoint} was trained with "
                f"{_shown(self.languages)}, in this order; leave --langs and --lang-dict out, "
                f"{START_ANEW}"
            )
        for name, value in self.options.items():
            ours = current.options.get(name)
            if _plain(value) != _plain(ours):
                raise CheckpointError(
                    f"--{name.replace('_', '-')} {_shown(ours)}: {checkpoint} was trained with "
                    f"{_shown(value)}; leave the option out, {START_ANEW}"
                )
        if self.dictionaries is None:
            logger.warning(
                f"{checkpoint} does not record its dictionary, as those of earlier versions; it "
                f"could not be compared with that of {data}"
            )
        else:
            self._check_dictionaries(current.dictionaries, checkpoint, data)

    def _check_dictionaries(self, current, checkpoint, data):
        distinct = set(self.dictionaries.values())
        only = distinct.pop() if len(distinct) == 1 else None
        for language, text in current.items():
            trained = self.dictionaries.get(language, only)
            if trained is None or trained == text:
                continue
            ours, theirs = text.split("\n"), trained.split("\n")
            place = next(i for i in range(len(ours) + 1) if ours[i : i + 1] != theirs[i : i + 1])
            raise CheckpointError(
                f"{data}: its dictionary of {language} ({len(ours)} entries) is not the one that "
                f"{checkpoint} was trained with ({len(theirs)} entries): entry {place} is "
                f"{_entry(ours, place)} here, {_entry(theirs, place)} there; give the data folder "
                f"of the training, {START_ANEW}"
            )


def _entry(entries, place):
    return repr(entries[place]) if place < len(entries) else "missing"


def _shown(value):
    """As on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(value) if isinstance(value, list) else value


def _plain(value):
    """A value as it is after being stored: the same for tuples and lists."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value
