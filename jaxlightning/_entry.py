"""Around an entry point of the Trainer: set-up and teardown, and what happens when it is cut."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from . import _setup as setting_up
from ._endings import note, run_all
from ._saver import save_interrupted
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
    trainer._sources, trainer._stage_entry = sources, entry
    status = "failed"
    failure: BaseException | None = None
    with trainer._signals as signals:
        try:
            trainer._bus = setting_up.bus_for(trainer, task)
            settle_versions(trainer, checkpoint)
            for logger in trainer.loggers:
                logger.check(*trainer._default_folder)
            sources.module.prepare_data()
            sources.module.setup(entry)
            trainer._bus.setup(trainer, entry)
            yield
            signals.poll()
            status = "success"
        except Interrupted as stop:
            status = "interrupted"
            save_interrupted(trainer, stop)
            trainer._bus.on_exception(trainer, KeyboardInterrupt(str(stop)))
            raise
        except BaseException as error:
            failure = error
            _on_exception(trainer, error)
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
            run_all(endings, failure)


def _on_exception(trainer: Trainer, error: BaseException) -> None:
    """Tells callbacks and data. What they raise in turn is noted, and hides nothing."""
    signals = trainer._signals
    try:
        trainer._bus.on_exception(trainer, error)
        if trainer._stage_entry == "fit" and signals.deferring and not signals.stopped_at_once:
            trainer._bus.on_checkpoint(trainer, "exception")
            trainer._saver.save(trainer)
        trainer._sources.module.on_exception(error)
    except Exception as second:
        note(error, second)
