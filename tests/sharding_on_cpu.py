"""fairscale's sharding without a GPU: its arithmetic and its messages, but not its streams.

It asks CUDA for streams and gloo for messages of two dimensions, and has neither on a CPU, where
everything is done in order in any case. And of a vector as long as all parameters, float32 on a CPU
has the norm to 3e-6 only, one addition after another.
"""

import contextlib

import torch
import torch.distributed as dist
from fairscale.nn.data_parallel import fully_sharded_data_parallel as sharding

from fairseq_smoe.training import fully_sharded


class InOrder:
    """A stream beside which there is no other."""

    def wait_stream(self, _):
        pass

    def __eq__(self, other):
        return isinstance(other, InOrder)


def flat(collective):
    def call(output, input, **options):
        return collective(output.flatten(), input.flatten(), **options)

    return call


def apply():
    stock_norm = torch.norm

    def norm(tensor, *args, dtype=None, **options):
        return stock_norm(tensor.double(), *args, **options).to(dtype or tensor.dtype)

    torch.norm = norm
    torch.cuda.current_stream = InOrder
    torch.cuda.stream = contextlib.nullcontext
    torch.cuda.synchronize = lambda: None
    torch.Tensor.record_stream = lambda tensor, stream: None
    torch.Tensor.cuda = lambda tensor: tensor
    fully_sharded.gpu_is_available = lambda: True
    sharding._get_default_cuda_device = lambda module: torch.device("cpu")
    stock_setup = sharding.FullyShardedDataParallel._setup_streams

    def set_up_streams(self):
        stock_setup(self)
        if self._is_root:
            for name in ("fp32_to_fp16", "all_gather", "post_backward"):
                self._streams[name] = InOrder()

    sharding.FullyShardedDataParallel._setup_streams = set_up_streams
    for name in ("_reduce_scatter_base", "_all_gather_base"):
        setattr(dist, name, flat(getattr(dist, name)))
