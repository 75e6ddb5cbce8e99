"""Label-smoothed cross entropy plus the losses that train the routing."""

import math
from dataclasses import dataclass, field

import torch
from fairseq import utils
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.logging import metrics

from fairseq_smoe.errors import NonFiniteGateError, OptionError
from fairseq_smoe.moe.gate import BALANCE_LOSS
from fairseq_smoe.translation.chunked_loss import TargetLoss
from fairseq_smoe.translation.layers import expert_layers
from fairseq_smoe.translation.routing_metrics import GATE_METRICS, routing_metrics

COMBINE_METHODS = ("average", "sum")
GATE_LOSS = "gate_loss:"  # prefix of a loss's name in what a batch logs


@dataclass
class MoELabelSmoothedCrossEntropyConfig(LabelSmoothedCrossEntropyCriterionConfig):
    moe_gate_loss_wt: float = field(
        default=0.01, metadata={"help": "weight alpha of the balance loss"}
    )
    moe_gate_loss_combine_method: str = field(
        default="average",
        metadata={"help": "'average' or 'sum': how the losses of the expert layers are combined"},
    )
    cmr_gate_loss_wt: float = field(
        default=0.01, metadata={"help": "with --moe-cmr: weight of the budget loss"}
    )
    cmr_gate_loss_p: float = field(
        default=0.8,
        metadata={"help": "with --moe-cmr: budget, the mean gate value that the loss aims for"},
    )
    chunked_loss: int = field(
        default=0,
        metadata={
            "help": "save memory: compute logits, loss and their gradients for this many target "
            "tokens at a time, e.g. 256 (default: 0, all at once)"
        },
    )


