"""What comes before training: the text, its tokenizer, its tokens; each made once and kept.

FOLDER/corpus.jsonl      the embedded corpus, where no other text is given
FOLDER/tokenizer.json    the tokenizer, trained or given
FOLDER/tokens/           the encoded text
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._config import AlbertConfig
from ._corpus import build_corpus, python_sources, write_corpus
from ._data import PretrainingData
from ._files import read_json, write_json
from ._options import PretrainOptions
from ._run_folder import as_json, check_same_run, run_folder
from ._segments import SegmentRows
from ._store import TokenStore, encode_documents, open_tokens
from ._text import AllText, TextFiles, TextSource, open_dataset
from ._tokenizer import load_tokenizer, special_ids, tokenizer_hash, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tqdm import tqdm

_VOCAB_SIZE = 8000
_TOKENIZER_CHARACTERS = 20_000_000  # to train a tokenizer on; more is thinned out

_Size = Callable[[], tuple[int, int]]
"""Reads the text, once, for the number of its documents and of its characters."""

# Options that may change from one start of a run to the next.
_FREE = (
    "out", "max_time", "patience", "eval_interval", "keep", "devices", "strategy", "deterministic",
    "detect_anomaly", "profile",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that training needs, checked."""

    options: PretrainOptions
    folder: Path
    tokenizer: Tokenizer
    config: AlbertConfig
    data: PretrainingData
    identity: dict[str, Any]


