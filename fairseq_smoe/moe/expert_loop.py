"""Both layers of the experts, computed expert by expert.

Letters in names: N rows sorted by expert, M rows of one expert, D model dim, F hidden dim.
"""

import torch
import torch.nn.functional as F


def expert_loop(rows_ND, rows_per_expert, fc1, fc2, experts, activate, widths=None):
    """Apply each expert to its run of rows.

    The computation goes expert by expert, so that a run's hidden units are still in the cache for
    the second layer. The whole loop is a single autograd function: one node per expert would cost
    more time than products of few rows.

    Args:
        rows_ND: rows sorted by expert.
        rows_per_expert: length of each run.
        fc1, fc2: :class:`~fairseq_smoe.moe.shared_weight.SharedWeight` of the layers.
        experts: ``range`` of the experts that the runs belong to.
        activate: function between the layers; ``F.relu`` itself is applied in place.
        widths: for each expert in the weights, how many of the first hidden units it has; None if
            all experts have all. The others are not computed.

    Returns:
        (N, D)
    """
    busy, stop = [], 0
    for e, num_rows in zip(experts, rows_per_expert):
        start, stop = stop, stop + num_rows
        if num_rows:
            busy.append((e, slice(start, stop), None if widths is None else widths[e]))
    weights = fc1.weight_EIO, fc1.bias_EO, fc2.weight_EIO, fc2.bias_EO
    gradients = fc1.gradients, fc2.gradients
    return _ExpertLoop.apply(rows_ND, *weights, gradients, busy, activate, torch.is_grad_enabled())


class _ExpertLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND, w1_EDF, b1_EF, w2_EFD, b2_ED, gradients, busy, activate, keep):
        out_ND = torch.empty_like(rows_ND)
        kept = []
        for e, run, width in busy:
            w1_DF, b1_F, w2_FD = w1_EDF[e], b1_EF[e], w2_EFD[e]
            if width is not None:
                w1_DF, b1_F, w2_FD = w1_DF[:, :width], b1_F[:width], w2_FD[:width]
            hidden_MF = before_MF = torch.addmm(b1_F, rows_ND[run], w1_DF)
            if activate is F.relu:
                hidden_MF.relu_()
            else:
                with torch.set_grad_enabled(keep):
                    hidden_MF = activate(before_MF.requires_grad_(keep)).to(before_MF.dtype)
            torch.addmm(b2_ED[e], hidden_MF, w2_FD, out=out_ND[run])
            if keep:
                kept += [before_MF, hidden_MF]
        ctx.save_for_backward(rows_ND, w1_EDF, w2_EFD, *kept)
        ctx.rest = gradients, busy, activate
        return out_ND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_ND):
        rows_ND, w1_EDF, w2_EFD, *kept = ctx.saved_tensors
        (gradients1, gradients2), busy, activate = ctx.rest
        grad_rows_ND = torch.empty_like(rows_ND)
        weights_train = any(ctx.needs_input_grad[1:5])
        for (e, run, width), before_MF, hidden_MF in zip(busy, kept[::2], kept[1::2]):
            w1_DF, w2_FD = w1_EDF[e], w2_EFD[e]
            if width is not None:
                w1_DF, w2_FD = w1_DF[:, :width], w2_FD[:width]
            grad_MD = grad_ND[run]
            if weights_train:
                gradients2.add(e, hidden_MF, grad_MD)
            grad_MF = grad_MD.mm(w2_FD.t())
            if activate is F.relu:
                torch.ops.aten.threshold_backward.grad_input(
                    grad_MF, hidden_MF, 0, grad_input=grad_MF
                )
            else:
                (grad_MF,) = torch.autograd.grad(hidden_MF, before_MF, grad_MF, retain_graph=True)
            if weights_train:
                gradients1.add(e, rows_ND[run], grad_MF)
            torch.mm(grad_MF, w1_DF.t(), out=grad_rows_ND[run])
        return grad_rows_ND, *[None] * 8
