"""Short documents, several packed into a row by Grain, for a causal character model.

python -m examples.packed_grain

Without packing most of each row would be padding. The pipeline is passed to `fit` as it is: a
resumed run goes on at the very batch, in the middle of a row that is being packed.
"""

from __future__ import annotations

from functools import partial
from pydoc_data.topics import topics
from typing import Any

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxlightning import Mean, TaskModule, Trainer

from .char_model import ASCII, encode

LENGTH = 128


def paragraphs(limit: int | None = None) -> list[dict[str, Int[np.ndarray, " length"]]]:
    """Those of the Python language reference that fit a row."""
    texts = [topics[name] for name in sorted(topics)[:limit]]
    found = [encode(part.strip()) for text in texts for part in text.split("\n\n")]
    return [{"text": part} for part in found if 8 <= len(part) <= LENGTH]


def packed(documents: list[Any], *, train: bool, workers: int = 0) -> grain.IterDataset:
    """Batches of rows: characters, and for each its document's number in the row (0: padding)
    and its place in the document."""
    rows = grain.MapDataset.source(documents)
    if train:  # without an end, so that epochs go on where the last one stopped
        rows = rows.seed(0).shuffle().repeat()
    pack = grain.experimental.FirstFitPackIterDataset
    lines = pack(rows.to_iter_dataset(), length_struct={"text": LENGTH}, num_packing_bins=16)
    # The last batch of validation is filled up with empty rows, which weigh nothing.
    pad = partial(grain.experimental.batch_and_pad, batch_size=16)
    batches = lines.batch(16, batch_fn=None if train else pad)
    return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


class PackedModel(TaskModule):
    """One block of attention, in which documents of a row don't see each other."""

    embed: eqx.nn.Embedding
    places: Float[Array, "length size"]
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norm: eqx.nn.LayerNorm

    def __init__(self, size: int, *, key: PRNGKeyArray):
        one, two, three = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(ASCII, size, key=one)
        self.places = jnp.zeros((LENGTH, size))
        self.attention = eqx.nn.MultiheadAttention(4, size, key=two)
        self.mlp = eqx.nn.MLP(size, ASCII, 4 * size, depth=1, activation=jax.nn.gelu, key=three)
        self.norm = eqx.nn.LayerNorm(size)

    def __call__(
        self,
        text: Int[Array, " length"],
        document: Int[Array, " length"],
        place: Int[Array, " length"],
    ) -> Float[Array, "length codes"]:
        x = jax.vmap(self.embed)(text) + self.places[place]
        mask = jnp.tril(document[:, None] == document[None, :])
        y = jax.vmap(self.norm)(x)
        return jax.vmap(self.mlp)(x + self.attention(y, y, y, mask=mask))

    def training_step(self, batch, *, key):
        text, document = batch["text"], batch["text_segment_ids"]
        logits = jax.vmap(self)(text, document, batch["text_positions"])[:, :-1]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
        follows = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] > 0)
        filled = (document > 0).astype(jnp.float32)
        return Mean.over(nll, follows), {"filled": Mean.over(filled)}

    def configure_optimizers(self):
        return optax.adamw(1e-2)


def main(
    max_epochs: int = 2, limit: int | None = None, workers: int = 0, **options: Any
) -> dict[str, float]:
    """The loss on documents held out, in nats a character; how much of the rows is filled, and
    would be with one document in each."""
    documents = paragraphs(limit)
    held_out, kept = documents[::10], [d for i, d in enumerate(documents) if i % 10]
    trainer = Trainer(max_epochs=max_epochs, limit_train_batches=60, **options)
    trainer.fit(
        lambda key: PackedModel(32, key=key),
        packed(kept, train=True, workers=workers),
        packed(held_out, train=False),
    )
    alone = float(np.mean([len(document["text"]) for document in kept])) / LENGTH
    filled = trainer.callback_metrics["train/filled_epoch"]
    return {"loss": trainer.callback_metrics["val/loss"], "filled": filled, "alone": alone}


if __name__ == "__main__":
    found = main(default_root_dir="runs/packed_grain")
    print(", ".join(f"{name}: {value:.2f}" for name, value in found.items()))
