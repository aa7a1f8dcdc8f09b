"""What a logger is, and where those that write files put them."""

# ruff: noqa: B027 (most methods of a logger are there to be left alone)
from __future__ import annotations

import abc
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import IO, Any, SupportsFloat

import numpy as np


class Logger(abc.ABC):
    """Where the numbers of a run go. Two methods are all that one's own logger needs.

        class Printer(Logger):
            def log_hyperparams(self, params):
                print(params)

            def log_metrics(self, metrics, step):
                print(step, metrics)

    The Trainer calls these on the first process only.
    """

    name: str = ""
    version: int | str | None = None

    @property
    def log_dir(self) -> str | None:
        """The run's folder, if there is one."""
        return None

    def check(self, argument: str = "save_dir") -> None:
        """Raises what is certain to go wrong later. Called before training; writes nothing.

        `argument` is what the user wrote the folder in, for the message.
        """

    @abc.abstractmethod
    def log_hyperparams(self, params: dict[str, Any]) -> None:
        """What the run was started with: a dict, nested or not. Called once a run."""

    @abc.abstractmethod
    def log_metrics(self, metrics: Mapping[str, SupportsFloat], step: int) -> None:
        """Numbers on the host, as of global step `step`."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this logger, as JSON values, for `resume`."""
        return {}

    def resume(self, step: int, state: Mapping[str, Any]) -> None:
        """The run continues from a checkpoint taken at `step`: forgets what was logged later.

        `state` is what `state_dict` returned then, by which records of `step` itself are told
        apart: those of the end of an epoch may have been logged after the checkpoint. Empty where
        the checkpoint knows no such logger.
        """

    def save(self) -> None:
        """Makes what was logged so far durable."""

    def begin_save(self) -> Callable[[], None]:
        """The same in two parts, so that training waits for no disk: what is returned is called
        on another thread, while logging goes on. Called for every checkpoint, which is committed
        only after that. By default all is done at once, by `save`."""
        self.save()
        return lambda: None

    def finalize(self, status: str) -> None:
        """The run is over: `"success"`, `"failed"` or `"interrupted"`. Logging again is allowed."""


class _Nothing:
    """An `experiment` of which all methods do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class Follower(Logger):
    """What stands for a logger on processes other than the first: it is asked where that one
    writes, and writes nothing."""

    def __init__(self, of: Logger):
        self.of = of

    def __getattr__(self, name: str) -> Any:
        return _Nothing() if name == "experiment" else getattr(self.of, name)

    @property
    def version(self) -> int | str | None:
        return self.of.version

    @version.setter
    def version(self, version: int | str | None) -> None:
        self.of.version = version

    @property
    def log_dir(self) -> str | None:
        return self.of.log_dir

    def log_hyperparams(self, params: dict[str, Any]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, SupportsFloat], step: int) -> None: ...


class FileLogger(Logger):
    """A logger of files in `{save_dir}/{name}/version_{version}`.

    The disk is untouched until there is something to write. A `version` of one's own choice may
    also be a string, the folder's whole name. Where that folder has logs already, they are
    continued, not overwritten.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str = "jaxlightning_logs",
        version: int | str | None = None,
    ):
        self.save_dir = os.path.expanduser(os.fspath(save_dir))
        self.name = name
        self._version = version

    @property
    def is_settled(self) -> bool:
        """Whether it is known which version this is."""
        return self._version is not None

    @property
    def version(self) -> int | str | None:
        """By default the next one that is free when first asked for.

        So loggers that are all asked before any of them writes share a folder.
        """
        if self._version is None:
            self._version = next_version(self.save_dir, self.name)
        return self._version

    @version.setter
    def version(self, version: int | str | None) -> None:
        self._version = version

    @property
    def log_dir(self) -> str:
        version = self.version
        folder = version if isinstance(version, str) else f"version_{version}"
        return os.path.join(self.save_dir, self.name, folder)

    def check(self, argument: str = "save_dir") -> None:
        parent = os.path.abspath(self.log_dir)
        while not os.path.lexists(parent):
            parent = os.path.dirname(parent)
        if not os.path.isdir(parent):
            raise NotADirectoryError(self._cannot_write(argument, f"`{parent}` is not a folder"))
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(
                self._cannot_write(argument, f"you have no permission to write to `{parent}`")
            )

    def _cannot_write(self, argument: str, why: str) -> str:
        return (
            f"`{type(self).__name__}` cannot write to its folder, `{argument}={self.save_dir!r}`: "
            f"{why}. Write `{argument}=` with a folder that you can write to."
        )

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        """Writes them to `hparams.json`, what JSON cannot express as strings."""
        text = json.dumps(as_json(params), indent=2, allow_nan=False)
        replace_file(self.path("hparams.json"), text + "\n")

    def path(self, file: str) -> str:
        """The path of a file about to be written, in a folder that then exists."""
        try:
            os.makedirs(self.log_dir, exist_ok=True)
        except OSError as error:
            raise type(error)(self._cannot_write("save_dir", str(error))) from error
        return os.path.join(self.log_dir, file)


def begin_sync(file: IO[Any]) -> Callable[[], None]:
    """What makes durable, on whichever thread, what has been written to `file` so far, though that
    be closed or replaced meanwhile. To be called once."""
    file.flush()
    descriptor = os.dup(file.fileno())

    def sync() -> None:
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    return sync


def replace_file(path: str, text: str) -> None:
    """Writes a file whole: whoever reads it finds the old text or the new, never a part."""
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def next_version(save_dir: str | os.PathLike[str], name: str) -> int:
    """One more than the largest `n` of the folders `{save_dir}/{name}/version_{n}`."""
    try:
        folders = os.listdir(os.path.join(save_dir, name))
    except OSError:  # It is not there yet, or `check` says what is wrong with it.
        return 0
    taken = [re.fullmatch(r"version_(\d+)", folder) for folder in folders]
    return 1 + max((int(match[1]) for match in taken if match), default=-1)


def as_record(metrics: Mapping[str, SupportsFloat], step: int) -> dict[str, int | float]:
    """`step`, then the metrics, as Python numbers."""
    record: dict[str, int | float] = {"step": int(step)}
    for name, value in metrics.items():
        if name == "step":
            raise ValueError(
                "A metric is named `step`, which is the name of the column of global steps. Log it "
                "under another name."
            )
        record[name] = value if type(value) is int else float(value)
    return record


def as_json(value: Any) -> Any:
    """`value` in what JSON can express.

    Floats that are not finite become `"NaN"`, `"Infinity"` and `"-Infinity"`, which strict readers
    accept and `float` (or JavaScript's `Number`) turns back.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        return value if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(name): as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_json(item) for item in value]
    if np.shape(value) == () and isinstance(getattr(value, "dtype", None), np.dtype):
        return as_json(value.item())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return getattr(value, "__qualname__", None) or str(value)
