"""A digest of the state at every log boundary, so that two runs can be compared step by step."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from jaxlightning._callback import Callback
from jaxlightning._checkpoint_files import check_writable
from jaxlightning._digest import (
    FILE_NAME,
    DigestRecord,
    digest_sums,
    digests_by_path,
    named_arrays,
    total_digest,
)
from jaxlightning.loggers._jsonl import is_until
from jaxlightning.loggers._lines import LineFile

if TYPE_CHECKING:
    from jaxlightning._trainer import Trainer


class Digest(Callback):
    """Writes a 64-bit digest of every array of the state, at step 0 and every `log_every_n_steps`.

        Trainer(callbacks=[Digest()]).fit(task, data)
        # jaxlightning compare RUN_A RUN_B: the first step and leaf at which two runs part

    A digest tells apart all bits: NaNs of different payloads, zeros of either sign, elements that
    changed places; see `jaxlightning._digest`. Taken are parameters, buffers, the optimizer's
    state, the root key and counters, under the paths that they have in a checkpoint, after all
    that the step causes: what a checkpoint of that step holds, but for the sums of metrics, which
    measure the run and do not steer it.

    Records go to `digests.jsonl` in the logger's folder, or else in `default_root_dir`:

        {"step": 50, "digest": "91f0c6…", "leaves": {"task/net/weight": "03a54b…", …}}

    where `digest` is one of all leaves and their paths. A resumed run goes on with its file as if
    it had never stopped; a run from the start replaces what an older one left there.

    It costs one reading of the state on the device a log interval, on all of its devices, however
    it is sharded; the host waits for nothing, and writes a record when the next one is due.
    """

    _takes = False
    _file: LineFile | None = None
    _undelivered: _Taken | DigestRecord | None = None
    _delivered: int = -1
    """The step of the latest record that was written."""

    def setup(self, trainer: Trainer, stage: str) -> None:
        self._takes = stage == "fit" and not trainer.fast_dev_run
        self._file, self._undelivered, self._delivered = None, None, -1
        if self._takes and jax.process_index() == 0:
            folder = trainer.log_dir or trainer.default_root_dir
            check_writable(folder)
            self._file = LineFile(os.path.join(folder, FILE_NAME))

    def on_fit_start(self, trainer: Trainer) -> None:
        if not self._takes:
            return
        # Compiled here, so that the first boundary does not have to wait for it.
        everywhere = jax.sharding.NamedSharding(trainer.mesh, jax.sharding.PartitionSpec())
        compute = jax.jit(digest_sums, out_shardings=everywhere)
        self._compute = compute.lower(list(_digested(trainer).values())).compile()
        self._forget_later()

    def _forget_later(self) -> None:
        """Drops records that are going to be written again."""
        if self._file is not None:
            lines = self._file.lines()
            self._file.rewrite([line for line in lines if is_until(line, self._delivered)])

    def on_train_start(self, trainer: Trainer) -> None:
        if trainer.global_step == 0:
            self._take(trainer)

    def on_checkpoint(self, trainer: Trainer, point: str) -> None:
        # Blocks of `steps_per_dispatch` end at log boundaries anyway, so there is no need for
        # `needs_state`, which would also make the host wait for the interval's metrics there.
        if point == "step" and trainer.global_step % trainer.log_every_n_steps == 0:
            self._take(trainer)

    def _take(self, trainer: Trainer) -> None:
        latest = self._delivered if self._undelivered is None else self._undelivered.step
        if not self._takes or trainer.global_step <= latest:
            return
        arrays = _digested(trainer)
        sums = self._compute(list(arrays.values()))
        sums.copy_to_host_async()
        self._deliver()
        self._undelivered = _Taken(trainer.global_step, list(arrays), sums)

    def _deliver(self) -> None:
        """Writes the record of the boundary before. Waits for that, if it is under way still."""
        record, self._undelivered = self._settled(), None
        if record is not None:
            self._delivered = record.step
            if self._file is not None:
                self._file.append(json.dumps(record.as_json(), ensure_ascii=False))

    def _settled(self) -> DigestRecord | None:
        taken = self._undelivered
        return taken.read() if isinstance(taken, _Taken) else taken

    def on_train_end(self, trainer: Trainer) -> None:
        self._deliver()

    def on_exception(self, trainer: Trainer, exception: BaseException) -> None:
        self._deliver()

    def teardown(self, trainer: Trainer, stage: str) -> None:
        if self._file is not None:
            self._file.close()

    def on_save_checkpoint(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        if self._file is not None:
            trainer._saver.before_commit(self._file.begin_save())

    def state_dict(self) -> dict[str, Any]:
        self._undelivered = record = self._settled()
        return {
            "delivered": self._delivered,
            "undelivered": None if record is None else record.as_json(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        record = state["undelivered"]
        self._undelivered = None if record is None else DigestRecord.of_json(record)
        self._delivered = state["delivered"]
        self._forget_later()


class _Taken(NamedTuple):
    """Digests on their way from the device."""

    step: int
    paths: Sequence[str]
    sums: Array

    def read(self) -> DigestRecord:
        leaves = digests_by_path(self.paths, np.asarray(self.sums))
        return DigestRecord(self.step, total_digest(leaves), leaves)


def _digested(trainer: Trainer) -> dict[str, Array]:
    return named_arrays(trainer.state.replace(metrics={}))
