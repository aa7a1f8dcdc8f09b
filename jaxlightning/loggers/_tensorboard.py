"""Metrics for TensorBoard, through tensorboardX."""

from __future__ import annotations

import glob
import time
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any, SupportsFloat

from ._logger import FileLogger, as_json, as_record, begin_sync

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter
    from tensorboardX.proto.event_pb2 import Event

_FLUSH_S = 10.0
"""How old what TensorBoard shows may be."""


class TensorBoardLogger(FileLogger):
    """Writes event files: `tensorboard --logdir {save_dir}` shows them.

    Hyper-parameters appear in the HPARAMS tab, beside all metrics, and in `hparams.json`. After a
    `resume`, a new event file tells TensorBoard to forget what the older ones say of that step and
    of later ones, and repeats what had been logged of that step, but for what `experiment` wrote.
    """

    _writer: Any = None
    _summaries: SummaryWriter | None = None
    _flushed = 0.0
    _has_session = False
    _resumed_at: int | None = None
    _latest: tuple[int, list[dict[str, Any]]] = (-1, [])
    """The latest step of which something was logged, and its records."""

    @property
    def experiment(self) -> SummaryWriter:
        """A `tensorboardX.SummaryWriter` to the same files, for what is no number:

        trainer.logger.experiment.add_histogram("weights", array, trainer.global_step)
        """
        from ._summaries import summaries_of

        if self._summaries is None:
            self._summaries = summaries_of(self._write, self.save, self.log_dir)
        return self._summaries

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionStartInfo

        super().log_hyperparams(params)
        start = SessionStartInfo(start_time_secs=time.time())
        for name, value in flatten(as_json(params)).items():
            if isinstance(value, bool):
                start.hparams[name].bool_value = value
            elif isinstance(value, int | float):
                start.hparams[name].number_value = value
            else:
                start.hparams[name].string_value = str(value)
        self._has_session = True
        self._write_session(
            "_hparams_/session_start_info", HParamsPluginData(session_start_info=start)
        )
        self.save()

    def log_metrics(self, metrics: Mapping[str, SupportsFloat], step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        record = as_record(metrics, step)
        latest, records = self._latest
        self._latest = (step, [*records, record] if step == latest else [record])
        values = [Summary.Value(tag=name, simple_value=record[name]) for name in metrics]
        self._write(Event(step=step, summary=Summary(value=values)))
        if time.monotonic() - self._flushed > _FLUSH_S:
            self._file.flush()
            self._flushed = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        step, records = self._latest
        return {"step": step, "records": as_json(records)}

    def resume(self, step: int, state: Mapping[str, Any]) -> None:
        self._close()
        known = bool(state)
        self._resumed_at = step if known else step + 1
        self._latest = (-1, [])
        for record in state["records"] if known and state["step"] == step else []:
            self.log_metrics({k: float(v) for k, v in record.items() if k != "step"}, step)

    def save(self) -> None:
        if self._writer is not None:
            self._writer.flush()
            self._flushed = time.monotonic()

    def begin_save(self) -> Callable[[], None]:
        return begin_sync(self._file) if self._writer is not None else lambda: None

    @property
    def _file(self) -> IO[bytes]:
        # Not public, but whatever flushes there waits for the disk.
        file: IO[bytes] = self._writer._py_recordio_writer._writer
        return file

    def finalize(self, status: str) -> None:
        if self._has_session:
            from tensorboardX.proto.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
            from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo

            code = STATUS_SUCCESS if status == "success" else STATUS_FAILURE
            end = SessionEndInfo(status=code, end_time_secs=time.time())
            self._write_session(
                "_hparams_/session_end_info", HParamsPluginData(session_end_info=end)
            )
            self._has_session = False
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = self._summaries = None

    def _write_session(self, tag: str, data: Any) -> None:
        # Without an experiment summary, TensorBoard lists all metrics of the run by itself.
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

        plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=data.SerializeToString())
        value = Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))
        self._write(Event(summary=Summary(value=[value])))

    def _write(self, event: Event) -> None:
        if self._writer is None:
            self._writer = self._open()
        event.wall_time = event.wall_time or time.time()
        self._writer.write_event(event)

    def _open(self) -> Any:
        # The plain writer: `SummaryWriter` adds a thread and a queue, which its flush does not wait
        # for, and replaces a file of the same second.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        prefix = self.path("events")
        older = len(glob.glob(f"{glob.escape(prefix)}.out.tfevents.*"))
        writer = EventsWriter(prefix, filename_suffix=f".{older:04d}")
        # TensorBoard takes every START but a run's first for a restart, and forgets all events of
        # its step or later.
        step = self._resumed_at or 0
        if older == 0 or self._resumed_at is not None:
            start = SessionLog(status=SessionLog.START)
            writer.write_event(Event(wall_time=time.time(), step=step, session_log=start))
        self._resumed_at = None
        return writer


def flatten(params: Any, prefix: str = "") -> dict[str, Any]:
    """`{"optimizer": {"lr": 1}}` as `{"optimizer/lr": 1}`."""
    if not isinstance(params, dict):
        return {prefix: params}
    return {
        name: value
        for key, item in params.items()
        for name, value in flatten(item, f"{prefix}/{key}" if prefix else key).items()
    }
