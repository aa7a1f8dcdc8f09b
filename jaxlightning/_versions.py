"""Which version of its folder a logger writes: of a run that is gone on with, the one it had."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._checkpoint import CheckpointError, find_checkpoints
from ._checkpoint_read import read_metadata
from ._saver import goes_on
from ._sensible import sensible
from .parallel import _processes as processes

if TYPE_CHECKING:
    from ._trainer import Trainer


def settle_versions(trainer: Trainer, checkpoint: Any) -> None:
    """Loggers of one folder share one version: a new one, or, where the run goes on from
    `checkpoint`, that of the run. A version that the user has given stays. Of several processes
    the first one finds it."""
    if processes.is_main():
        _settle(trainer, checkpoint)
    told = processes.share(
        processes.next_topic("versions"), json.dumps([x.version for x in trainer.loggers])
    )
    if not processes.is_main():
        for logger, version in zip(trainer.loggers, json.loads(told), strict=True):
            logger.version = version


def _settle(trainer: Trainer, checkpoint: Any) -> None:
    logged = _logged_by(trainer, checkpoint)
    versions: dict[tuple[str, str], Any] = {}
    for logger in trainer.loggers:
        if not hasattr(logger, "is_settled"):
            continue
        place = (logger.save_dir, logger.name)
        if not logger.is_settled:
            version = versions.get(place)
            if version is None:
                version = _version_among(logged, *place)
            if version is not None:
                logger.version = version
        versions.setdefault(place, logger.version)


def _logged_by(trainer: Trainer, checkpoint: Any) -> list[Path]:
    """The folders that the run logged to, by the checkpoint, if it can be found without them."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None) or _newest_folder(trainer)
    try:
        if checkpoint not in (None, "last", "best", "auto"):
            path, metadata = Path(checkpoint).absolute(), read_metadata(checkpoint)
        elif checkpoint is not None and folder is not None:
            latest = list(filter(goes_on, find_checkpoints(folder)))[-1:]
            if not latest:
                return []
            path, metadata = latest[0].path, dict(latest[0].metadata)
        else:
            return []
    except (CheckpointError, OSError):  # which is told when it is about to be restored
        return []
    with sensible(path, ValueError):
        relative = [entry.get("log_dir") for entry in metadata.get("loggers", [])]
        return [(path / name).resolve() for name in relative if isinstance(name, str)]


def _version_among(folders: list[Path], save_dir: str, name: str) -> int | str | None:
    """The version that one of the folders is of this logger's, if one is."""
    base = Path(save_dir, name).resolve()
    for folder in folders:
        if folder.parent == base and folder.is_dir():
            number = re.fullmatch(r"version_(\d+)", folder.name)
            return int(number[1]) if number else folder.name
    return None


def _newest_folder(trainer: Trainer) -> Path | None:
    """The checkpoints of the newest run that the first logger knows, if it has any."""
    for logger in trainer.loggers[:1]:
        runs = Path(logger.save_dir, logger.name) if hasattr(logger, "is_settled") else Path()
        numbered = [
            (int(match[1]), path / "checkpoints")
            for path in (runs.iterdir() if runs.is_dir() else ())
            if (match := re.fullmatch(r"version_(\d+)", path.name))
        ]
        for _, folder in sorted(numbered, reverse=True):
            if find_checkpoints(folder):
                return folder
    return None
