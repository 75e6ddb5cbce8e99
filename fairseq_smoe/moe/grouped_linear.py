"""A linear layer of all experts, in one call of torch's ``grouped_mm``.

Letters in names: N rows sorted by expert, E experts, I and O dims of input and output.
"""

import torch
import torch.nn.functional as F

ALIGNMENT = 16  # bytes; grouped_mm requires every stride to be a multiple
KERNEL_CAPABILITIES = (9, 10)  # major versions: Hopper and data-centre Blackwell
GROUPED_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Grouped(torch.autograd.Function):
    """One call for all experts. The host does not have to know how many rows each expert has."""

    @staticmethod
    def forward(ctx, rows_NI, weight_EIO, bias_EO, gradients, experts, runs):
        ctx.save_for_backward(rows_NI, weight_EIO)
        ctx.rest = gradients, experts, runs
        own = slice(experts.start, experts.stop)
        out_NO = F.grouped_mm(rows_NI, weight_EIO[own], offs=runs.ends_E)
        return out_NO.add_(bias_EO[own].index_select(0, runs.row_expert_N))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NO):
        rows_NI, weight_EIO = ctx.saved_tensors
        gradients, experts, runs = ctx.rest
        own, ends_E = slice(experts.start, experts.stop), runs.ends_E
        grad_NO = grad_NO.contiguous()
        if any(ctx.needs_input_grad[1:3]):
            # the gradient of a bias sums over an expert's rows; computed as a product with ones
            ones_N1 = grad_NO.new_ones(len(grad_NO), ALIGNMENT // grad_NO.element_size())
            gradients.add_all(
                experts,
                F.grouped_mm(rows_NI.t(), grad_NO, offs=ends_E),
                F.grouped_mm(ones_N1.t(), grad_NO, offs=ends_E)[:, 0],
            )
        grad_NI = F.grouped_mm(grad_NO, weight_EIO[own].transpose(1, 2), offs=ends_E)
        return grad_NI, None, None, None, None, None


def grouped_linear(rows_NI, shared, experts, runs):
    """Apply each expert's weight and bias to its run of rows, in one call.

    Args:
        rows_NI: rows sorted by expert.
        shared: :class:`~fairseq_smoe.moe.shared_weight.SharedWeight`
        experts: ``range`` of the experts that the runs belong to.
        runs: :class:`~fairseq_smoe.moe.dispatch.Runs` of the rows. The values of unused rows are
            undefined in the result and in the gradient of ``rows_NI``.

    Returns:
        (N, O)
    """
    weight_EIO, bias_EO = shared.weight_EIO, shared.bias_EO
    return _Grouped.apply(rows_NI, weight_EIO, bias_EO, shared.gradients, experts, runs)


def grouped_mm_takes(weight_EIO):
    """Whether ``grouped_mm`` can multiply with these weights."""
    widths = [width * weight_EIO.element_size() for width in weight_EIO.shape[1:]]
    return weight_EIO.dtype in GROUPED_TYPES and not any(width % ALIGNMENT for width in widths)


def grouped_mm_is_fast(weight_EIO):
    """Whether ``grouped_mm`` can multiply with these weights, and torch has a kernel for it."""
    return (
        weight_EIO.is_cuda
        and has_kernel(weight_EIO.dtype, torch.cuda.get_device_capability(weight_EIO.device))
        and grouped_mm_takes(weight_EIO)
    )


def has_kernel(dtype, capability):
    """Whether torch has a kernel for ``grouped_mm`` on a GPU. Otherwise it loops over the groups,
    for which the host waits for the device (aten's GroupedBlas, torch 2.11 to 2.13).

    Args:
        capability: ``(major, minor)``, as returned by ``torch.cuda.get_device_capability``.
    """
    return dtype == torch.bfloat16 and capability[0] in KERNEL_CAPABILITIES
