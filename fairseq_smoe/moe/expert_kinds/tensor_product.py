"""Experts whose weights are chains of small tensors, with the central one in common (MPOE).

Gao et al. 2022, arXiv 2203.01104. See :mod:`fairseq_smoe.moe.matrix_product` for the chains.
"""

import math
from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.expert_kinds.ffn import FFNExperts, FFNOptions
from fairseq_smoe.moe.kind import option
from fairseq_smoe.moe.matrix_product import (
    balanced_shape,
    decompose,
    rebuild,
    rebuild_flops,
    tensor_shapes,
)
from fairseq_smoe.moe.strata import own_experts

SHARING = ("block", "stratum")
BIASES = ("common", "own")
LAYERS = ("fc1", "fc2")


@dataclass
class TensorProductOptions(FFNOptions):
    mpo_in_shape: Optional[str] = option(
        None,
        "with --moe-experts tensor-product: factors of the model's width, an odd number from 3, "
        "joined by commas, e.g. 2,4,4,4,4 for 512 (default: five nearly equal ones)",
    )
    mpo_out_shape: Optional[str] = option(
        None, "as many factors of the FFN's width, e.g. 4,4,8,4,4 for 2048 (default: nearly equal)"
    )
    mpo_bond: int = option(
        0, "limit of the bonds between the tensors of an expert's matrix; 0 for none"
    )
    mpo_share: str = option(
        "block", "experts that have their central tensors in common: of a 'block' or a 'stratum'"
    )
    mpo_bias: str = option(
        "common",
        "with --moe-experts tensor-product: biases that the experts with a common central tensor "
        "have in 'common', or each its 'own'",
    )
    mpo_central_mask_prob: float = option(
        0.0, "probability that an update leaves a central tensor as it is; 1 freezes them"
    )

    def check(self, strata, options):
        if getattr(options, "moe_experts", None) != TensorProductExperts.name:
            return self.refuse_given(options.moe_experts, "--moe-experts tensor-product")
        super().check(strata, options)
        if self.mpo_share not in SHARING:
            raise OptionError(f"--mpo-share {self.mpo_share}: expected {' or '.join(SHARING)}")
        if self.mpo_bias not in BIASES:
            raise OptionError(f"--mpo-bias {self.mpo_bias}: expected {' or '.join(BIASES)}")
        if self.mpo_bond < 0:
            raise OptionError(f"--mpo-bond {self.mpo_bond}: expected 0 (no limit) or more")
        if not 0 <= self.mpo_central_mask_prob <= 1:
            raise OptionError(
                f"--mpo-central-mask-prob {self.mpo_central_mask_prob}: expected a probability"
            )
        self.shapes()

    def shapes(self, embed_dim=None, ffn_dim=None):
        """The factors of both widths, or None where they are chosen by the widths and these are
        not given.

        Raises:
            OptionError: a shape does not parse, does not multiply to its width, or has not as many
                factors as the other.
        """
        given = [
            _parse_shape("--mpo-in-shape", self.mpo_in_shape, embed_dim),
            _parse_shape("--mpo-out-shape", self.mpo_out_shape, ffn_dim),
        ]
        lengths = {len(shape) for shape in given if shape}
        if len(lengths) == 2:
            raise OptionError(
                f"--mpo-in-shape {self.mpo_in_shape} with --mpo-out-shape {self.mpo_out_shape}: "
                "expected as many factors in both"
            )
        length = max(lengths, default=5)
        return [
            shape or (width and balanced_shape(width, length))
            for shape, width in zip(given, (embed_dim, ffn_dim))
        ]


