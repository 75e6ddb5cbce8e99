"""Which versions are installed, and which have been tested."""

import platform
from dataclasses import dataclass
from importlib import metadata

import fairseq_smoe

# beginnings of the versions that the tests have run with; docs/install.md names the same
TESTED = {
    "python": ("3.11.", "3.12."),
    "torch": ("2.13.",),
    "fairseq": ("0.12.3",),
    "hydra-core": ("1.3.",),
    "numpy": ("2.4.", "2.5."),
    "sacrebleu": ("2.6.",),
    "sentencepiece": ("0.2.3",),
    "fairscale": ("0.4.13",),
}
FAIRSEQ = ("ve-fairseq", "fairseq-fixed")  # distributions that bring the package fairseq


@dataclass(frozen=True)
class Installed:
    """A package.

    Attributes:
        version: None if it is not installed.
        tested: beginnings of the versions that have been tested; () if that does not matter.
    """

    name: str
    version: str | None
    tested: tuple

    @property
    def is_tested(self):
        return not self.tested or (self.version or "").startswith(self.tested)


def installed_software():
    """A list of :class:`Installed`: this package, Python, and what both need."""
    found = [
        Installed("fairseq-smoe", fairseq_smoe.__version__, ()),
        Installed("python", platform.python_version(), TESTED["python"]),
    ]
    for name, tested in TESTED.items():
        if name != "python":
            names = FAIRSEQ if name == "fairseq" else (name,)
            versions = [version for version in map(_version, names) if version]
            found.append(Installed(name, versions[0] if versions else None, tested))
    return found


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