@register_criterion(
    "moe_label_smoothed_cross_entropy", dataclass=MoELabelSmoothedCrossEntropyConfig
)
class MoELabelSmoothedCrossEntropy(LabelSmoothedCrossEntropyCriterion):
    """Translation loss + alpha * balance loss (paper, section 3.2) + weight * |mean gate - p| (CMR).

    Other losses that a gate returns are added with the gate's weights, and logged by name.

    The balance loss is a mean over tokens, the translation loss a sum. The balance loss is
    therefore multiplied by the sample size, so that its weight is still alpha after fairseq has
    divided the total by the sample size. A model without expert layers trains as with
    ``label_smoothed_cross_entropy``.
    """

    def __init__(
        self,
        task,
        sentence_avg,
        label_smoothing,
        ignore_prefix_size=0,
        report_accuracy=False,
        moe_gate_loss_wt=0.01,
        moe_gate_loss_combine_method="average",
        cmr_gate_loss_wt=0.01,
        cmr_gate_loss_p=0.8,
        chunked_loss=0,
    ):
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        if moe_gate_loss_combine_method not in COMBINE_METHODS:
            raise OptionError(
                f"--moe-gate-loss-combine-method {moe_gate_loss_combine_method}: "
                f"expected {' or '.join(COMBINE_METHODS)}"
            )
        if not 0 <= cmr_gate_loss_p <= 1:
            raise OptionError(f"--cmr-gate-loss-p {cmr_gate_loss_p}: expected a fraction, 0 to 1")
        if chunked_loss < 0:
            raise OptionError(f"--chunked-loss {chunked_loss}: expected 0 (off) or more tokens")
        self.chunk = chunked_loss
        self.gate_loss_weight = moe_gate_loss_wt
        self.average_gate_losses = moe_gate_loss_combine_method == "average"
        self.budget_weight = cmr_gate_loss_wt
        self.budget = cmr_gate_loss_p
        self.directions = getattr(task, "lang_pairs", [])

    def forward(self, model, sample, reduce=True):
        """Loss of one batch.

        Returns:
            ``(loss, sample_size, logging_output)`` as every fairseq criterion. The loss is a
            scalar, summed over tokens (with --sentence-avg, over sentences).

        Raises:
            NonFiniteGateError: a gate produced NaN or infinity.
            OptionError: --chunked-loss with a model that cannot compute its loss itself.
        """
        if self.chunk and reduce:
            sample = self._with_loss_in_model(model, sample)
        loss, sample_size, logging_output = super().forward(model, sample, reduce)
        for name in ("direction_nll", "direction_ntokens"):
            if name in sample:
                values = sample.pop(name).unbind()  # fairseq may use a batch again
                logging_output.update(
                    {f"{name}_{pair}": value for pair, value in zip(self.directions, values)}
                )
        stats = take_routing_stats(model)
        if not stats:
            return loss, sample_size, logging_output
        routing_loss = 0
        for name, (weight, loss_L) in self._gate_losses(stats).items():
            check_finite(loss_L, stats)
            gate_loss = loss_L.mean() if self.average_gate_losses else loss_L.sum()
            routing_loss = routing_loss + weight * gate_loss
            logging_output[GATE_LOSS + name] = gate_loss.detach() * sample_size

        gates = [s.shared_weight for s in stats.values() if s.shared_weight is not None]
        if gates:
            mean_gate = torch.cat(gates).sum() / max(sum(map(len, gates)), 1)
            routing_loss = routing_loss + self.budget_weight * (mean_gate - self.budget).abs()
            logging_output["cmr_gate_mean"] = mean_gate.detach() * sample_size
        loss = loss + sample_size * routing_loss.to(loss.dtype)
        logging_output["loss"] = loss.detach()
        logging_output.update(routing_metrics(stats))
        return loss, sample_size, logging_output

    def _with_loss_in_model(self, model, sample):
        """A copy of a batch, for which the model returns losses instead of logits."""
        if not getattr(model, "computes_loss", False):
            raise OptionError(
                f"--chunked-loss {self.chunk}: needs --arch smoe_transformer or one of its sizes; "
                "leave it out"
            )
        loss = TargetLoss(
            sample["target"],
            self.padding_idx,
            self.ignore_prefix_size,
            self.eps,
            self.chunk,
            find_correct=self.report_accuracy,
        )
        return {**sample, "net_input": {**sample["net_input"], "loss": loss}}

    def _gate_losses(self, stats):
        """``{name: (weight, loss_L)}``, with the losses of the L expert layers that have this
        loss."""
        weights, losses = {BALANCE_LOSS: self.gate_loss_weight}, {}
        for of_layer in stats.values():
            weights |= of_layer.loss_weights
            for name, loss in of_layer.losses.items():
                losses.setdefault(name, []).append(loss.float())
        return {name: (weights[name], torch.stack(of_layers)) for name, of_layers in losses.items()}

    def compute_loss(self, model, net_output, sample, reduce=True):
        """As the parent's; in validation also stores the sums of each direction in ``sample``."""
        computed = sample["net_input"].get("loss")
        by_direction = "direction" in sample and not model.training
        if computed is not None:
            loss, nll_T, _ = net_output[0]
            if by_direction:
                self._store_by_direction(sample, *computed.by_place(nll_T))
            return loss, nll_T.sum()
        if by_direction:
            lprobs, target = self.get_lprobs_and_target(model, net_output, sample)
            nll = -lprobs.gather(1, target.unsqueeze(1)).squeeze(1)
            self._store_by_direction(sample, nll, target.ne(self.padding_idx))
        return super().compute_loss(model, net_output, sample, reduce)

    def _store_by_direction(self, sample, nll, has_loss):
        sample["direction_nll"], sample["direction_ntokens"] = nll_per_direction(
            nll, has_loss, sample["direction"], len(self.directions)
        )

    def compute_accuracy(self, model, net_output, sample):
        if sample["net_input"].get("loss") is None:
            return super().compute_accuracy(model, net_output, sample)
        correct_T = net_output[0][2]
        return correct_T.sum(), torch.tensor(len(correct_T))

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Aggregate what the batches of all processes logged."""
        super().reduce_metrics(logging_outputs)

        def total(name):
            return utils.item(sum(log.get(name, 0) for log in logging_outputs))

        for name in sorted(set().union(*logging_outputs)):
            if name.startswith("direction_nll_") and (
                tokens := total(name.replace("_nll_", "_ntokens_", 1))
            ):
                pair = name[len("direction_nll_") :]
                bits = total(name) / tokens / math.log(2)
                metrics.log_scalar(f"nll_loss_{pair}", bits, tokens, priority=5000, round=3)
        sample_size = total("sample_size")
        for key in dict.fromkeys(key for log in logging_outputs for key in log):
            if key.startswith(GATE_LOSS) or key == "cmr_gate_mean":
                name = key.removeprefix(GATE_LOSS)
                metrics.log_scalar(name, total(key) / (sample_size or 1), sample_size, round=3)
        gates = total("routing_gates")
        if gates:
            for name in GATE_METRICS:
                metrics.log_scalar(name, total(name) / gates, gates, round=2)
        for side in ("encoder", "decoder"):
            for name, sums, counts in (
                ("requested_capacity", "passes", "routed"),
                ("experts_per_token", "visits", "tokens"),
            ):
                if number := total(f"{side}_{counts}"):
                    mean = total(f"{side}_{sums}") / number
                    metrics.log_scalar(f"{side}_{name}", mean, number, round=3)


def take_routing_stats(model):
    """``{layer name: BlockStats}`` of the last forward pass. They are removed from the layers, so
    that their graph can be freed."""
    stats = {}
    for name, layer in expert_layers(model):
        if layer.routing_stats is not None:
            name = name.replace("module.", "")  # from the data-parallel wrapper
            stats[name], layer.routing_stats = layer.routing_stats, None
    return stats


def nll_per_direction(nll, has_loss, direction_B, num_directions):
    """Sum of -log p(target) and number of target tokens of every translation direction.

    Args:
        nll: (B * S,) -log p of target tokens.
        has_loss: (B * S,) bool, False at padding.
        direction_B: direction of each sentence.

    Returns:
        Two (num_directions,) float tensors: sums in nats, and counts.
    """
    direction = direction_B.repeat_interleave(len(nll) // len(direction_B))
    zeros = nll.new_zeros(num_directions)
    return (
        zeros.index_add(0, direction, nll * has_loss),
        zeros.index_add(0, direction, has_loss.to(zeros.dtype)),
    )


def check_finite(balance, stats):
    """Stop at the first NaN or infinity instead of training with meaningless routing.

    Raises:
        NonFiniteGateError: names the layer and the stratum.
    """
    if torch.isfinite(balance).all():
        return
    for name, layer_stats in stats.items():
        for i, record in enumerate(layer_stats.gates):
            if not torch.isfinite(record.scores_TE).all():
                raise NonFiniteGateError(
                    f"{name}: the gate of stratum {i + 1} gave NaN or infinity; training stopped. "
                    "Resume from the last checkpoint with a lower --lr, more --warmup-updates, or "
                    "--clip-norm"
                )
