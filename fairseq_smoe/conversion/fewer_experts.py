"""Making a model with fewer experts: those that are alike are grouped, and each group is merged
(Zhang et al. 2024, arXiv 2407.09590)."""

from copy import copy

import numpy as np
import torch

from fairseq_smoe.conversion.alignment import align
from fairseq_smoe.conversion.experts_on_text import look_at
from fairseq_smoe.conversion.grouping import MOST, group, score
from fairseq_smoe.conversion.learned_weights import PARTS, block_inputs, learn_weights
from fairseq_smoe.conversion.merging import Layout, Merger
from fairseq_smoe.conversion.report import Report
from fairseq_smoe.conversion.similarity import weight_similarity
from fairseq_smoe.conversion.text import Text
from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.doors import chosen_arrangements, pool_of
from fairseq_smoe.moe.strata import format_strata
from fairseq_smoe.translation.layers import build_expert_block
from fairseq_smoe.translation.options import resolve_strata

# kind of experts -> their stacked parameters: weights and biases of the two layers
LAYERS = {
    "ffn": ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"),
    "adapter": ("down_weight", None, "up_weight", None),
}
GATES = ("top-k", "threshold", "top-any")
UNITS = {
    "outputs": "linear CKA of the outputs",
    "weights": "minus the mean squared difference of the weights",
    "surrogate": "minus the mean squared difference of W1 W2",
}


def merge_experts(source, args):
    """Merge the experts of all blocks.

    Args:
        source: :class:`~fairseq_smoe.conversion.source.Source`; is changed.
        args: options of ``commands/convert/merge_experts.py``; ``strata`` are those afterwards.

    Returns:
        :class:`~fairseq_smoe.conversion.report.Report`

    Raises:
        OptionError: the model cannot be converted so.
    """
    before, after, changes = _layouts(source, args)
    parameters = source.num_parameters()
    blocks = source.blocks()
    text, seen = None, {}
    if args.similarity == "outputs" or args.merge != "mean":
        text = Text(source.path, args)
        seen = look_at(text, [block.name for block in blocks], args.similarity == "outputs")
    merged = []
    for block in blocks:
        merged.append(_BlockMerger(source, block, before, after, args, seen.get(block.name)))
        merged[-1].merge(text, changes)
    source.set_options(**changes)
    sizes = {"before": parameters, "after": source.num_parameters()}
    return _report(source, args, (before, after), text, sizes, merged)


def _layouts(source, args):
    """The :class:`Layout` before and after, and the options of the model that change."""
    source.require_experts("merge-experts")
    options = source.options
    for flag, value, known in (
        ("--moe-experts", options.moe_experts, tuple(LAYERS)),
        ("--moe-gate", options.moe_gate, GATES),
    ):
        if value not in known:
            raise OptionError(
                f"{source.path}: was trained with {flag} {value}; the mean of such "
                f"{'experts' if flag == '--moe-experts' else 'gates'} is not defined, only of "
                f"{' and '.join(known)}"
            )
    if ":" in (options.moe_arrangement or ""):
        raise OptionError(
            f"{source.path}: was trained with --moe-arrangement {options.moe_arrangement}; "
            "merge-experts takes the project's own arrangements only"
        )
    if args.gate_bias and options.moe_gate == "top-any":
        raise OptionError(
            f"--gate-bias: {source.path} was trained with --moe-gate top-any, whose scores are no "
            "probabilities; leave it out"
        )
    pool = pool_of(options, resolve_strata(options))
    if len(args.strata) != len(pool):
        given = "--strata" if args.experts is None else "--experts"
        raise OptionError(
            f"{given} {format_strata(args.strata)}: {source.path} has {len(pool)} "
            f"{'stratum' if len(pool) == 1 else 'strata'}, {format_strata(pool)}, whose number "
            f"stays; give --strata with {len(pool)} numbers"
        )
    if any(new > old for new, old in zip(args.strata, pool)):
        raise OptionError(
            f"--strata {format_strata(args.strata)}: {source.path} has {format_strata(pool)} "
            "experts; expected at most as many in each stratum"
        )
    stacked = any(kind.name == "stacking" for kind in chosen_arrangements(options))
    layouts = Layout(pool, stacked), Layout(args.strata, stacked)
    return *layouts, _changes(options, args)


