"""``--optimizer fused_adam``: fairseq's Adam, computed by torch's fused kernel.

fairseq's ``adam`` passes over the memory of a parameter several times in an update. On a GPU it
starts as many kernels for every parameter, unless apex is installed.
"""

from collections import defaultdict

import torch
from fairseq.optim import FairseqOptimizer, register_optimizer
from fairseq.optim.adam import Adam, FairseqAdam, FairseqAdamConfig
from torch.optim.adamw import adamw

from fairseq_smoe.errors import OptionError

MOMENTS = ("exp_avg", "exp_avg_sq")


@register_optimizer("fused_adam", dataclass=FairseqAdamConfig)
class FairseqFusedAdam(FairseqAdam):
    """Has the options of ``adam``, and goes on from its checkpoints. ``adam`` goes on from its.

    Raises:
        OptionError: an option asks for another Adam.
    """

    def __init__(self, cfg, params):
        FairseqOptimizer.__init__(self, cfg)
        for option in ("use_old_adam", "fp16_adam_stats"):
            if getattr(cfg, option, False):
                raise OptionError(
                    f"--{option.replace('_', '-')} with --optimizer fused_adam: not possible; take "
                    "--optimizer adam, or leave it out"
                )
        self._optimizer = FusedAdam(params, **self.optimizer_config)


class FusedAdam(Adam):
    """Makes the steps of fairseq's :class:`~fairseq.optim.adam.Adam`, and has the same state. Only
    rounding differs."""

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient.

        Args:
            closure: a function that computes the loss, which is then returned.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for alike in self._of_same_step(group):
                _update(group, alike)
        return loss

    def _of_same_step(self, group):
        """Lists of ``(parameter, state)`` that one call of the kernel can update. Parameters that
        some updates have skipped are at earlier steps than others."""
        found = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            # apex's Adam, which fairseq uses where it is installed, counts steps in the group
            state["step"] = int(state.get("step", group.get("step", 0))) + 1
            for name in MOMENTS:
                if name not in state:
                    state[name] = torch.zeros_like(parameter, dtype=torch.float32)
            # the kernel needs float32; copies of half precision are made for one tensor at a time
            alone = parameter if parameter.dtype != torch.float32 else None
            found[alone, parameter.device, state["step"]].append((parameter, state))
        return found.values()


def _update(group, alike):
    """Update parameters at the same step."""
    parameters, states = zip(*alike)
    step, (beta1, beta2) = states[0]["step"], group["betas"]
    values = [parameter.float() for parameter in parameters]  # themselves, if they are in float32
    gradients = [_stored_as(value, p.grad) for value, p in zip(values, parameters)]
    for value, state in zip(values, states):
        state.update({name: _stored_as(value, state[name]) for name in MOMENTS})
    adamw(
        values,
        gradients,
        *([state[name] for state in states] for name in MOMENTS),
        [],
        # of which the kernel makes the number of this step
        list(torch.full((len(values),), step - 1.0, device=values[0].device).unbind()),
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        # fairseq adds eps to the root of exp_avg_sq before it corrects the bias, torch after that
        eps=group["eps"] / (1 - beta2**step) ** 0.5,
    )
    for value, parameter in zip(values, parameters):
        if value is not parameter:
            parameter.copy_(value)


def _stored_as(value, tensor):
    """A tensor with the precision, device and order in memory of ``value``, in which the kernel
    goes through all tensors. This is the tensor itself, unless it has others."""
    tensor = tensor.to(value)
    return tensor if tensor.stride() == value.stride() else torch.empty_like(value).copy_(tensor)
