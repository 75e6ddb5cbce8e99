"""Output layers that begin smaller with depth, to which every pass through a stratum counts.

Zhang, Titov, Sennrich 2019, "Improving Deep Transformer with Depth-Scaled Initialization and Merged
Attention" (arXiv 1908.11365), with alpha = 1, for the layers whose outputs are added to the
residual branch: its variance then grows with the logarithm of the depth instead of the depth.
"""

import torch

from fairseq_smoe.moe.block import SMoEBlock

DEPTH_INIT_EXPERTS = ("ffn", "sized")


@torch.no_grad()
def scale_by_depth(model):
    """Divide the weights of output layers by the root of their depth, in encoder and decoder.

    The depth of attention and of a dense FFN is the number of its layer, from 1, with the passes of
    the expert layers before it counted as layers. An expert of stratum i is as deep as if its
    tokens had passed through all earlier strata of their block.

    Args:
        model: a :class:`~fairseq_smoe.translation.model.SMoETransformer` with experts of
            :data:`DEPTH_INIT_EXPERTS`.
    """
    for stack in (model.encoder, model.decoder):
        depth = 1
        for layer in stack.layers.children():  # iterating would leave out layers that drop
            for name in ("self_attn", "encoder_attn"):
                attention = getattr(layer, name, None)
                if attention is not None:
                    attention.out_proj.weight.div_(depth**0.5)
            blocks = [module for module in layer.modules() if isinstance(module, SMoEBlock)]
            for block in blocks:
                depth_E = depth + block.stratum_of_expert[list(block.experts.held)]
                block.experts.fc2_weight.div_(depth_E.sqrt().view(-1, 1, 1))
                depth += len(block.strata)
            if not blocks:
                layer.fc2.weight.div_(depth**0.5)
                depth += 1