def _parse_shape(flag, text, width):
    if text is None:
        return None
    factors = text.split(",")
    if not all(factor.isascii() and factor.isdigit() and int(factor) for factor in factors):
        raise OptionError(f"{flag} {text}: expected factors joined by commas, as in 2,4,4,4,4")
    shape = tuple(map(int, factors))
    if len(shape) < 3 or len(shape) % 2 == 0:
        raise OptionError(
            f"{flag} {text}: expected an odd number of factors, from 3, as one of the tensors is "
            "the central one"
        )
    if width is not None and math.prod(shape) != width:
        raise OptionError(
            f"{flag} {text}: multiplies to {math.prod(shape)}, but the width is {width}; nearly "
            f"equal factors would be {','.join(map(str, balanced_shape(width, len(shape))))}"
        )
    return shape


class TensorProductExperts(FFNExperts):
    """Two-layer feed-forward networks whose weight matrices are products of n tensors.

    The central tensor of a layer is common to all experts of the block or of a stratum, as are the
    biases, unless they are to be an expert's own. The others are an expert's own. All weights are
    rebuilt once in a forward pass of the block. In evaluation they are kept until the module is
    trained again, moved or loaded.

    Parameters: for each of the outer tensors, k = 1 ... n without the middle, ``fc1_tensor{k}`` and
    ``fc2_tensor{k}`` (E, d, i_k, j_k, d'), stacked over experts. The module ``common`` has
    ``fc1_central``, ``fc2_central`` (S, d, i, j, d') and ``fc1_bias`` (S, F), ``fc2_bias`` (S, D),
    with S = 1, or the number of strata with ``--mpo-share stratum``. With ``--mpo-bias own`` the
    biases are ``fc1_bias`` (E, F) and ``fc2_bias`` (E, D), stacked over experts.
    """

    name = "tensor-product"
    Options = TensorProductOptions

    def make_parameters(self):
        in_shape, out_shape = self.options.shapes(self.embed_dim, self.ffn_dim)
        self.factors = {"fc1": (in_shape, out_shape), "fc2": (out_shape, in_shape)}
        self.shapes = {
            layer: tensor_shapes(*factors, self.options.mpo_bond)
            for layer, factors in self.factors.items()
        }
        self.middle = len(in_shape) // 2
        everyone = range(sum(self.strata))
        by_stratum = self.options.mpo_share == "stratum"
        self.sharing = own_experts(self.strata) if by_stratum else [everyone]
        self.common = nn.Module()
        self._rebuilt = None  # the key and the weights that evaluation keeps
        for layer, shapes in self.shapes.items():
            for k, shape in enumerate(shapes):
                if k != self.middle:
                    tensor_E = _orthonormal(len(everyone), shape, before=k < self.middle)
                    self.add_stacked(f"{layer}_tensor{k + 1}", tensor_E)
            # the outer tensors keep the norm of what they are multiplied with. So the numbers of
            # rebuilt weights have the variance of nn.Linear's
            width, out_width = map(math.prod, self.factors[layer])
            central = torch.empty(len(self.sharing), *shapes[self.middle])
            bound = 1 / math.sqrt(width)
            scale = math.sqrt(width * out_width / central[0].numel())
            central.uniform_(-bound * scale, bound * scale)
            self.common.register_parameter(f"{layer}_central", nn.Parameter(central))
            number = len(everyone) if self.own_biases else len(self.sharing)
            bias = torch.empty(number, out_width).uniform_(-bound, bound)
            if self.own_biases:
                self.add_stacked(f"{layer}_bias", bias)
            else:
                self.common.register_parameter(f"{layer}_bias", nn.Parameter(bias))

    @property
    def own_biases(self):
        return self.options.mpo_bias == "own"

    def _bias(self, layer):
        return getattr(self if self.own_biases else self.common, f"{layer}_bias")

    @torch.no_grad()
    def copy_ffn(self, fc1, fc2, noise=0.01):
        """Make all experts from one FFN.

        Args:
            fc1, fc2: ``nn.Linear`` layers. Limited bonds approximate their weights.
            noise: experts that were equal would stay equal, so noise of this standard deviation
                relative to their numbers is added to the experts' own tensors.
        """
        for layer, linear in zip(LAYERS, (fc1, fc2)):
            matrix = linear.weight.detach().t()
            tensors = decompose(matrix, *self.factors[layer], self.options.mpo_bond)
            for k, tensor in enumerate(tensors):
                if k == self.middle:
                    getattr(self.common, f"{layer}_central").copy_(tensor)
                    continue
                tensor_E = tensor.expand(sum(self.strata), *tensor.shape)
                spread = noise * tensor.square().mean().sqrt()
                tensor_E = tensor_E + spread * torch.randn_like(tensor_E)
                own = tensor_E if self.group is None else self.group.share(tensor_E)
                getattr(self, f"{layer}_tensor{k + 1}").copy_(own)
            self._bias(layer).copy_(linear.bias)

    def weights(self, dtype):
        if self.training or torch.is_grad_enabled():
            return self._rebuild(dtype)
        in_common = [getattr(self.common, f"{layer}_central") for layer in LAYERS]
        in_common += [] if self.own_biases else [self._bias(layer) for layer in LAYERS]
        key = dtype, [_state(tensor) for tensor in (*self.stacked(), *in_common)]
        if self._rebuilt is None or self._rebuilt[0] != key:
            self._rebuilt = key, self._rebuild(dtype)
        return self._rebuilt[1]

    def _rebuild(self, dtype):
        numbers = range(sum(self.strata))
        held = self.group.share(numbers) if self.exchanges else numbers
        # what this process holds of each set of experts, as slices of the stacked tensors
        counts = [sum(e in experts for e in held) for experts in self.sharing]
        stops = [sum(counts[: s + 1]) for s in range(len(counts))]
        slices = [slice(stop - count, stop) for stop, count in zip(stops, counts)]
        outer = {name: tensor.to(dtype) for name, tensor in zip(self._stacked, self.stacked())}
        found = []
        for layer, shapes in self.shapes.items():
            central_S = getattr(self.common, f"{layer}_central").to(dtype)
            bias_S = None if self.own_biases else self._bias(layer).to(dtype)
            weights, biases = [], []
            for s, (own, count) in enumerate(zip(slices, counts)):
                if count:
                    tensors = [
                        central_S[s] if k == self.middle else outer[f"{layer}_tensor{k + 1}"][own]
                        for k in range(len(shapes))
                    ]
                    weights.append(rebuild(tensors))
                    own_bias = outer[f"{layer}_bias"][own] if bias_S is None else bias_S[s]
                    biases.append(own_bias.expand(count, -1))
            found += [
                torch.cat(parts) if len(parts) > 1 else parts[0] for parts in (weights, biases)
            ]
        return found

    def skipped_by_update(self, draw):
        centrals = [getattr(self.common, f"{layer}_central") for layer in LAYERS]
        return [c for c in centrals if draw.random() < self.options.mpo_central_mask_prob]

    def params_used(self, visible, choices):
        return choices * (2 * self.embed_dim * self.ffn_dim + self.embed_dim + self.ffn_dim)

    def forward_flops(self):
        return sum(self.strata) * sum(map(rebuild_flops, self.shapes.values()))

    # ----------------------------------------------------------------------------------
    # when the kept weights are no longer those of the tensors

    def train(self, mode=True):
        self._rebuilt = None
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self._rebuilt = None
        return super()._apply(*args, **kwargs)

    def gather(self):
        self._rebuilt = None
        super().gather()

    def release(self):
        self._rebuilt = None
        super().release()


def _state(tensor):
    """Changes when another tensor takes its place, or when its values are changed in place."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def _orthonormal(num_experts, shape, before):
    """Random (E, d, i, j, d') of norm-preserving tensors, before or after the central one."""
    d, i, j, after = shape
    rows, columns = (d * i * j, after) if before else (i * j * after, d)
    q, r = torch.linalg.qr(torch.randn(num_experts, rows, columns))
    q = q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
    return (q if before else q.transpose(1, 2)).reshape(num_experts, *shape)
