"""The embedded corpus: English that is on every machine with Python and our packages."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ._files import write_rows

# Folders whose sources hold no prose, other packages' sources, or this project's own.
_LEFT_OUT = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "_vendor",
    "vendored", "third_party", "idle_test", "lib2to3", "node_modules", "jaxlightning",
    "albert_task",
}  # fmt: skip
_TEST = re.compile(r"test_.*|.*_test\.py|conftest\.py")
_WORKER = Path(__file__).with_name("_prose.py")


class Document(NamedTuple):
    """A text with a name: a module's or a topic's paragraphs, one a line."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents, and what became of what was read.

    `skipped` counts the files that could not be decoded or parsed; they are left out.
    """

    documents: list[Document]
    files: int
    skipped: int
    raw_characters: int
    paragraphs: int
    duplicates: int

    @property
    def characters(self) -> int:
        return sum(len(document.text) for document in self.documents)

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{len(self.documents):,} documents, {self.paragraphs:,} paragraphs, "
            f"{self.characters / 1e6:.1f} MB of prose out of {self.raw_characters / 1e6:.1f} MB "
            f"of docstrings in {self.files:,} files ({self.skipped} unreadable, "
            f"{self.duplicates:,} repeated paragraphs left out)"
        )


def python_roots() -> list[Path]:
    """Where this interpreter's standard library and installed packages are."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    return [Path(path) for path in dict.fromkeys(paths) if os.path.isdir(path)]


def python_sources(roots: Sequence[Path] | None = None) -> list[tuple[str, Path]]:
    """`(name, path)` of the sources under `roots`, in the order of their names.

    Names are relative to a root and hold forward slashes, so that the order is the same wherever
    the environment lies. Tests and vendored copies are left out.
    """
    found: dict[str, Path] = {}
    for root in python_roots() if roots is None else roots:
        for folder, inner, files in os.walk(root):
            inner[:] = [name for name in inner if name not in _LEFT_OUT]
            for file in files:
                if file.endswith(".py") and not _TEST.fullmatch(file):
                    path = Path(folder, file)
                    found.setdefault(path.relative_to(root).as_posix(), path)
    return sorted(found.items())


def build_corpus(
    sources: Sequence[tuple[str, Path]] | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Reads the docstrings of every source and the language reference, and keeps the prose.

    The result depends on the sources alone, not on the number of workers. Sources are parsed,
    never imported. A paragraph that came before, letters and case alone compared, is left out.

    **Arguments:**

    - `sources`: `(name, path)` pairs; by default `python_sources()`.
    - `workers`: processes; by default one a core.
    - `progress`: called with `(files done, files)`, at most once a file, from one thread at a time.

    **Raises:** `ValueError` where no prose is found.
    """
    sources = python_sources() if sources is None else sources
    workers = max(1, min(workers or _cores(), len(sources)))
    results: list[dict[str, Any]] = [{}] * len(sources)
    done = [0] * workers
    stop = threading.Event()

    def serve(worker: int) -> None:
        # -I -S: no site-packages, nothing of the user's; the worker starts in 20 ms.
        command = [sys.executable, "-I", "-S", str(_WORKER)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="ascii"
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for number in range(worker, len(sources), workers):
                if stop.is_set():
                    return
                process.stdin.write(json.dumps(str(sources[number][1])) + "\n")
                process.stdin.flush()
                results[number] = json.loads(process.stdout.readline() or '{"error": "died"}')
                done[worker] += 1
                if progress is not None and worker == 0:
                    progress(sum(done), len(sources))

    if sources:
        with ThreadPoolExecutor(workers) as pool:
            served = [pool.submit(serve, worker) for worker in range(workers)]
            try:
                for future in served:
                    future.result()
            finally:
                stop.set()  # after Ctrl-C or a failure the other workers end too
        if progress is not None:
            progress(len(sources), len(sources))
    return _collect([name for name, _ in sources], results)


def write_corpus(corpus: Corpus, path: str | Path) -> None:
    """Writes the documents as JSON lines, `{"name": ..., "text": ...}`, whole or not at all."""
    write_rows(Path(path), (document._asdict() for document in corpus.documents))


def _cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _collect(names: Sequence[str], results: Sequence[dict[str, Any]]) -> Corpus:
    seen: set[bytes] = set()
    documents = []
    paragraphs = duplicates = 0
    for name, result in zip(names, results, strict=True):
        for part, texts in result.get("parts", {}).items():
            fresh = []
            for text in texts:
                key = hashlib.blake2b(_letters(text).encode(), digest_size=16).digest()
                if key in seen:
                    duplicates += 1
                else:
                    seen.add(key)
                    fresh.append(text)
            paragraphs += len(fresh)
            if fresh:
                documents.append(Document(f"{name} {part}".rstrip(), "\n".join(fresh)))
    if not documents:
        raise ValueError(
            f"No English prose was found in {len(names)} Python sources. Pass your own text: "
            "`albert pretrain --text 'corpus/*.txt'`."
        )
    return Corpus(
        documents,
        files=len(names),
        skipped=sum("error" in result for result in results),
        raw_characters=sum(result.get("raw", 0) for result in results),
        paragraphs=paragraphs,
        duplicates=duplicates,
    )


def _letters(text: str) -> str:
    return re.sub(r"[^a-z]+", "", text.lower())