def _changes(options, args):
    """The options of the model that change, with their new values."""
    split, strata = options.moe_ffn_split, args.strata
    changes = {}
    if any(size % split for size in strata):
        widths = {options.encoder_ffn_embed_dim, options.decoder_ffn_embed_dim} - {None}
        widths = {options.moe_ffn_dim} if options.moe_ffn_dim else widths
        if len(widths) > 1:
            raise OptionError(
                f"--strata {format_strata(strata)}: the model has --moe-ffn-split {split} and FFNs "
                f"of different widths in encoder and decoder; give multiples of {split}"
            )
        changes |= {"moe_ffn_split": 1, "moe_ffn_dim": widths.pop() // split}
        split = 1
    changes["smoe_strata"] = format_strata([size // split for size in strata])
    if options.moe_expert_count is not None:
        changes["moe_expert_count"] = None
    if options.moe_max_experts:
        changes["moe_max_experts"] = 0
    if options.moe_expert_parallel_size and sum(strata) % options.moe_expert_parallel_size:
        changes["moe_expert_parallel_size"] = None
    if args.gate_bias:
        changes["moe_gate_bias"] = True
    return changes


class _BlockMerger:
    """One block of the model, and how it is merged.

    Args:
        seen: :class:`~fairseq_smoe.conversion.experts_on_text.BlockOnText`, or None.
    """

    def __init__(self, source, block, before, after, args, seen):
        self.source, self.block, self.args, self.seen = source, block, args, seen
        prefix = f"{block.name}."
        self.state = {
            name.removeprefix(prefix): source.take(name)
            for name in source.parameters
            if name.startswith((f"{prefix}gates.", f"{prefix}experts."))
        }
        layers = LAYERS[source.options.moe_experts]
        self.names = [name and f"experts.{name}" for name in layers]
        alive_E = self._alive(before)
        self.similarity, groups, self.score = [], [], []
        for s, (own, number) in enumerate(zip(before.own, after.strata)):
            live = [e for e in own if alive_E[e]]
            places = [e - own.start for e in live]
            similarity = self._similarity(s, own)[np.ix_(places, places)]
            found = group(similarity, min(number, len(live)))
            # dead experts keep the room that the live ones leave
            dead = [[e] for e in own if not alive_E[e]][: number - len(found)]
            groups += [[live[i] for i in members] for members in found] + dead
            self.similarity.append((live, similarity))
            self.score.append(score(similarity, found))
        self.merger = Merger(before, after, groups, args.gate_bias)
        self.learned = None

    def _alive(self, layout):
        alive_E = torch.ones(sum(layout.strata), dtype=torch.bool)
        for i, visible in enumerate(layout.visible):
            own = self.state.get(f"gates.{i}.alive_E")
            if own is not None:
                alive_E[visible.start : visible.stop] = own
        return alive_E

    def _layers(self):
        return [name and self.state[name] for name in self.names]

    def _similarity(self, stratum, own):
        if self.args.similarity == "outputs":
            return self.seen.similarity[stratum]
        tensors = [name and self.state[name][own.start : own.stop] for name in self.names]
        return weight_similarity(tensors, self.args.similarity == "surrogate")

    def merge(self, text, changes):
        """Put the merged parameters into the source."""
        groups, merger = self.merger.groups, self.merger
        if self.args.align:
            references = merger.most_visited(self.seen.visits_E) if self.seen else None
            references = references or [members[0] for members in groups]
            tensors = align(self._layers(), groups, references)
            self.state |= {name: tensor for name, tensor in zip(self.names, tensors) if name}
        self.weights_GE = self._weights(text, changes)
        merged = merger.apply(self.state, self.weights_GE)
        for name, tensor in merged.items():
            self.source.parameters[f"{self.block.name}.{name}"] = tensor
        self.state = None

    def _weights(self, text, changes):
        how, merger = self.args.merge, self.merger
        if how == "frequency":
            return merger.visit_weights(self.seen.visits_E)
        weights_GE = merger.equal_weights()
        if how == "most-visited":
            for weights_E, e in zip(weights_GE, merger.most_visited(self.seen.visits_E)):
                weights_E.zero_()[e] = 1
        if how == "learned" and any(len(members) > 1 for members in merger.groups):
            self.learned = self._learn(text, changes)
            return self.learned.weights_GE.double().cpu()
        return weights_GE

    def _learn(self, text, changes):
        parts = text.dealt(PARTS)
        if len(parts) < 2:
            raise OptionError(
                f"--subset {self.args.subset}: has too few sentences to learn from; expected 2 or "
                "more"
            )
        cfg = copy(text.model.cfg)
        vars(cfg).update(changes, strata=self.merger.after.strata)
        smaller = build_expert_block(cfg, self.block.side)
        while hasattr(smaller, "block"):
            smaller = smaller.block
        inputs = [block_inputs(part, self.block.name) for part in parts]
        return learn_weights(
            text.model.get_submodule(self.block.name),
            smaller.to(inputs[0]).eval(),
            self.state,
            self.merger,
            inputs,
            self.args.epochs,
            self.args.learning_rate,
        )

    # ----------------------------------------------------------------------------------
    # the report, with experts numbered from 1

    def facts(self):
        groups = self.merger.groups
        facts = {
            "block": self.block.layer,
            "groups": [[e + 1 for e in members] for members in groups],
            "weights": [
                [round(float(weights_E[e]), 6) for e in members]
                for weights_E, members in zip(self.weights_GE, groups)
            ],
            "strata": [
                {
                    "experts": [e + 1 for e in live],
                    "similarity": np.round(similarity, 6).tolist(),
                    "score": round(score, 6),
                    "search": "all partitions" if len(live) <= MOST else "average linkage",
                }
                for (live, similarity), score in zip(self.similarity, self.score)
            ],
        }
        if self.seen:
            facts |= {"tokens": self.seen.num_tokens, "visits": self.seen.visits_E.tolist()}
        if self.learned:
            facts["error"] = {
                "equal weights": round(self.learned.equal_error, 6),
                "learned": round(self.learned.error, 6),
                "epoch": self.learned.epoch,
            }
        return facts

    def line(self):
        groups = " ".join("+".join(str(e + 1) for e in members) for members in self.merger.groups)
        line = f"{self.block.layer}: {groups}"
        if self.learned:
            line += (
                f" (error {self.learned.error:.4f}, with equal weights "
                f"{self.learned.equal_error:.4f})"
            )
        return line


def _report(source, args, layouts, text, sizes, merged):
    strata = [format_strata(layout.strata) for layout in layouts]
    facts = {
        "conversion": "merge-experts",
        "from": str(source.path),
        "strata": dict(zip(("before", "after"), strata)),
        "parameters": sizes,
        "similarity": args.similarity,
        "merge": args.merge,
        "align": args.align,
        "gate bias": args.gate_bias,
        "blocks": [block.facts() for block in merged],
    }
    if text is not None:
        facts["text"] = {"subset": args.subset, "sentences": text.num_sentences}

    def draw(path):
        from fairseq_smoe.plots.expert_groups import plot_groups

        panels = [(block.block.layer, block.similarity, block.merger.groups) for block in merged]
        title = f"Experts, {strata[0]} merged into {strata[1]}"
        plot_groups(panels, title, path, UNITS[args.similarity])

    lines = [
        *(block.line() for block in merged),
        f"strata {strata[0]} -> {strata[1]}, parameters {sizes['before']:,} -> {sizes['after']:,}",
    ]
    return Report(facts, lines, {"groups": draw})
