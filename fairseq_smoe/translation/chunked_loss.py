"""Label-smoothed cross entropy of an output layer, a few tokens at a time.

Shapes: T target tokens, C of them in a chunk, V entries of the vocabulary, D width of the output
layer. Nothing of size T x V exists at any time.

torch's ``linear_cross_entropy`` (from torch 2.13) is similar, but does not return the loss without
smoothing, which fairseq logs and by which it chooses the best checkpoint.
"""

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable


def label_smoothed_loss(
    features_TD, weight_VD, target_T, smoothing, chunk, untrained=0, find_correct=False
):
    """Loss of the logits ``features_TD @ weight_VD.T``.

    As in fairseq, the loss of a token is (1 - s - u) * -log p(target) + u * sum of -log p over the
    vocabulary, with s = ``smoothing`` and u = s / (V - 1).

    The gradients are computed along with the loss, chunk by chunk, so that no logits are kept for
    the backward computation. In float16 the backward computation computes the logits once more,
    because it alone knows the factor by which the loss is scaled, without which small gradients
    would become 0.

    Under autocast the logits are computed in its precision. The softmax is always computed in
    float32. The weight's gradients are rounded to its precision for every chunk, and added up in
    float32.

    Args:
        target_T: ids of the target tokens, without padding.
        chunk: C, number of tokens at a time.
        untrained: so many entries at the end of the vocabulary have probability 0. The smoothed
            loss is then infinite, as in fairseq, but its gradient is not.
        find_correct: whether to return ``correct_T``.

    Returns:
        ``(loss, nll_T, correct_T)``. The loss is summed over tokens, in nats, and can be
        differentiated once, with respect to features and weight. ``nll_T`` is -log p of every
        target token, ``correct_T`` whether it is the most probable one (or None).
    """
    device = features_TD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        features_TD, weight_VD = features_TD.to(dtype), weight_VD.to(dtype)
    job = _Job(target_T, smoothing, chunk, untrained, find_correct)
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and (features_TD.requires_grad or weight_VD.requires_grad):
            return _Loss.apply(features_TD, weight_VD, job)
        return job.losses(features_TD, weight_VD)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features_TD, weight_VD, job):
        ctx.job, ctx.recompute = job, features_TD.dtype == torch.float16
        if ctx.recompute:
            losses = job.losses(features_TD, weight_VD)
            ctx.save_for_backward(features_TD, weight_VD)
        else:
            gradients = _Gradients(features_TD, weight_VD, ctx.needs_input_grad)
            losses = job.losses(features_TD, weight_VD, gradients)
            ctx.save_for_backward(*gradients.rounded())
        ctx.mark_non_differentiable(*(t for t in losses[1:] if t is not None))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, factor, *_):
        if ctx.recompute:
            gradients = _Gradients(*ctx.saved_tensors, ctx.needs_input_grad)
            for rows, log_p_CV in ctx.job.chunks(*ctx.saved_tensors):
                gradients.add(ctx.job, rows, log_p_CV, factor)
            return *gradients.rounded(), None
        # in place: the weight's gradient is large, and needed only once
        return *(g if g is None else g.mul_(factor) for g in ctx.saved_tensors), None


class TargetLoss:
    """The loss of a batch's target, for a decoder to compute from its features. A model computes it
    inside of its own forward pass, because the wrappers for data-parallel training may use the
    output layer's weight only there.

    Args:
        target_BS: ids of the target tokens.
        padding_idx: id of padding, which has no loss.
        ignored: number of tokens at the beginning of every sentence that have no loss.
        smoothing, chunk, find_correct: see :func:`label_smoothed_loss`.
    """

    def __init__(self, target_BS, padding_idx, ignored, smoothing, chunk, find_correct):
        has_loss_BS = target_BS.ne(padding_idx)
        has_loss_BS[:, :ignored] = False
        # before the forward pass: the host has to wait here for a GPU, which has nothing to do yet
        self._place_T = has_loss_BS.flatten().nonzero().squeeze(1)
        self._target_T = target_BS.flatten()[self._place_T]
        self._shape = target_BS.shape
        self._settings = {"smoothing": smoothing, "chunk": chunk, "find_correct": find_correct}

    def __call__(self, features_BSD, weight_VD, untrained=0):
        """As :func:`label_smoothed_loss`."""
        features_TD = features_BSD.reshape(-1, features_BSD.shape[-1])[self._place_T]
        settings = {**self._settings, "untrained": untrained}
        return label_smoothed_loss(features_TD, weight_VD, self._target_T, **settings)

    def by_place(self, nll_T):
        """``(nll, has_loss)``, both (B * S,): the loss of every place, and whether it has one."""
        nll = nll_T.new_zeros(self._shape.numel()).index_copy(0, self._place_T, nll_T)
        has_loss = torch.zeros_like(nll, dtype=torch.bool).index_fill(0, self._place_T, True)
        return nll, has_loss


