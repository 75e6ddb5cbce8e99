"""A translation model whose feed-forward sublayers are mixtures of experts in strata.

Xu et al. 2023, "Towards Being Parameter-Efficient: A Stratified Sparsely Activated Transformer with
Dynamic Capacity", arXiv 2305.02176. Everything but the expert layers is that of M2M-100. Experts
have no capacity: no token is dropped, and what else is in a batch does not change a token's output.

Letters in names: T tokens, H tokens at a gate, D model dim, F hidden dim, E experts, K choices.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import M2M100Config, M2M100ForConditionalGeneration
from transformers.activations import ACT2FN
from transformers.models.m2m_100.modeling_m2m_100 import M2M100DecoderLayer, M2M100EncoderLayer


class SMoEConfig(M2M100Config):
    """The configuration of M2M-100, and what there is to know of the expert layers.

    Attributes:
        strata: number of experts in each stratum; one number for a plain mixture of experts.
        experts_per_token: experts that a token visits in each pass, 1 or 2.
        expert_norm: "paper", or "released" for what the authors' code computes: from the second
            pass on the residual is the normalised input, and another LayerNorm ends the block.
        expert_layers: ``{"encoder": [...], "decoder": [...]}``, the expert layers, from 0.
        expert_dim: hidden width of the experts.
        gate_bias: whether gates have a bias.
        output_scale: what outputs of experts are multiplied with.
        pass_scale: whether the output of every pass has a trained factor.
    """

    model_type = "smoe"

    strata = (1,)
    experts_per_token = 2
    expert_norm = "paper"
    expert_layers = {"encoder": (), "decoder": ()}
    expert_dim = 4096
    gate_bias = False
    output_scale = 1.0
    pass_scale = False


class Experts(nn.Module):
    """Two-layer feed-forward networks in stacked parameters.

    Args:
        config: :class:`SMoEConfig`
    """

    def __init__(self, config):
        super().__init__()
        number, width, hidden = sum(config.strata), config.d_model, config.expert_dim
        self.activation = ACT2FN[config.activation_function]
        self.dropout = config.activation_dropout
        self.fc1_weight = nn.Parameter(torch.empty(number, width, hidden))
        self.fc1_bias = nn.Parameter(torch.empty(number, hidden))
        self.fc2_weight = nn.Parameter(torch.empty(number, hidden, width))
        self.fc2_bias = nn.Parameter(torch.empty(number, width))

    def forward(self, tokens_HD, expert_HK, weight_HK):
        """The weighted sum of the outputs of each token's experts, (H, D)."""
        sum_HD = torch.zeros_like(tokens_HD)
        for expert in expert_HK.unique().tolist():
            row, choice = (expert_HK == expert).nonzero(as_tuple=True)
            hidden = tokens_HD[row] @ self.fc1_weight[expert] + self.fc1_bias[expert]
            hidden = F.dropout(self.activation(hidden), self.dropout, self.training)
            output = hidden @ self.fc2_weight[expert] + self.fc2_bias[expert]
            sum_HD.index_add_(0, row, output * weight_HK[row, choice].unsqueeze(1).to(output.dtype))
        return sum_HD


