"""Weights stacked over experts that several passes of a block use.

Letters in names: M rows of one expert, E experts, I and O dims of input and output.
"""

import torch


class SharedWeight:
    """Stacked weights and biases that several passes use, with one gradient for all of them.

    With plain autograd every pass would make its own gradient for each expert, which would then be
    stacked and added to those of the other passes. Here each pass adds its products in place.

    Args:
        weight_EIO, bias_EO: parameters.
    """

    def __init__(self, weight_EIO, bias_EO):
        self.gradients = _Gradients(weight_EIO, bias_EO)
        self.weight_EIO, self.bias_EO = _Shared.apply(self.gradients, weight_EIO, bias_EO)


class _Gradients:
    """The gradient buffers that the passes add to. This object refers to the parameters only.
    Tensors of the autograd graph refer to it, and a cycle with them would never be freed."""

    def __init__(self, weight_EIO, bias_EO):
        self._like = weight_EIO, bias_EO
        self._sums = None
        self._begun = set()

    def add(self, e, input_MI, grad_MO):
        """Add to the gradient of expert ``e``, from its input and the gradient of its output. If
        these are narrower than the weight, the rest of the weight is padding and gets zeros."""
        weight_IO, bias_O = (gradient[e] for gradient in self._buffers(torch.empty_like))
        num_in, num_out = input_MI.shape[1], grad_MO.shape[1]
        if weight_IO.shape != (num_in, num_out):
            if e not in self._begun:
                for padding in (weight_IO[num_in:], weight_IO[:, num_out:], bias_O[num_out:]):
                    padding.zero_()
            weight_IO, bias_O = weight_IO[:num_in, :num_out], bias_O[:num_out]
        if e in self._begun:
            weight_IO.addmm_(input_MI.t(), grad_MO)
            bias_O.add_(grad_MO.sum(0))
        else:  # avoids filling the buffer with zeros first, and reading them
            self._begun.add(e)
            torch.mm(input_MI.t(), grad_MO, out=weight_IO)
            torch.sum(grad_MO, 0, out=bias_O)

    def add_all(self, experts, weight_eIO, bias_eO):
        """Add to the gradients of consecutive experts, a ``range``, in one go."""
        own = slice(experts.start, experts.stop)
        for gradient, more in zip(self._buffers(torch.zeros_like), (weight_eIO, bias_eO)):
            gradient[own] += more
        self._begun.update(range(len(self._like[0])))  # the other experts' gradients are zero

    def take(self):
        """Return the gradients ``(weight_EIO, bias_EO)`` and forget them, for the next backward
        pass. Experts without rows have a gradient of zero."""
        sums = self._buffers(torch.empty_like)
        for e in set(range(len(sums[0]))) - self._begun:
            for gradient in sums:
                gradient[e].zero_()
        self._sums, self._begun = None, set()
        return sums

    def _buffers(self, make):
        if self._sums is None:
            self._sums = tuple(make(parameter) for parameter in self._like)
        return self._sums


class _Shared(torch.autograd.Function):
    """Identity. Autograd calls its backward when all passes have added their gradients."""

    @staticmethod
    def forward(ctx, gradients, weight_EIO, bias_EO):
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return weight_EIO.view_as(weight_EIO), bias_EO.view_as(bias_EO)

    @staticmethod
    def backward(ctx, *_):
        return None, *ctx.gradients.take()
