"""Around an entry point of the Trainer: set-up and teardown, and what happens when it is cut."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from . import _setup as setting_up
from ._endings import run_all
from ._saver import exception_saves, save_interrupted
from ._signals import Interrupted
from ._sources import Sources
from ._task import TaskModule
from ._versions import settle_versions

if TYPE_CHECKING:
    from ._trainer import Trainer


@contextlib.contextmanager
def entered(
    trainer: Trainer, entry: str, sources: Sources, task: TaskModule, checkpoint: Any
) -> Iterator[None]:
    """While `entry` runs: its callbacks and data are set up, and whatever ends it, all that was
    opened is closed. `checkpoint` is what a fit goes on from, if it does."""
    status = "failed"
    failure: BaseException | None = None
    with trainer._signals as signals:
        try:
            # Not before: it has to be unset again, whatever happens.
            trainer._sources, trainer._stage_entry = sources, entry
            trainer._bus = setting_up.bus_for(trainer, task)
            trainer._check_batch = task.check_batch
            settle_versions(trainer, checkpoint)
            for logger in trainer.loggers:
                logger.check(*trainer._default_folder)
            sources.module.prepare_data()
            sources.module.setup(entry)
            trainer._bus.setup(trainer, entry)
            yield
            signals.poll()
            status = "success"
        except BaseException as error:
            failure = error
            if isinstance(error, Interrupted):
                status = "interrupted"
            failure = run_all(_on_failure(trainer, error, checkpoint), error)
            if failure is not None and failure is not error:
                raise failure  # noqa: B904 (it has a cause of its own)
            raise
        finally:
            trainer._stage_entry = trainer.stage = None
            if signals.stopped_at_once:
                trainer._saver.abandon()
            endings: list[Callable[[], Any]] = [
                trainer._saver.close,
                partial(setting_up.close_data, trainer),
                *(partial(logger.finalize, status) for logger in trainer.loggers),
                partial(trainer._bus.teardown, trainer, entry),
                partial(sources.module.teardown, entry),
            ]
            last = run_all(endings, failure)
            if last is not None and last is not failure:
                raise last


def _on_failure(trainer: Trainer, error: BaseException, checkpoint: Any) -> list[Callable[[], Any]]:
    """What saves the run, where it should be, and tells callbacks and data."""
    told = trainer._bus.on_exception
    if isinstance(error, Interrupted):
        stopped = KeyboardInterrupt(str(error))
        saves = partial(save_interrupted, trainer, error, checkpoint)
        return [saves, partial(told, trainer, stopped)]
    return [
        partial(told, trainer, error),
        *exception_saves(trainer),
        partial(trainer._sources.module.on_exception, error),
    ]
