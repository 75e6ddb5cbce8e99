"""Linear layers whose weights are stacked over experts: by one product each, or by one for all.

Letters in names: N rows sorted by expert, M rows of one expert, E experts, I and O dims of input
and output.
"""

import torch
import torch.nn.functional as F

ALIGNMENT = 16  # bytes, that grouped_mm wants of every stride
GROUPED_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class SharedWeight:
    """Stacked weights and biases that several passes use, with one gradient for all of them.

    Left to autograd, every pass would make a gradient of its own for each expert, to be added to
    those of the other passes and stacked; here a pass adds its products in place.

    Args:
        weight_EIO, bias_EO: parameters.
    """

    def __init__(self, weight_EIO, bias_EO):
        self.gradients = _Gradients(weight_EIO, bias_EO)
        self.weight_EIO, self.bias_EO = _Shared.apply(self.gradients, weight_EIO, bias_EO)


class _Gradients:
    """What the passes add to. Knows the parameters, not what autograd makes of them: that would
    refer back to this, and neither would ever be freed."""

    def __init__(self, weight_EIO, bias_EO):
        self._like = weight_EIO, bias_EO
        self._sums = None
        self._begun = set()

    def add(self, e, input_MI, grad_MO):
        """Add to the gradient of expert ``e``, from its input and the gradient of its output."""
        weight_IO, bias_O = (gradient[e] for gradient in self._buffers(torch.empty_like))
        if e in self._begun:
            weight_IO.addmm_(input_MI.t(), grad_MO)
            bias_O.add_(grad_MO.sum(0))
        else:  # saves filling the buffer with zeros, and reading them
            self._begun.add(e)
            torch.mm(input_MI.t(), grad_MO, out=weight_IO)
            torch.sum(grad_MO, 0, out=bias_O)

    def add_all(self, experts, weight_eIO, bias_eO):
        """Add to the gradients of consecutive experts, a ``range``, in one go."""
        own = slice(experts.start, experts.stop)
        for gradient, more in zip(self._buffers(torch.zeros_like), (weight_eIO, bias_eO)):
            gradient[own] += more
        self._begun.update(range(len(self._like[0])))  # the others are zero

    def take(self):
        """``(weight_EIO, bias_EO)``, which are let go of: another backward pass begins anew.
        Experts without rows have a gradient of zero."""
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


class _Linear(torch.autograd.Function):
    """One expert's product."""

    @staticmethod
    def forward(ctx, run_MI, weight_EIO, bias_EO, gradients, e):
        ctx.save_for_backward(run_MI, weight_EIO)
        ctx.rest = gradients, e
        return torch.addmm(bias_EO[e], run_MI, weight_EIO[e])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_MO):
        run_MI, weight_EIO = ctx.saved_tensors
        gradients, e = ctx.rest
        grad_MI = grad_MO.mm(weight_EIO[e].t()) if ctx.needs_input_grad[0] else None
        gradients.add(e, run_MI, grad_MO)
        return grad_MI, None, None, None, None


def expert_linear(run_MI, shared, e):
    """Apply the weight and bias of one expert to its rows: (M, I) -> (M, O).

    Args:
        shared: :class:`SharedWeight`
        e: number of the expert.
    """
    return _Linear.apply(run_MI, shared.weight_EIO, shared.bias_EO, shared.gradients, e)


class _Grouped(torch.autograd.Function):
    """One call for all experts; the host need not know how many rows each has."""

    @staticmethod
    def forward(ctx, rows_NI, weight_EIO, bias_EO, gradients, experts, dispatch):
        ctx.save_for_backward(rows_NI, weight_EIO)
        ctx.rest = gradients, experts, dispatch
        own = slice(experts.start, experts.stop)
        out_NO = F.grouped_mm(rows_NI, weight_EIO[own], offs=dispatch.ends_E)
        return out_NO.add_(bias_EO[own].index_select(0, dispatch.row_expert_N))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NO):
        rows_NI, weight_EIO = ctx.saved_tensors
        gradients, experts, dispatch = ctx.rest
        own, ends_E = slice(experts.start, experts.stop), dispatch.ends_E
        grad_NO = grad_NO.contiguous()
        # sums over an expert's rows, as products with ones
        ones_N1 = grad_NO.new_ones(len(grad_NO), ALIGNMENT // grad_NO.element_size())
        gradients.add_all(
            experts,
            F.grouped_mm(rows_NI.t(), grad_NO, offs=ends_E),
            F.grouped_mm(ones_N1.t(), grad_NO, offs=ends_E)[:, 0],
        )
        grad_NI = F.grouped_mm(grad_NO, weight_EIO[own].transpose(1, 2), offs=ends_E)
        return grad_NI, None, None, None, None, None


def grouped_linear(rows_NI, shared, experts, dispatch):
    """Apply to each run of rows its expert's weight and bias, in one call.

    Args:
        rows_NI: rows sorted by expert.
        shared: :class:`SharedWeight`
        experts: ``range`` of the experts that the runs belong to.
        dispatch: :class:`~fairseq_smoe.dispatch.Dispatch` without regard to shapes; rows of the
            result, and of the gradient of ``rows_NI``, that are no expert's are undefined.

    Returns:
        (N, O)
    """
    weight_EIO, bias_EO = shared.weight_EIO, shared.bias_EO
    return _Grouped.apply(rows_NI, weight_EIO, bias_EO, shared.gradients, experts, dispatch)


def grouped_mm_takes(weight_EIO):
    """Whether ``grouped_mm`` can multiply with these weights."""
    widths = [width * weight_EIO.element_size() for width in weight_EIO.shape[1:]]
    return weight_EIO.dtype in GROUPED_TYPES and not any(width % ALIGNMENT for width in widths)


def grouped_mm_is_fast(weight_EIO):
    """Whether it can with a kernel of its own, and not by a loop over the experts inside."""
    return (
        weight_EIO.is_cuda
        and weight_EIO.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(weight_EIO.device) >= (8, 0)
        and grouped_mm_takes(weight_EIO)
    )