def prepare(options: PretrainOptions) -> Prepared:
    """Goes through the stages that are not yet done. What cannot work fails here, before
    anything is computed on a device.

    **Raises:** `ValueError` and `OSError` with what is wrong and what to write instead.
    """
    folder = run_folder(options.out)
    options.config()
    tokenizer = _given_tokenizer(options)
    if tokenizer is None and options.vocab_size is not None:
        options.config(options.vocab_size)
    check_same_run(folder, _chosen(options))  # before a corpus is built
    sources = _sources(options, folder)
    source = AllText(sources)
    text = source.fingerprint()
    identity = _identity(options, text, tokenizer)
    check_same_run(folder, identity)
    size = functools.cache(lambda: _read(source))
    if tokenizer is None:
        tokenizer = _trained_tokenizer(options, source, text, size, folder)
    else:
        _made_of(folder).unlink(missing_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
    config = options.config(tokenizer.get_vocab_size(), special_ids(tokenizer).pad)
    alone = len(sources) == 1
    stores = [
        _tokens(
            one, size if alone else None, tokenizer, folder / f"tokens{'' if alone else f'-{i}'}"
        )
        for i, one in enumerate(sources)
    ]
    data = PretrainingData(
        stores,
        weights=options.weights or None,
        seq_len=options.seq_len,
        pairs=options.objective == "mlm+sop",
        packed=options.packed,
        short=options.short,
        batch_size=options.batch_size,
        val_fraction=options.val_fraction,
        max_val_rows=options.val_rows,
        seed=options.seed,
    )
    data.train_dataloader()  # so few rows that no batch is full: said now
    if options.objective == "mlm+sop":
        _check_pairs(data, options)
    return Prepared(options, folder, tokenizer, config, data, identity)


def _check_pairs(data: PretrainingData, options: PretrainOptions) -> None:
    """**Raises:** `ValueError` where no row has two segments whose order could be told."""
    for rows in data.train_rows:
        some = np.linspace(0, len(rows) - 1, min(len(rows), 1000), dtype=np.int64)
        assert isinstance(rows, SegmentRows)
        if (rows.take(some)["sentence_order_label"] >= 0).any():
            return
    raise ValueError(
        "No row has a pair of segments, whose order `--objective mlm+sop` asks for: documents have "
        f"one sentence, or rows of `--seq-len {options.seq_len}` no room for two. Write "
        "`--objective mlm`, longer rows, or give other text."
    )


# The run's identity


def _chosen(options: PretrainOptions) -> dict[str, Any]:
    # What the text, the tokenizer and the model hold counts, not where they lie.
    kept = (
        *_FREE,
        "text",
        "streaming",
        "dataset",
        "dataset_config",
        "text_column",
        "split",
        "tokenizer",
        "model",
        *([] if options.timed else ["steps", "epochs"]),
    )
    chosen = {k: v for k, v in dataclasses.asdict(options).items() if k not in kept}
    return as_json(chosen | {"model": options.fingerprint, "lr": options.peak})


def _identity(options: PretrainOptions, text: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    return _chosen(options) | {"text": text, "tokenizer": tokenizer and tokenizer_hash(tokenizer)}


# Stages


@contextlib.contextmanager
def stage(title: str, total: int | None = None, unit: str = "it") -> Iterator[tqdm[Any]]:
    """A progress bar that stays; where stderr is no terminal, a line every ten seconds."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=total,
        desc=f"{title:<10}",
        unit=unit,
        unit_scale=True,
        mininterval=interval,
        dynamic_ncols=True,
        file=sys.stderr,
    ) as bar:
        yield bar


def _sources(options: PretrainOptions, folder: Path) -> list[TextSource]:
    if options.weights:
        return [TextFiles(pattern, options.text_column) for pattern in options.text]
    if options.text:
        return [TextFiles(options.text, options.text_column)]
    if options.dataset:
        found = open_dataset(
            options.dataset,
            configuration=options.dataset_config,
            column=options.text_column,
            split=options.split,
            streaming=options.streaming,
        )
        return [found]
    path = folder / "corpus.jsonl"
    if not path.is_file():
        sources = python_sources()
        with stage("Corpus", len(sources), "file") as bar:
            corpus = build_corpus(sources, progress=lambda done, _: bar.update(done - bar.n))
        print(corpus.summary())
        write_corpus(corpus, path)
    return [TextFiles(path)]


def _given_tokenizer(options: PretrainOptions) -> Tokenizer | None:
    """The tokenizer of `--tokenizer`, or else that of a model that has weights."""
    if options.tokenizer is not None:
        path = Path(options.tokenizer)
    elif not options.random:
        path = options.folder
    else:
        return None
    tokenizer = load_tokenizer(path)
    size = tokenizer.get_vocab_size()
    if options.vocab_size not in (None, size):
        raise ValueError(
            f"`--vocab-size {options.vocab_size}`, but the tokenizer `{path}` has "
            f"{size} pieces. Leave `--vocab-size` out: it is for a tokenizer to be trained."
        )
    options.config(size)
    return tokenizer


def _made_of(folder: Path) -> Path:
    """What a trained tokenizer was trained on; not there where it was given."""
    return folder / "tokenizer.made-of.json"


def _trained_tokenizer(
    options: PretrainOptions, source: AllText, text: str, size: _Size, folder: Path
) -> Tokenizer:
    path, made_of = folder / "tokenizer.json", _made_of(folder)
    vocab_size = options.vocab_size or options.own_vocab_size or _VOCAB_SIZE
    wanted = {"text": text, "vocab_size": vocab_size}
    with contextlib.suppress(OSError, ValueError):
        if read_json(made_of) == wanted:
            return load_tokenizer(path)
    documents, characters = size()
    every = math.ceil(characters / _TOKENIZER_CHARACTERS)
    made_of.unlink(missing_ok=True)
    with stage("Tokenizer", -(-documents // every), "document") as bar:
        tokenizer = _train(source, vocab_size, every, bar)
    pieces = tokenizer.get_vocab_size()
    if pieces < vocab_size:
        print(f"The text suffices for a tokenizer of {pieces} pieces, not of {vocab_size}.")
    tokenizer.save(str(path))
    write_json(made_of, wanted)
    return tokenizer


def _train(source: AllText, vocab_size: int, every: int, bar: tqdm[Any]) -> Tokenizer:
    """Trains in a thread, which leaves the bar's clock running and Ctrl-C at work."""

    def texts() -> Iterator[str]:
        for number, document in enumerate(source):
            if number % every == 0:
                yield document.text
                bar.update()
        bar.set_postfix_str("choosing pieces")

    outcome: list[Any] = []

    def train() -> None:
        try:
            outcome.append(train_tokenizer(texts(), vocab_size))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=train, name="tokenizer", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        if sys.stderr.isatty():
            bar.refresh()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _read(source: AllText) -> tuple[int, int]:
    """The number of documents and of characters: what cannot be read is found here."""
    documents = characters = 0
    with stage("Reading", unit="document") as bar:
        for document in source:
            documents += 1
            characters += len(document.text)
            bar.update()
    if not characters:
        raise ValueError("The text is empty: it has no document. Give some: `--text 'corpus/*'`.")
    return documents, characters


def _tokens(
    source: TextSource, size: _Size | None, tokenizer: Tokenizer, folder: Path
) -> TokenStore:
    text = source.fingerprint()
    with contextlib.suppress(OSError, ValueError):  # there is none, or not of this text
        return open_tokens(folder, tokenizer=tokenizer, text=text)
    # Of several sources only the sum is known, which no bar would reach.
    with stage("Encoding", None if size is None else size()[1], "B") as bar:
        return encode_documents(
            source,
            tokenizer,
            folder,
            text=text,
            progress=lambda done: bar.update(done - bar.n),
        )
