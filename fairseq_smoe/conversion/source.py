"""The checkpoint that is converted: its parameters, its options, and its FFN sublayers."""

import re
import shlex
from argparse import Namespace
from dataclasses import dataclass, fields
from pathlib import Path

from fairseq_smoe.checkpoints.description import count_parameters
from fairseq_smoe.checkpoints.gates import describe_gates, gate_sizes
from fairseq_smoe.checkpoints.parts import NAMES, Parted, read_checkpoint, whole
from fairseq_smoe.checkpoints.transform import stripped
from fairseq_smoe.errors import OptionError
from fairseq_smoe.translation.options import SMoETransformerOptions

_LAYER = r"(?P<side>encoder|decoder)\.layers\.(?P<index>\d+)"
_DENSE = re.compile(rf"^{_LAYER}\.fc1\.weight$")
_BLOCK = re.compile(rf"^{_LAYER}\.expert_block(\.block)*$")


@dataclass(frozen=True)
class Sublayer:
    """An FFN sublayer.

    Attributes:
        side: "encoder" or "decoder".
        index: of its layer, from 0.
        name: what the names of its parameters begin with, without the dot at the end: the layer's
            for a dense FFN, else that of the innermost block.
    """

    side: str
    index: int
    name: str

    @property
    def layer(self):
        """Name of the layer, ``encoder.layers.1``."""
        return f"{self.side}.layers.{self.index}"


class Source:
    """A checkpoint in memory, without the optimizer's state. Conversions change it in place.

    Attributes:
        path: its file.
        state: what is written in the end.
        parameters: ``{name: tensor}`` of the model, mapped from the file until they are changed;
            experts in parts are :class:`~fairseq_smoe.checkpoints.parts.Parted` until they are read
            with :meth:`take`.
        options: the model's options as a Namespace; those that an older version did not have are at
            their defaults. Change them with :meth:`set_options`.
        changes: ``{name: value}`` of the options that have been changed.
    """

    def __init__(self, path):
        """Read a checkpoint.

        Raises:
            CheckpointError: it cannot be read.
            OptionError: it is no checkpoint of this project's model.
        """
        self.path = Path(path)
        self.state = read_checkpoint(path)
        for name in ("last_optimizer_state", NAMES):
            self.state.pop(name, None)
        # the mean of the weights belongs to the parameters as they were
        (self.state.get("extra_state") or {}).pop("ema", None)
        self.parameters = self.state["model"]
        self.changes = {}
        recorded = self._recorded_options()
        if not recorded:
            raise OptionError(
                f"{path}: does not say which model it is of; give a whole checkpoint, not a part"
            )
        name = recorded.get("arch") or recorded.get("_name") or "none"
        if not str(name).startswith("smoe_transformer"):
            raise OptionError(
                f"{path}: holds a model of --arch {name}; give one of smoe_transformer"
            )
        self.options = Namespace(
            **{f.name: recorded.get(f.name, f.default) for f in fields(SMoETransformerOptions)}
        )
        if self.options.moefy_experts:
            raise OptionError(
                f"{path}: its FFNs are split into small experts already; give the checkpoint that "
                "it was made from"
            )

    def _recorded_options(self, part="model"):
        cfg = self.state.get("cfg")
        options = (cfg.get(part) if isinstance(cfg, dict) else self.state.get("args")) or {}
        return options if isinstance(options, dict) else vars(options)

    def task_option(self, name):
        """An option of the task, None if it is not recorded."""
        return self._recorded_options("task").get(name)

    def set_task_options(self, **changes):
        """Change options of the task, by their names in the checkpoint."""
        self._recorded_options("task").update(changes)

    def set_options(self, **changes):
        """Change options of the model, by their names in the checkpoint."""
        before = vars(self.options)
        self.changes |= {name: v for name, v in changes.items() if v != before[name]}
        before.update(changes)
        self._recorded_options().update(changes)

    def flags(self):
        """The options that have been changed, as they are given to fairseq-train."""
        words = []
        for name, value in self.changes.items():
            if value is None or value is False:
                continue
            flag = "--" + name.replace("_", "-")
            words += [flag] if value is True else [flag, shlex.quote(str(value))]
        return " ".join(words)

    def take(self, name):
        """A parameter as a tensor; it is mapped from the file if it can be."""
        value = self.parameters[name]
        return value[:] if isinstance(value, Parted) else value

    def shape(self, name):
        """Shape of a parameter."""
        return tuple(self.parameters[name].shape)

    def num_parameters(self):
        """Parameters of the model; shared ones count once."""
        return count_parameters(self.parameters)

    def dense_ffns(self):
        """The dense FFN :class:`Sublayer` s, encoder first."""
        return self._sublayers(self.parameters, _DENSE)

    def blocks(self):
        """The innermost expert blocks as :class:`Sublayer` s, encoder first."""
        return self._sublayers(gate_sizes(self.parameters), _BLOCK)

    @staticmethod
    def _sublayers(names, pattern):
        matches = [match for match in map(pattern.match, names) if match]
        found = [
            Sublayer(m["side"], int(m["index"]), m[0].removesuffix(".fc1.weight")) for m in matches
        ]
        return sorted(found, key=lambda s: (s.side != "encoder", s.index))

    def require_dense(self, kind):
        """Raises:
        OptionError: the model has experts.
        """
        for sizes in gate_sizes(self.parameters).values():
            raise OptionError(
                f"{self.path}: has experts already, {describe_gates(sizes)}; {kind} starts from a "
                "dense model (--moe-freq 0)"
            )

    def require_experts(self, kind):
        """Raises:
        OptionError: the model is dense.
        """
        if not self.blocks():
            raise OptionError(f"{self.path}: is a dense model; {kind} starts from one with experts")

    def result(self):
        """The state to write: a checkpoint in one file."""
        return whole(stripped(self.state))
