"""Gates that change the experts of their block between updates, in a training of any number of
processes. See :meth:`~fairseq_smoe.moe.gate.Gate.after_update`."""

import torch
import torch.distributed as dist
from fairseq.logging import metrics

from fairseq_smoe.errors import OptionError
from fairseq_smoe.translation.layers import expert_layers


class ChangingExperts:
    """Adds up what the gates of a model count, over processes and updates, and lets them change the
    experts after an update. Does nothing if the gates count nothing.

    Args:
        model: an ``SMoETransformer``.
        num_processes: of the training.
    """

    def __init__(self, model, num_processes):
        layers = [layer for _, layer in expert_layers(model)]
        self._layers = [layer for layer in layers if counting_gates(layer)]
        self._gates = [gate for layer in self._layers for gate in layer.routed_block.gates]
        self._num_processes = num_processes
        self._recording = False
        self._alive = None  # experts of a block, a mean

    def before_update(self, update):
        """Prepare for an update, numbered from 1."""
        self._recording = any(gate.records(update) for gate in self._gates)
        for layer in self._layers:
            layer.counts = []

    def before_batch(self, counts):
        """Prepare for a batch.

        Args:
            counts: False if it is processed only to keep step with other processes.
        """
        for gate in self._gates:
            gate.recording = self._recording and counts

    @torch.no_grad()
    def after_update(self, update, optimizer):
        """Every process has to call this after a step of the optimizer. After a step that was
        skipped it must not be called; what was counted for that is dropped.

        Args:
            update: its number.
            optimizer: fairseq's.
        """
        if not self._layers:
            return
        if self._recording:
            self._add_counts()
        for layer in self._layers:
            block = layer.routed_block
            begin_anew(optimizer, type(block.gates[0]).after_update(block, update))
        if self._recording or self._alive is None:  # the host waits for the device
            alive = [sum(layer.routed_block.num_alive()) for layer in self._layers]
            self._alive = sum(alive) / len(alive)
        with metrics.aggregate("train"):
            metrics.log_scalar("live_experts", self._alive, weight=0, round=2)

    def _add_counts(self):
        """Add what was counted on all processes for this update to the gates' buffers."""
        sums = []
        for layer in self._layers:
            of_gates = [torch.zeros_like(gate.counts) for gate in layer.routed_block.gates]
            for counted in layer.counts:
                for total, counts in zip(of_gates, counted):
                    total += counts
            layer.counts = []
            sums += of_gates
        added = torch.cat(sums)
        if self._num_processes > 1:
            dist.all_reduce(added)
        for gate, counts in zip(self._gates, added.split([len(counts) for counts in sums])):
            gate.counts += counts


def counting_gates(layer):
    return [gate for gate in layer.routed_block.gates if gate.counts is not None]


@torch.no_grad()
def begin_anew(optimizer, rows):
    """Write new values into rows of parameters, and zero what the optimizer keeps of these rows.

    Args:
        optimizer: fairseq's, in any precision.
        rows: list of :class:`~fairseq_smoe.moe.pool.NewRow`
    """
    halves = getattr(optimizer, "fp16_params", ())  # of them it has copies in full precision
    copies = dict(zip(halves, getattr(optimizer, "fp32_params", ())))
    for new in rows:
        stepped = copies.get(new.parameter, new.parameter)
        for parameter in (new.parameter, stepped) if new.value is not None else ():
            parameter[new.row] = new.value.to(parameter)
        for kept in optimizer.optimizer.state.get(stepped, {}).values():
            if isinstance(kept, torch.Tensor) and kept.shape == stepped.shape:
                kept[new.row] = 0


def check_options(cfg, model):
    """Refuse options that do not work with gates that change experts.

    Raises:
        OptionError: names the options.
    """
    if not any(counting_gates(layer) for _, layer in expert_layers(model)):
        return
    training, optimizer = cfg.distributed_training, getattr(cfg.optimizer, "_name", None)
    for option, chosen, remedy in (
        ("--ddp-backend fully_sharded", training.ddp_backend == "fully_sharded", "pytorch_ddp"),
        ("--ddp-backend slowmo", training.ddp_backend == "slowmo", "pytorch_ddp"),
        ("--zero-sharding os", training.zero_sharding == "os", "none"),
        ("--optimizer adafactor", optimizer == "adafactor", "adam"),
        ("--use-bmuf", cfg.optimization.use_bmuf, None),
    ):
        if chosen:
            raise OptionError(
                f"{option} with --moe-gate {cfg.model.moe_gate}, whose experts come and go: not "
                f"possible; {'take ' + remedy if remedy else 'leave it out'}"
            )
