"""Flax modules in tasks: nothing but the adapter added.

class Classifier(TaskModule):
    net: NNX

    def training_step(self, batch, *, key):
        logits, net = self.net(batch["x"], key=key)
        ...
        return loss, metrics, eqx.tree_at(lambda t: t.net, self, net)
"""

from ._linen import Linen as Linen
from ._nnx import NNX as NNX
