"""Runs of several tasks on 8 virtual devices, each compared with the run on one.

    JAX_NUM_CPU_DEVICES=8 python devices_job.py TASK ACCUMULATE STEPS [STRATEGY ...]

Prints a line of JSON for each strategy: the largest differences of losses and of parameters from
those on one device, the first and the last loss, and the share of the state on each device.
"""

import json
import sys

import equinox as eqx
import jax
import numpy as np
from stacked import Layered, Sharded, Transformer, series
from tasks import quiet, rows

from albert_task import AlbertConfig, AlbertForMaskedLM
from jaxlightning import Callback, DataLoader

STRATEGIES = {
    "one": {"devices": 1},
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "tensor": {"mesh": {"data": 4, "tensor": 2}, "strategy": "tensor"},
    "fsdp x tensor": {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "strategy": "fsdp"},
    "context": {"mesh": {"data": 4, "context": 2}},
}


def albert():
    config = AlbertConfig(
        vocab_size=136,
        embedding_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    return AlbertForMaskedLM.init(
        config, jax.random.key(0), optimizer="adamw", learning_rate=1e-3, total_steps=1000
    )


def texts(count=128):
    """Rows of unequal lengths, the long ones first: devices have different numbers of masks."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 128, (count, 16)).astype(np.int32)
    lengths = np.sort(generator.integers(4, 17, count))[::-1]
    return {"tokens": np.where(np.arange(16)[None] < lengths[:, None], tokens, 0)}


TASKS = {
    "albert": (albert, texts),
    "transformer": (lambda: Transformer(width=64), series),
    "layered": (Layered, series),
    "mlp": (Sharded, lambda: rows(128)),
}


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def run(make, data, accumulate, steps, arguments):
    losses = Losses()
    trainer = quiet(
        max_steps=steps,
        callbacks=losses,
        **{"devices": "auto", "accumulate_grad_batches": accumulate} | arguments,
    )
    trained = trainer.fit(make(), DataLoader(data(), 16))
    leaves = jax.tree.leaves(eqx.filter(trained, eqx.is_inexact_array))
    state = jax.tree.leaves((trainer.state.task, trainer.state.opt_state))
    state = [leaf for leaf in state if eqx.is_array(leaf)]
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in state)
    share = held / sum(leaf.nbytes for leaf in state)
    return share, (losses.losses, list(map(np.asarray, leaves)))


def largest(a, b):
    return max(
        float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(a, b, strict=True)
    )


def main(task, accumulate, steps, *strategies):
    found = {}
    for name, arguments in STRATEGIES.items():
        if name not in ("one", *(strategies or STRATEGIES)):
            continue
        if name == "context" and task != "albert":
            continue
        share, found[name] = run(*TASKS[task], int(accumulate), int(steps), arguments)
        losses, _ = found[name]
        assert len(losses) == int(steps)
        differences = [largest(a, b) for a, b in zip(found[name], found["one"], strict=True)]
        first_to_last = [losses[0], losses[-1]]
        print(json.dumps([name, *differences, *first_to_last, share]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
