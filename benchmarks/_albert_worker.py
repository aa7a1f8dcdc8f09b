"""One library's training step of ALBERT, in a process of its own; see `albert_step`.

Reads a number of steps from each line of standard input, takes them, and answers with seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Step = Callable[[], Any]
"""Begins one step and returns its loss, which need not be there yet."""


class Work(NamedTuple):
    """What is computed in a step."""

    rows: int
    seq: int
    model: str
    """A preset's name."""
    precision: str
    """`"32-true"` or `"bf16-mixed"`."""


def batch_of(work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Ids, and labels at 20 of 128 places, -100 elsewhere."""
    rows, seq = work.rows, work.seq
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


def jaxlightning(work: Work, masks: bool, **how: Any) -> tuple[Step, dict[str, float]]:
    """The step that the Trainer compiles: the same StableHLO, as its tests hold."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax

    from albert_task import AlbertConfig, AlbertForMaskedLM
    from jaxlightning._precision import Precision, cast_task

    start = time.perf_counter()
    precision = Precision.named(work.precision)
    config: Any = AlbertConfig.preset(work.model, **how)
    task = eqx.filter_jit(AlbertForMaskedLM.init)(
        config, jax.random.key(0), predictions=predictions(work.seq)
    )
    params, static = eqx.partition(task, eqx.is_inexact_array)
    tx = optax.adamw(1e-4)
    state = [params, jax.jit(tx.init)(params)]
    jax.block_until_ready(state)
    init_s = time.perf_counter() - start
    ids, labels = batch_of(work)
    batch = {"input_ids": jnp.asarray(ids)} | ({} if masks else {"labels": jnp.asarray(labels)})

    def step(params: Any, opt_state: Any, batch: Any, number: Any) -> Any:
        def loss_of(params: Any) -> Any:
            key = jax.random.fold_in(jax.random.key(1), number)
            task: Any = cast_task(eqx.combine(params, static), precision.compute)
            return task.training_step(batch, key=key)[0].compute()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    program, facts = compiled(step, *state, batch, jnp.int32(0))

    def run() -> Any:
        state[0], state[1], loss = program(*state, batch, jnp.int32(1))
        return loss

    return run, facts | {"init_s": init_s}


def flax(work: Work) -> tuple[Step, dict[str, float]]:
    """transformers' last Flax model, with the loss and optimizer of its script run_mlm_flax.py."""
    import jax
    import jax.numpy as jnp
    import optax
    from transformers import AlbertConfig, FlaxAlbertForMaskedLM

    start = time.perf_counter()
    if work.precision != "32-true":
        raise SystemExit("Flax is measured in float32.")
    config = AlbertConfig(**sizes(work.model))
    model = FlaxAlbertForMaskedLM(config, input_shape=(1, work.seq), seed=0)
    tx = optax.adamw(1e-4)
    state = [model.params, tx.init(model.params)]
    jax.block_until_ready(state)
    init_s = time.perf_counter() - start
    ids, labels = map(jnp.asarray, batch_of(work))

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

    def run() -> Any:
        state[0], state[1], loss = program(*state, ids, labels, jnp.int32(1))
        return loss

    return run, facts | {"init_s": init_s}


def torch(work: Work) -> tuple[Step, dict[str, float]]:
    """transformers' torch model with scaled dot-product attention, and torch's AdamW; on a GPU
    compiled, autocast and fused."""
    import torch as library
    from transformers import AlbertConfig, AlbertForMaskedLM

    start = time.perf_counter()
    on_gpu = library.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    config: Any = AlbertConfig(**sizes(work.model), attn_implementation="sdpa")
    model: Any = AlbertForMaskedLM(config).to(device).train()
    optimizer = library.optim.AdamW(model.parameters(), lr=1e-4, fused=on_gpu)
    if on_gpu:
        model = library.compile(model)
    init_s = time.perf_counter() - start
    ids, labels = (
        library.tensor(array, dtype=library.long, device=device) for array in batch_of(work)
    )
    half = work.precision == "bf16-mixed"

    def run() -> Any:
        with library.autocast(device, library.bfloat16, enabled=half):
            loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run, {"init_s": init_s}


def matmul(work: Work) -> tuple[Step, dict[str, float]]:
    """Products of square matrices, one after the other: `matmuls` says how many."""
    import jax
    import jax.numpy as jnp

    from jaxlightning._precision import Precision

    dtype = Precision.named(work.precision).compute
    count, size = matmuls(work.precision)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    b = jax.random.normal(jax.random.key(1), (size, size), dtype) / jnp.asarray(size**0.5, dtype)
    product = jax.jit(lambda a, b: jax.lax.fori_loop(0, count, lambda _, a: a @ b, a)[0, 0])
    return lambda: product(a, b), {}


def matmuls(precision: str) -> tuple[int, int]:
    """How many products of matrices how large; many, where one would be over before it is timed."""
    return (1, 4096) if precision == "32-true" else (8, 8192)


def sizes(model: str) -> dict[str, int]:
    """A preset's, by transformers' names, whose defaults are those of xxlarge."""
    from albert_task import AlbertConfig

    config: Any = AlbertConfig.preset(model)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: getattr(config, name) for name in names}


def peak_mb(case: str) -> float:
    """The most memory that was in use: of the GPU, or else of the process."""
    if case == "torch":
        import torch as library

        if library.cuda.is_available():
            return library.cuda.max_memory_allocated() / 1e6
    else:
        import jax

        found = jax.devices()[0].memory_stats()
        if found and "peak_bytes_in_use" in found:
            return found["peak_bytes_in_use"] / 1e6
    with open("/proc/self/status") as file:
        line = next((line for line in file if line.startswith("VmHWM")), "VmHWM: 0")
    return int(line.split()[1]) / 1e3


def main() -> None:
    case, rows, seq, model, precision = sys.argv[1:]
    work = Work(int(rows), int(seq), model, precision)
    lean = {"scan_layers": True, "remat": "dots_with_no_batch_dims_saveable"}
    makers: dict[str, Callable[[], tuple[Step, dict[str, float]]]] = {
        "jaxlightning": lambda: jaxlightning(work, masks=True),
        "jaxlightning_lean": lambda: jaxlightning(work, masks=True, **lean),
        "jaxlightning_given_labels": lambda: jaxlightning(work, masks=False, **lean),
        "jaxlightning_scan": lambda: jaxlightning(work, masks=True, scan_layers=True),
        "jaxlightning_xla_attention": lambda: jaxlightning(work, masks=True, attention="xla"),
        "jaxlightning_unrolled_labels": lambda: jaxlightning(work, masks=False),
        "flax": lambda: flax(work),
        "torch": lambda: torch(work),
        "matmul": lambda: matmul(work),
    }
    run, facts = makers[case]()
    loss = float(run())
    if not np.isfinite(loss):
        raise SystemExit(f"{case}: the loss is {loss}")
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            last = run()
        float(last)
        print(json.dumps(time.perf_counter() - start), flush=True)
    print(json.dumps(peak_mb(case)), flush=True)


if __name__ == "__main__":
    main()
