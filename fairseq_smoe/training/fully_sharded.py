"""--ddp-backend fully_sharded: fairscale's FSDP for all parameters except sharded experts.

Each rank holds a shard of the parameters that would otherwise be on every rank (ZeRO, arXiv
1910.02054). Experts that expert parallelism has already distributed over ranks are left alone.
Checkpoints are the same as without this backend: the optimizer's state is stored for the model's
own parameters, not for the flat parameters that fairscale makes of them.
"""

from functools import cached_property

import torch
import torch.distributed as dist
from fairscale.nn.data_parallel import FullyShardedDataParallel as FSDP
from fairseq.distributed.fully_sharded_data_parallel import FullyShardedDataParallel
from torch.cuda import is_available as gpu_is_available

from fairseq_smoe.checkpoints.parts import Parted
from fairseq_smoe.errors import OptionError

_WRAPPERS = ("_fsdp_wrapped_module", "_fpw_module")


def check_options(cfg):
    """Check the requirements of sharding, and refuse options that it does not work with.

    Args:
        cfg: fairseq's options for distributed training.

    Raises:
        OptionError: names the option.
    """
    if not gpu_is_available():
        raise OptionError(
            "--ddp-backend fully_sharded: needs GPUs, and there is none; leave it out"
        )
    if cfg.distributed_world_size == 1:
        raise OptionError("--ddp-backend fully_sharded: needs more than 1 process; leave it out")
    for option in ("use_sharded_state", "not_fsdp_flatten_parameters", "cpu_offload"):
        if getattr(cfg, option):
            flag = f"--{option.replace('_', '-')}"
            raise OptionError(
                f"{flag} with --ddp-backend fully_sharded: not possible; leave it out"
            )


def original_name(name):
    """Name that a parameter has in the model without sharding."""
    return ".".join(part for part in name.split(".") if part and part not in _WRAPPERS)


class FullyShardedModel(FullyShardedDataParallel):
    """A model, or a layer of one, whose parameters are sharded over the ranks. Experts that expert
    parallelism has distributed are not sharded here: each rank has its own."""

    def __init__(self, module, **kwargs):
        for parameter in module.parameters():
            if hasattr(parameter, "expert"):
                parameter._is_sharded = True  # fairscale does not shard parameters with this mark
        super().__init__(module, **kwargs)

    def state_dict(self, *args, **kwargs):
        """The state of the wrapped model, on every rank. fairseq's version returns it on the first
        rank only."""
        return FSDP.state_dict(self, *args, **kwargs)

    def load_state_dict(self, state_dict, strict=True, model_cfg=None):
        """Load the wrapped model's state. Every rank has read the file; fairseq's version would
        broadcast it."""
        with self.summon_full_params():
            return self.unwrapped_module.load_state_dict(state_dict, strict, model_cfg)

    @cached_property
    def original_names(self):
        """Names of all parameters of the wrapped model. Every rank has to call this."""
        with self.summon_full_params(volatile=True):
            return [original_name(name) for name, _ in self.unwrapped_module.named_parameters()]

    def gather_full_optim_state_dict(self, optim, **_):
        """The optimizer's state, by parameters of the wrapped model.

        Every rank has to call this. Only the first rank gets the state of sharded parameters.

        Args:
            optim: fairseq's optimizer of this model's parameters.
        """
        state, flat_parameters = optim.state_dict(), self._flat_parameters()
        entries = dict.fromkeys(self.original_names, {})
        for number, (name, parameter) in enumerate(self.named_parameters()):
            kept = state["state"].get(number, {})
            if parameter not in flat_parameters:
                entries[original_name(name)] = kept
                continue
            wrapper, names = flat_parameters[parameter]
            values = {key: _unsharded(kept[key], parameter, wrapper) for key in kept}
            for i, original in enumerate(names):
                entries[original] = {key: value[i] for key, value in values.items() if value}
        return _with_entries(state, entries.values())

    def get_shard_from_optim_state_dict(self, state):
        """This rank's shard of an optimizer's state.

        Args:
            state: result of :meth:`gather_full_optim_state_dict`, or state of the optimizer of a
                model that is not sharded.
        """
        flat_parameters = self._flat_parameters()
        kept = {name: state["state"].get(i, {}) for i, name in enumerate(self.original_names)}
        entries = []
        for name, parameter in self.named_parameters():
            if parameter not in flat_parameters:
                entries.append(kept[original_name(name)])
                continue
            wrapper, names = flat_parameters[parameter]
            entries.append(
                {key: _sharded([kept[n][key] for n in names], wrapper) for key in kept[names[0]]}
            )
        return _with_entries(state, entries)

    def _flat_parameters(self):
        """``{flat parameter: (its wrapper, names of the parameters it was made from)}``"""
        found = {}
        for path, module in self.named_modules():
            for flat in module.params if isinstance(module, FSDP) else ():
                names, _, _ = flat.metadata()
                found[flat] = module, [original_name(f"{path}.{name}") for name in names]
        return found


def _unsharded(value, flat, wrapper):
    """Split the optimizer's state of a flat parameter into that of the parameters it was made from.
    If the parameter is sharded, only the first rank gets the result."""
    _, shapes, numels = flat.metadata()
    if not (isinstance(value, torch.Tensor) and value.shape == flat.shape):
        return [value] * len(shapes)
    if wrapper.world_size > 1:
        value, shard = value.new_empty(wrapper.world_size * len(value)), value
        dist.all_gather_into_tensor(value, shard, group=wrapper.process_group)
    if wrapper.rank > 0:
        return None
    pieces = value[: sum(numels)].cpu().split(numels)  # padding may follow the parameters
    return [piece.view(shape) for piece, shape in zip(pieces, shapes)]


def _sharded(values, wrapper):
    """The inverse of :func:`_unsharded`, for any rank."""
    if not (isinstance(values[0], (torch.Tensor, Parted)) and values[0].shape):
        return values[0]
    shard, _ = wrapper._get_shard(torch.cat([value[:].flatten() for value in values]))
    return shard


def _with_entries(state, entries):
    """``state``, of an optimizer with one group of parameters, with other entries per parameter."""
    (group,) = state["param_groups"]
    state = {**state, "state": dict(enumerate(entries))}
    return {**state, "param_groups": [{**group, "params": list(state["state"])}]}
