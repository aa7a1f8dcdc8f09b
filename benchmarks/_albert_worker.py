"""One library's training step of ALBERT-base, in a process of its own; see `albert_step`.

Reads a number of steps from each line of standard input, takes them, and answers with seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Step = Callable[[], float]
"""Takes one step and returns its loss, waited for."""


def batch_of(rows: int, seq: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids, and labels at 20 of 128 places, -100 elsewhere."""
    generator = np.random.default_rng(0)
    ids = generator.integers(5, 30_000, (rows, seq)).astype(np.int32)
    ids[:, 0], ids[:, -1] = 2, 3
    count = predictions(seq)
    labels = np.full((rows, seq), -100, np.int32)
    for row in range(rows):
        chosen = 1 + generator.permutation(seq - 2)[:count]
        labels[row, chosen] = ids[row, chosen]
        ids[row, chosen] = 4
    return ids, labels


def predictions(seq: int) -> int:
    return 20 if seq == 128 else round(0.15 * seq)


def compiled(step: Any, *arguments: Any) -> tuple[Any, dict[str, float]]:
    import jax

    start = time.perf_counter()
    found = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory: Any = found.memory_analysis()
    return found, {"compile_s": seconds, "temporary_mb": memory.temp_size_in_bytes / 1e6}


def jaxlightning(rows: int, seq: int, masks: bool, **how: Any) -> tuple[Step, dict[str, float]]:
    """The step that the Trainer compiles: the same StableHLO, as its tests hold."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax

    from albert_task import AlbertConfig, AlbertForMaskedLM

    start = time.perf_counter()
    config = AlbertConfig.preset("base", **how)
    task = eqx.filter_jit(AlbertForMaskedLM.init)(
        config, jax.random.key(0), predictions=predictions(seq)
    )
    params, static = eqx.partition(task, eqx.is_inexact_array)
    tx = optax.adamw(1e-4)
    state = [params, jax.jit(tx.init)(params)]
    jax.block_until_ready(state)
    init_s = time.perf_counter() - start
    ids, labels = batch_of(rows, seq)
    batch = {"input_ids": jnp.asarray(ids)} | ({} if masks else {"labels": jnp.asarray(labels)})

    def step(params: Any, opt_state: Any, batch: Any, number: Any) -> Any:
        def loss_of(params: Any) -> Any:
            key = jax.random.fold_in(jax.random.key(1), number)
            return eqx.combine(params, static).training_step(batch, key=key)[0].compute()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    program, facts = compiled(step, *state, batch, jnp.int32(0))

    def run() -> float:
        state[0], state[1], loss = program(*state, batch, jnp.int32(1))
        return float(loss)

    return run, facts | {"init_s": init_s}


def flax(rows: int, seq: int) -> tuple[Step, dict[str, float]]:
    """transformers' last Flax model, with the loss and optimizer of its script run_mlm_flax.py."""
    import jax
    import jax.numpy as jnp
    import optax
    from transformers import AlbertConfig, FlaxAlbertForMaskedLM

    start = time.perf_counter()
    config = AlbertConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    model = FlaxAlbertForMaskedLM(config, input_shape=(1, seq), seed=0)
    tx = optax.adamw(1e-4)
    state = [model.params, tx.init(model.params)]
    jax.block_until_ready(state)
    init_s = time.perf_counter() - start
    ids, labels = map(jnp.asarray, batch_of(rows, seq))

    def step(params: Any, opt_state: Any, ids: Any, labels: Any, number: Any) -> Any:
        def loss_of(params: Any) -> Any:
            key = jax.random.fold_in(jax.random.key(1), number)
            logits = model(ids, params=params, dropout_rng=key, train=True).logits
            weights = (labels >= 0).astype(jnp.float32)
            goals = jnp.maximum(labels, 0)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, goals) * weights
            return losses.sum() / weights.sum()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    program, facts = compiled(step, *state, ids, labels, jnp.int32(0))

    def run() -> float:
        state[0], state[1], loss = program(*state, ids, labels, jnp.int32(1))
        return float(loss)

    return run, facts | {"init_s": init_s}


def torch(rows: int, seq: int) -> tuple[Step, dict[str, float]]:
    """transformers' torch model with scaled dot-product attention, and torch's AdamW."""
    import torch as library
    from transformers import AlbertConfig, AlbertForMaskedLM

    start = time.perf_counter()
    config = AlbertConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    model = AlbertForMaskedLM(config).train()
    optimizer = library.optim.AdamW(model.parameters(), lr=1e-4)
    init_s = time.perf_counter() - start
    ids, labels = (library.tensor(array, dtype=library.long) for array in batch_of(rows, seq))

    def run() -> float:
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return run, {"init_s": init_s}


def matmul(rows: int, seq: int) -> tuple[Step, dict[str, float]]:
    """A product of 4096 × 4096 matrices."""
    import jax
    import jax.numpy as jnp

    a = jax.random.normal(jax.random.key(0), (4096, 4096), jnp.float32)
    product = jax.jit(lambda a: a @ a)

    def run() -> float:
        return float(product(a)[0, 0])

    return run, {}


def main() -> None:
    case, rows, seq = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    lean = {"scan_layers": True, "remat": "dots_with_no_batch_dims_saveable"}
    makers: dict[str, Callable[[], tuple[Step, dict[str, float]]]] = {
        "jaxlightning": lambda: jaxlightning(rows, seq, masks=True),
        "jaxlightning_lean": lambda: jaxlightning(rows, seq, masks=True, **lean),
        "jaxlightning_given_labels": lambda: jaxlightning(rows, seq, masks=False, **lean),
        "flax": lambda: flax(rows, seq),
        "torch": lambda: torch(rows, seq),
        "matmul": lambda: matmul(rows, seq),
    }
    run, facts = makers[case]()
    loss = run()
    if not np.isfinite(loss):
        raise SystemExit(f"{case}: the loss is {loss}")
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            run()
        print(json.dumps(time.perf_counter() - start), flush=True)
    with open("/proc/self/status") as file:
        peak = next((line for line in file if line.startswith("VmHWM")), "VmHWM: 0")
    print(json.dumps(int(peak.split()[1]) / 1e3), flush=True)


if __name__ == "__main__":
    main()
