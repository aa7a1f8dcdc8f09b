"""Tokens a second that the input side gives: rows from the token store, masks, and who waits.

    python -m benchmarks.input_pipeline
    python -m benchmarks.input_pipeline --tokens 2000000 --rounds 3

All of it runs on one core. `rows` are whole epochs of `SegmentRows`, planned and written, and
`stream` the rows of `albert pretrain`'s default. `masking` is the compiled program alone. `step`
trains a small ALBERT from the store, beside one that gets the same batch again and again, and
says what share of the time making batches took (in a thread of its own).
`transformers_collator` is masking of single tokens on the host by transformers' collator, where
that is installed. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from albert_task import (
    AlbertConfig,
    AlbertForPreTraining,
    RowLoader,
    SegmentRows,
    SpecialIds,
    TokenStore,
    WordStarts,
    mask_tokens,
)
from albert_task._data import TokenRows
from jaxlightning import Callback, DataLoader, Trainer

SPECIAL = SpecialIds(0, 1, 2, 3, 4)
VOCAB = 30_000


def made_store(tokens: int, folder: Path) -> TokenStore:
    """Documents of about 600 tokens in sentences of about 25, memory-mapped."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(8, 43, tokens // 25)
    begins = np.concatenate([[0], np.cumsum(lengths)])
    documents = np.arange(0, len(lengths) + 1, 24)
    offsets = begins[documents]
    ids = generator.integers(5, VOCAB, int(offsets[-1])).astype(np.uint16)
    ids[offsets[1:] - 1] = SPECIAL.sep
    ids.tofile(folder / "tokens.bin")
    header = {"special": SPECIAL._asdict(), "vocab_size": VOCAB, "text": "", "tokenizer": ""}
    mapped = np.memmap(folder / "tokens.bin", np.uint16, mode="r")
    sentences = begins[: documents[-1]]
    return TokenStore(folder, mapped, offsets, sentences, header)


def rate_of(run: Callable[[], int], rounds: int) -> float:
    """Tokens a second: the median of some rounds, after one that does not count."""
    rates = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        tokens = run()
        rates.append(tokens / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def of_rows(store: TokenStore, seq: int, pairs: bool, packed: bool) -> Callable[[], int]:
    rows = SegmentRows(store, np.arange(len(store)), seq, pairs=pairs, packed=packed)
    loader = RowLoader(rows, 256)
    epochs = iter(range(1, 1000))

    def run() -> int:
        return sum(batch["input_ids"].size for batch in loader.batches(next(epochs)))

    return run


def of_stream(store: TokenStore, seq: int) -> Callable[[], int]:
    loader = DataLoader(TokenRows(store, np.arange(len(store)), seq), 256, shuffle=True)
    return lambda: sum(batch["input_ids"].size for batch in loader.batches(1))


def of_masking(store: TokenStore, seq: int, predictions: int) -> Callable[[], int]:
    rows = SegmentRows(store, np.arange(len(store)), seq, packed=True)
    batch = jnp.asarray(rows.take(np.arange(256))["input_ids"])
    starts = WordStarts.from_table((np.random.default_rng(0).random(VOCAB) < 0.7).tolist())

    @jax.jit
    def masked(key: jax.Array) -> Any:
        return mask_tokens(
            batch,
            key,
            mask_id=SPECIAL.mask,
            special=SPECIAL,
            vocab_size=VOCAB,
            predictions=predictions,
            word_starts=starts,
            max_ngram=3,
        )

    def run() -> int:
        for number in range(20):
            found = masked(jax.random.key(number))
        jax.block_until_ready(found)
        return 20 * batch.size

    return run


def of_collator(store: TokenStore, seq: int) -> Callable[[], int]:
    """transformers' collator, of single tokens, on the same rows."""
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<unk>": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    vocabulary |= {f"p{n}": n for n in range(5, VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        pad_token="<pad>", unk_token="<unk>", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    rows = SegmentRows(store, np.arange(len(store)), seq, packed=True)
    ids = rows.take(np.arange(64))["input_ids"].tolist()

    def run() -> int:
        collator([{"input_ids": row} for row in ids])
        return 64 * seq

    return run


class Timed:
    """A loader that notes how long its batches took to make."""

    def __init__(self, loader: RowLoader):
        self.loader, self.seconds = loader, 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        own = self.loader.batches(epoch, start)
        while True:
            begin = time.perf_counter()
            batch = next(own, None)
            self.seconds += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    @property
    def batch_shapes(self) -> list[Any]:
        return self.loader.batch_shapes

    def fingerprint(self) -> dict[str, Any]:
        return self.loader.fingerprint()


def step(store: TokenStore, steps: int) -> dict[str, float]:
    """Trains a small ALBERT from the store, and from one batch again and again."""
    rows = SegmentRows(store, np.arange(len(store)), 128, pairs=True, packed=True)
    seconds = {}
    share = 0.0
    for case in ("again", "store"):
        loader = Timed(RowLoader(rows, 16))
        data: Any = [rows.take(np.arange(16))] * steps if case == "again" else loader
        config = AlbertConfig.preset("small", vocab_size=VOCAB)
        task = AlbertForPreTraining.init(config, jax.random.key(0), max_ngram=3)
        times: list[float] = []

        class Clock(Callback):
            def on_train_batch_end(self, *_: Any, times: list[float] = times, **__: Any) -> None:
                times.append(time.perf_counter())

        trainer = Trainer(max_steps=steps, logger=False, enable_checkpointing=False,
                          enable_progress_bar=False, enable_model_summary=False,
                          callbacks=[Clock()])  # fmt: skip
        trainer.fit(task, data)
        seconds[case] = statistics.median(np.diff(times[5:]).tolist())
        if case == "store":
            share = loader.seconds / len(times) / seconds["store"]
    return {"ratio_to_one_batch_again": seconds["store"] / seconds["again"], "making_share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=10_000_000, help="in the store")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # before JAX counts the cores
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    def tell(case: str, **values: Any) -> None:
        shown = {name: round(value, 4) for name, value in values.items()}
        print(json.dumps({"benchmark": "input_pipeline", "case": case, **shown}), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        store = made_store(options.tokens, Path(folder))
        for seq in (128, 512):
            for pairs, packed in ((False, False), (True, False), (True, True)):
                name = f"rows_{seq}" + "_pairs" * pairs + "_packed" * packed
                tell(name, tokens_per_s=rate_of(of_rows(store, seq, pairs, packed), options.rounds))
            tell(f"stream_{seq}", tokens_per_s=rate_of(of_stream(store, seq), options.rounds))
            rate = rate_of(of_masking(store, seq, 20 if seq == 128 else 76), options.rounds)
            tell(f"masking_{seq}", tokens_per_s=rate)
        if importlib.util.find_spec("transformers"):
            rate = rate_of(of_collator(store, 128), options.rounds)
            tell("transformers_collator", tokens_per_s=rate)
        else:
            print("transformers is not installed: no peer.", file=sys.stderr)
        tell("step", **step(store, options.steps))


if __name__ == "__main__":
    main()
