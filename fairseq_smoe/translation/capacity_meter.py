"""Mean requested capacity per expert layer, over all tokens that a model processes."""

from fairseq_smoe.translation.layers import expert_layers


class CapacityMeter:
    """Counts passes in forward hooks on the expert blocks of some models.

    In generation, the encoder's tokens are the source tokens, and the decoder's are those of every
    beam and step.

    Attributes:
        layers: ``{layer name: [sum of passes, number of tokens]}``
        sentences: sentences counted by the caller.
    """

    def __init__(self, models):
        self.layers = {}
        self.sentences = 0
        for model in models:
            for name, layer in expert_layers(model):
                sums = self.layers.setdefault(name, [0, 0])  # shared by the models of an ensemble
                layer.expert_block.register_forward_hook(self._hook(sums))

    def _hook(self, sums):
        def count(block, inputs, output):
            passes = output[1].passes
            # not in place: one call may be in inference mode and the next one not
            sums[:] = sums[0] + passes.sum(), sums[1] + passes.gt(0).sum()

        return count

    def summary(self):
        """Mean requested capacity per side and per layer, as plain numbers."""
        layers = {name: _mean([sums]) for name, sums in self.layers.items()}
        sides = {
            side: _mean([sums for name, sums in self.layers.items() if name.startswith(side)])
            for side in ("encoder", "decoder")
        }
        return {"sentences": self.sentences, **sides, "layers": layers}


def _mean(sums):
    tokens = int(sum(count for _, count in sums))
    return float(sum(passes for passes, _ in sums)) / tokens if tokens else None
