"""Stacking, a baseline of the paper: plain MoE layers one after another."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.arrangement import Arrangement
from fairseq_smoe.moe.block import SMoEBlock
from fairseq_smoe.moe.kind import KindOptions, option
from fairseq_smoe.moe.selection import select
from fairseq_smoe.moe.strata import format_strata, own_experts


@dataclass
class StackingOptions(KindOptions):
    smoe_stacking: bool = option(
        False, "baseline of the paper: apply the strata as plain MoE layers one after another"
    )

    def check(self, strata, options):
        if not Stacking.is_chosen(options):
            return
        if len(strata) == 1:
            raise OptionError(
                f"--smoe-stacking with --smoe-strata {format_strata(strata)}: stacking needs at "
                "least two strata, e.g. --smoe-strata 4-4"
            )
        if options.smoe_norm != "paper":
            raise OptionError(
                f"--smoe-norm {options.smoe_norm} with --smoe-stacking: stacked layers have only "
                "one LayerNorm; drop --smoe-norm"
            )
        if getattr(options, "smoe_pass_scale", None) is not None:
            raise OptionError(
                f"--smoe-pass-scale {options.smoe_pass_scale} with --smoe-stacking: stacked layers "
                "have no residual between them, so a small factor would shut the token out; drop "
                "--smoe-pass-scale"
            )


class Stacking(Arrangement):
    """``--smoe-stacking``: stacked blocks instead of stratified ones."""

    name = "stacking"
    Options = StackingOptions

    @classmethod
    def is_chosen(cls, options):
        return options.smoe_stacking or super().is_chosen(options)

    @classmethod
    def arrange(cls, make_block, embed_dim, ffn_dim, options, **ffn_options):
        return make_block(embed_dim, ffn_dim, block_class=StackedMoEBlock)


class StackedMoEBlock(SMoEBlock):
    """Stacking: L vanilla MoE layers in a row (paper, section 4.1).

    There is one LayerNorm before the first layer and one residual around all of them, with nothing
    between the layers. Every token visits every layer, so its requested capacity is always L.
    """

    def expected_visits(self):
        return [1.0] * len(self.strata)

    def places(self, stats):
        return [list(range(stats.passes.numel()))] * len(self.strata)

    def _visible_experts(self):
        return own_experts(self.strata)

    def _num_norms(self):
        return 1

    def _run(self, tokens_TD, real_T, key_T=None):
        shared = self.experts.share(tokens_TD.dtype)
        here = select(tokens_TD, real_T, may_wait=shared.waits)
        x_HD = here.take(tokens_TD)
        key_H = None if key_T is None else here.take(key_T)
        y_HD = self.norms[0](x_HD)
        gates, losses = [], []
        for i in range(len(self.strata)):
            y_HD, record, own_losses = self._visit(y_HD, i, shared, here.mask_H, key_H)
            gates.append(record)
            losses.append(own_losses)
        out_HD = x_HD + F.dropout(y_HD, self.dropout, self.training)
        passes_T = torch.zeros(len(tokens_TD), dtype=torch.long, device=tokens_TD.device)
        passes_T = here.put(passes_T, here.take(passes_T) + len(self.strata))
        return here.put(tokens_TD, out_HD), passes_T, gates, losses
