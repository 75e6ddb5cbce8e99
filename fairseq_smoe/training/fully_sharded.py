"""--ddp-backend fully_sharded: each rank has a shard of the parameters that all use (ZeRO, arXiv
1910.02054), by fairscale. Experts that ranks share stay where they are.

Checkpoints are as without it: the optimizer's state is that of the model's own parameters, not of
the flat ones that fairscale makes of them.
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
    """What sharding needs, and what does not go together with it.

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
    """Name of a parameter in the model that is not sharded."""
    return ".".join(part for part in name.split(".") if part and part not in _WRAPPERS)


class FullyShardedModel(FullyShardedDataParallel):
    """A model, or a layer of one, of whose parameters each rank has a shard; but for experts that
    ranks share, of which it has its own."""

    def __init__(self, module, **kwargs):
        for parameter in module.parameters():
            if hasattr(parameter, "expert"):
                parameter._is_sharded = True  # fairscale's mark of what it leaves alone
        super().__init__(module, **kwargs)

    def state_dict(self, *args, **kwargs):
        """That of the model inside, on every rank; fairseq's has it on the first one alone."""
        return FSDP.state_dict(self, *args, **kwargs)

    def load_state_dict(self, state_dict, strict=True, model_cfg=None):
        """As that of the model inside. Every rank has read it; fairseq's would send it around."""
        with self.summon_full_params():
            return self.unwrapped_module.load_state_dict(state_dict, strict, model_cfg)

    @cached_property
    def original_names(self):
        """Names of all parameters of the model inside. Every rank has to ask for them."""
        with self.summon_full_params(volatile=True):
            return [original_name(name) for name, _ in self.unwrapped_module.named_parameters()]

    def gather_full_optim_state_dict(self, optim, **_):
        """State of an optimizer, by the parameters of the model inside.

        Every rank has to call this. What is sharded is on the first one, after.

        Args:
            optim: fairseq's, of this model's parameters.
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
        """What a rank needs of what :meth:`gather_full_optim_state_dict`, or an optimizer of a
        model that is not sharded, has returned."""
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
        """``{flat parameter: (its wrapper, names of the parameters that it was made of)}``"""
        found = {}
        for path, module in self.named_modules():
            for flat in module.params if isinstance(module, FSDP) else ():
                names, _, _ = flat.metadata()
                found[flat] = module, [original_name(f"{path}.{name}") for name in names]
        return found


def _unsharded(value, flat, wrapper):
    """What an optimizer keeps of a flat parameter -> of each of those that it was made of; where it
    is sharded, on the first rank alone."""
    _, shapes, numels = flat.metadata()
    if not (isinstance(value, torch.Tensor) and value.shape == flat.shape):
        return [value] * len(shapes)
    if wrapper.world_size > 1:
        value, shard = value.new_empty(wrapper.world_size * len(value)), value
        dist.all_gather_into_tensor(value, shard, group=wrapper.process_group)
    if wrapper.rank > 0:
        return None
    pieces = value[: sum(numels)].cpu().split(numels)  # behind them there may be padding
    return [piece.view(shape) for piece, shape in zip(pieces, shapes)]


def _sharded(values, wrapper):
    """The inverse of :func:`_unsharded`, for any rank."""
    if not (isinstance(values[0], (torch.Tensor, Parted)) and values[0].shape):
        return values[0]
    shard, _ = wrapper._get_shard(torch.cat([value[:].flatten() for value in values]))
    return shard


def _with_entries(state, entries):
    """The state of an optimizer that has one group of parameters, with that of other ones."""
    (group,) = state["param_groups"]
    state = {**state, "state": dict(enumerate(entries))}
    return {**state, "param_groups": [{**group, "params": list(state["state"])}]}
