"""What gates, kinds of experts and arrangements have in common: a name and their own options."""

from dataclasses import dataclass, field, fields
from inspect import get_annotations

from fairseq_smoe.errors import OptionError


def option(default, text):
    """A field of a dataclass of options. The flag is the field's name with hyphens.

    Args:
        default: a str, int, float or bool, of the annotated type.
        text: for ``--help``.
    """
    return field(default=default, metadata={"help": text})


@dataclass
class KindOptions:
    """Options of a kind: a dataclass whose fields are made with :func:`option`."""

    def check(self, strata, options):
        """Refuse wrong options before a model is built.

        Args:
            strata: sizes of the strata.
            options: all options of the model.

        Raises:
            OptionError: names the flag, the value and what would be right.
        """

    def refuse_given(self, chosen, needed):
        """Refuse options of this class that would do nothing, where another kind is chosen. A class
        of the user's own may have them, too.

        Args:
            chosen: name of the kind that is chosen.
            needed: option that would choose this one.

        Raises:
            OptionError: an option of this class does not have its default.
        """
        if ":" in chosen:
            return
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in get_annotations(type(self)) and value != f.default:
                given = "" if value is True else f" {value}"
                raise OptionError(f"--{f.name.replace('_', '-')}{given}: needs {needed}")

    @classmethod
    def of(cls, options):
        """The options of this class, taken from all options of the model. A checkpoint of an earlier
        version may lack some, which take their defaults."""
        return cls(**{f.name: getattr(options, f.name, f.default) for f in fields(cls)})


class Kind:
    """A gate, a kind of experts or an arrangement that can be chosen on the command line.

    Attributes:
        name: chooses a class of this project; a user's own class is chosen by ``module:Class``.
        Options: dataclass of its options.
    """

    name = None
    Options = KindOptions