class ExpertBlock(nn.Module):
    """A feed-forward sublayer with its LayerNorms and residual connections.

    A token enters at the first stratum. Its experts are chosen among those of this and all later
    strata, and their output is added to it. It then goes on to the stratum after that of its best
    expert, and leaves behind the last.

    Args:
        config: :class:`SMoEConfig`
    """

    def __init__(self, config):
        super().__init__()
        self.top_k, self.dropout = config.experts_per_token, config.dropout
        self.released = config.expert_norm == "released"
        self.output_scale = config.output_scale
        strata, width = tuple(config.strata), config.d_model
        self.starts = [sum(strata[:i]) for i in range(len(strata))]
        self.norms = nn.ModuleList(
            nn.LayerNorm(width) for _ in range(len(strata) + int(self.released))
        )
        self.gates = nn.ModuleList(
            nn.Linear(width, sum(strata) - start, bias=config.gate_bias) for start in self.starts
        )
        self.experts = Experts(config)
        scale = nn.Parameter(torch.ones(len(strata))) if config.pass_scale else None
        self.register_parameter("pass_scale", scale)

    def forward(self, hidden_states):
        """(..., D) -> (..., D)"""
        tokens_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        stratum_T = torch.zeros(len(tokens_TD), dtype=torch.long, device=tokens_TD.device)
        for i, start in enumerate(self.starts):
            here_H = (stratum_T == i).nonzero().squeeze(1)
            x_HD = tokens_TD[here_H]
            normed_HD = self.norms[i](x_HD)
            expert_HK, weight_HK = self.route(i, normed_HD)
            y_HD = self.experts(normed_HD, expert_HK + start, weight_HK * self.output_scale)
            if self.pass_scale is not None:
                y_HD = y_HD * self.pass_scale[i]
            residual_HD = normed_HD if self.released and i else x_HD
            y_HD = residual_HD + F.dropout(y_HD, self.dropout, self.training)
            tokens_TD = tokens_TD.index_copy(0, here_H, y_HD.to(tokens_TD.dtype))
            # the stratum of the best expert is the number of later strata that begin up to it
            best_H = expert_HK[:, 0] + start
            next_H = 1 + sum((best_H >= later).long() for later in self.starts[1:])
            stratum_T = stratum_T.index_copy(0, here_H, torch.zeros_like(best_H) + next_H)
        if self.released:
            tokens_TD = self.norms[-1](tokens_TD)
        return tokens_TD.view_as(hidden_states)

    def route(self, i, normed_HD):
        """Experts of each token among those that gate ``i`` sees, best first, and their weights;
        both (H, K). Gates compute in float32 whatever the type of the model."""
        gate = self.gates[i]
        with torch.autocast(normed_HD.device.type, enabled=False):
            bias = None if gate.bias is None else gate.bias.float()
            logits_HE = F.linear(normed_HD.float(), gate.weight.float(), bias)
        expert_HK = logits_HE.topk(min(self.top_k, logits_HE.shape[1]), dim=1).indices
        weight_HK = logits_HE.softmax(dim=1).gather(1, expert_HK)
        if expert_HK.shape[1] > 1:
            eps = torch.finfo(weight_HK.dtype).eps
            weight_HK = weight_HK / weight_HK.sum(dim=1, keepdim=True).clamp(min=eps)
        return expert_HK, weight_HK


class _NoFFN(nn.Module):
    """In place of the first layer of a dense sublayer, which then adds 0."""

    def forward(self, hidden_states):
        return hidden_states.new_zeros(())


class _WithExperts:
    """An M2M-100 layer that ends with an expert block instead of its feed-forward sublayer."""

    def add_experts(self, config):
        self.final_layer_norm = nn.Identity()  # the block has its own
        self.fc1, self.activation_fn, self.fc2 = _NoFFN(), nn.Identity(), nn.Identity()
        self.expert_block = ExpertBlock(config)

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if isinstance(output, tuple):  # before transformers 5
            return (self.expert_block(output[0]), *output[1:])
        return self.expert_block(output)


class SMoEEncoderLayer(_WithExperts, M2M100EncoderLayer):
    def __init__(self, config):
        super().__init__(config)
        self.add_experts(config)


class SMoEDecoderLayer(_WithExperts, M2M100DecoderLayer):
    def __init__(self, config, layer_idx=None):
        super().__init__(config, layer_idx)
        self.add_experts(config)


class SMoEForConditionalGeneration(M2M100ForConditionalGeneration):
    """M2M-100 with expert layers. For translation: nothing balances the experts in training."""

    config_class = SMoEConfig

    def __init__(self, config):
        super().__init__(config)
        encoder, decoder = self.model.encoder.layers, self.model.decoder.layers
        for i in config.expert_layers["encoder"]:
            encoder[i] = SMoEEncoderLayer(config)
        for i in config.expert_layers["decoder"]:
            decoder[i] = SMoEDecoderLayer(config, layer_idx=i)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Experts):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=self.config.init_std)
