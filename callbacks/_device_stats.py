"""Memory: the devices' and the host's, at every log boundary."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlightning._callback import Callback

from ._announce import announce

if TYPE_CHECKING:
    from jaxlightning._trainer import Trainer

_LOGGED = ("bytes_in_use", "peak_bytes_in_use", "bytes_limit")


class DeviceStatsMonitor(Callback):
    """Logs `device/{id}/bytes_in_use`, `peak_bytes_in_use` and `bytes_limit` of this process'
    devices, and `host/bytes_in_use` and `host/peak_bytes_in_use` of the process itself.

    These are the allocator's own counts: asking for them does not wait for the device. The CPU
    backend keeps none, so there only the host's memory is logged.
    """

    def on_fit_start(self, trainer: Trainer) -> None:
        device = trainer.mesh.local_devices[0]
        if not device.memory_stats():
            announce(
                f"`DeviceStatsMonitor`: JAX's `{device.platform}` backend does not count memory, "
                "so only the host's is logged."
            )

    def on_log(self, trainer: Trainer, metrics: dict[str, float], step: int) -> None:
        for device in trainer.mesh.local_devices:
            stats = device.memory_stats() or {}
            metrics |= {
                f"device/{device.id}/{name}": float(stats[name])
                for name in _LOGGED
                if name in stats
            }
        metrics |= host_memory()


def host_memory() -> dict[str, float]:
    """The resident memory of this process: now, where the system tells (Linux), and at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"host/peak_bytes_in_use": float(peak * (1 if sys.platform == "darwin" else 1024))}
    statm = Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text().split()[1])
        found["host/bytes_in_use"] = float(pages * os.sysconf("SC_PAGE_SIZE"))
    return found