@dataclass
class _Job:
    """See :func:`label_smoothed_loss`."""

    target_T: torch.Tensor
    smoothing: float
    chunk: int
    untrained: int
    find_correct: bool

    def losses(self, features_TD, weight_VD, gradients=None):
        """As :func:`label_smoothed_loss` returns them; also adds to ``gradients``."""
        share = self.share(weight_VD)
        nll_T = features_TD.new_empty(len(features_TD), dtype=torch.float32)
        all_T = torch.zeros_like(nll_T)  # sum of -log p over the vocabulary
        correct_T = torch.empty_like(nll_T, dtype=torch.bool) if self.find_correct else None
        for rows, log_p_CV in self.chunks(features_TD, weight_VD):
            target_C1 = self.target_T[rows, None]
            nll_T[rows] = -log_p_CV.gather(1, target_C1).squeeze(1)
            if self.smoothing:
                all_T[rows] = -log_p_CV.sum(1)
            if self.find_correct:
                correct_T[rows] = log_p_CV.argmax(1) == target_C1.squeeze(1)
            if gradients is not None:
                gradients.add(self, rows, log_p_CV)
        loss = (1 - self.smoothing - share) * nll_T.sum() + share * all_T.sum()
        return loss, nll_T, correct_T

    def share(self, weight_VD):
        """Weight u of every entry of the vocabulary."""
        return self.smoothing / (len(weight_VD) - 1)

    def chunks(self, features_TD, weight_VD):
        """``(rows, log_p_CV)`` of every chunk, in float32."""
        for first in range(0, len(features_TD), self.chunk):
            rows = slice(first, first + self.chunk)
            logits_CV = features_TD[rows] @ weight_VD.T
            if self.untrained:
                logits_CV[:, -self.untrained :] = -torch.inf
            yield rows, torch.log_softmax(logits_CV, 1, dtype=torch.float32)


class _Gradients:
    """Gradients with respect to features and weight, as far as they are needed."""

    def __init__(self, features_TD, weight_VD, needed):
        self.features_TD, self.weight_VD = features_TD, weight_VD
        self.of_features_TD = torch.empty_like(features_TD) if needed[0] else None
        self.of_weight_VD = None
        if needed[1]:
            self.of_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)

    def add(self, job, rows, log_p_CV, factor=None):
        """Add those of a chunk, multiplied by ``factor``. ``log_p_CV`` is overwritten.

        The gradient with respect to a logit is p - u, and at the target less by 1 - s - u.
        """
        share = job.share(self.weight_VD)
        gradient_CV = log_p_CV.exp_()
        if share:
            gradient_CV -= share
        target_C1 = job.target_T[rows, None]
        at_target = gradient_CV.new_full((1, 1), job.smoothing + share - 1).expand_as(target_C1)
        gradient_CV.scatter_add_(1, target_C1, at_target)
        if job.untrained:
            gradient_CV[:, -job.untrained :] = 0
        if factor is not None:
            gradient_CV *= factor
        gradient_CV = gradient_CV.to(self.weight_VD.dtype)
        if self.of_features_TD is not None:
            torch.mm(gradient_CV, self.weight_VD, out=self.of_features_TD[rows])
        if self.of_weight_VD is None:
            return
        if self.weight_VD.dtype == torch.float32:
            self.of_weight_VD.addmm_(gradient_CV.T, self.features_TD[rows])
        else:
            self.of_weight_VD += gradient_CV.T @ self.features_TD[rows]

    def rounded(self):
        """The two gradients in the precision of features and weight; None if not needed."""
        weight = self.of_weight_VD
        return self.of_features_TD, weight if weight is None else weight.to(self.weight_VD.dtype)
