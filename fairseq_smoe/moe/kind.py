"""What gates, kinds of experts and arrangements have in common: a name, and options of their own."""

from dataclasses import dataclass, field, fields


def option(default, text):
    """A field of a dataclass of options; its name with hyphens is the flag.

    Args:
        default: a str, int, float or bool, which gives the type where the annotation does.
        text: for ``--help``.
    """
    return field(default=default, metadata={"help": text})


@dataclass
class KindOptions:
    """Options of a kind: a dataclass beside its code, whose fields are made by :func:`option`."""

    def check(self, strata, options):
        """Refuse what cannot work, before a model is built.

        Args:
            strata: sizes of the strata.
            options: all options of the model.

        Raises:
            OptionError: names the flag, the value and what would be right.
        """

    @classmethod
    def of(cls, options):
        """Those among all options of the model; the default where one is missing there, as in a
        checkpoint from before it."""
        return cls(**{f.name: getattr(options, f.name, f.default) for f in fields(cls)})


class Kind:
    """A gate, a kind of experts or an arrangement, as it is chosen on the command line.

    Attributes:
        name: how a kind of this project is chosen. One of the user's own is ``module:Class``.
        Options: dataclass of its options.
    """

    name = None
    Options = KindOptions
