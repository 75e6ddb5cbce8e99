"""Layer drop that drops the same layers in all processes of a training."""

import random

from fairseq.modules import LayerDropModuleList
from torch import nn


class SharedLayerDrop(LayerDropModuleList):
    """The layers of one side of a model, some of which are left out at random in training.

    fairseq draws from torch's global generator. Dropout draws from it too, as many numbers as the
    batch has entries, so processes with different batches soon drop different layers. Those that
    share experts or sharded parameters would then wait for each other in different layers. Here
    the layers depend only on the side and on the seed of the update, and no other random numbers
    are used up.

    Args:
        p: probability with which a layer is dropped.
        layers: the layers.
        side: "encoder" or "decoder", which drop independently.
    """

    def __init__(self, p, layers, side):
        super().__init__(p, layers)
        self.side = side
        self.begin_update(0)

    def begin_update(self, seed):
        """Make the next draws depend on ``seed``; it has to be the same in all processes."""
        self._draws = random.Random(f"{self.side} {seed}")

    def __iter__(self):
        for layer in nn.ModuleList.__iter__(self):
            if not self.training or self._draws.random() > self.p:
                yield layer


def drop_alike(layers, side):
    """``layers`` as :class:`SharedLayerDrop` if fairseq drops some of them, else unchanged."""
    if isinstance(layers, LayerDropModuleList):
        return SharedLayerDrop(layers.p, list(nn.ModuleList.__iter__(layers)), side)
    return layers


def drops_layers(model):
    """Whether any layers of a model are dropped alike."""
    return any(True for _ in _lists(model))


def begin_update(model, seed):
    """Prepare the layer drop of a model for an update. See :meth:`SharedLayerDrop.begin_update`."""
    for layers in _lists(model):
        layers.begin_update(seed)


def _lists(model):
    return (module for module in model.modules() if isinstance(module, SharedLayerDrop))
