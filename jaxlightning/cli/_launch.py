"""`jaxlightning launch`: a job of several processes on this machine."""

from __future__ import annotations

import argparse
import os
import queue
import signal
import subprocess
import sys
import threading
import types
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from ..parallel._processes import COORDINATOR, PROCESS, PROCESSES, free_port
from ._runs import RunError

_INTERRUPTED = {128 + s for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
"""Exit codes of a run that was saved and ended because a signal asked for it."""

TOLD = 20
"""Lines of a failed process's stderr that are shown again at the end."""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "launch",
        help="run a script in several processes of this machine",
        description="Runs a script in several processes of this machine that train together, each "
        "with devices of its own. Each line of output is preceded by its process's number. SIGTERM "
        "and SIGINT are passed on: the run is saved, and ends. When one process fails, the others "
        "are ended, and what it said last is shown at the end.",
        epilog="On several machines, SLURM, Open MPI and Kubernetes start the processes; on others "
        "set JAXLIGHTNING_COORDINATOR, JAXLIGHTNING_PROCESSES and JAXLIGHTNING_PROCESS.",
    )
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument(
        "--devices",
        type=int,
        default=None,
        help="virtual CPU devices of each process; without it each gets one of the machine's GPUs",
    )
    parser.add_argument(
        "--grace", type=float, default=60.0, help="seconds from SIGTERM to SIGKILL (60)"
    )
    parser.add_argument("-m", dest="module", action="store_true", help="the script is a module")
    parser.add_argument("script", help="a Python file, or with -m a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    parser.set_defaults(run=_run)


def _run(chosen: argparse.Namespace) -> int:
    if chosen.processes < 1:
        raise RunError(f"`--processes {chosen.processes}` has to be at least 1.")
    if chosen.devices is not None and chosen.devices < 1:
        raise RunError(f"`--devices {chosen.devices}` has to be at least 1.")
    if not chosen.module and not Path(chosen.script).is_file():
        raise RunError(f"There is no script `{chosen.script}`. For a module, write `-m` before it.")
    command = [sys.executable, "-m", "jaxlightning.parallel._child"]
    command += ["-m"] * chosen.module + [chosen.script, *chosen.arguments]
    return Job(command, chosen.processes, chosen.devices, chosen.grace).run()


def environment(process: int, processes: int, port: int, devices: int | None) -> dict[str, str]:
    """What a process of the job has beyond what all have."""
    found = {
        COORDINATOR: f"127.0.0.1:{port}",
        PROCESSES: str(processes),
        PROCESS: str(process),
        # Or what a process says is held back until much has come together.
        "PYTHONUNBUFFERED": "1",
    }
    if devices is not None:
        return found | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(n) for n in range(processes)]
        if len(gpus) < processes:
            raise RunError(
                f"`CUDA_VISIBLE_DEVICES={visible}` has {len(gpus)} GPUs for {processes} processes, "
                "one for each. Write `--devices K` to run on the CPU."
            )
        found["CUDA_VISIBLE_DEVICES"] = gpus[process]
    return found


class Job:
    """The processes, from their start until the last one has ended."""

    def __init__(self, command: Sequence[str], processes: int, devices: int | None, grace: float):
        self._command, self._grace = list(command), grace
        port = free_port()
        self._environments = [
            os.environ | environment(n, processes, port, devices) for n in range(processes)
        ]
        self._children: list[subprocess.Popen[str]] = []
        self._last = [deque[str](maxlen=TOLD) for _ in range(processes)]
        self._signalled: int | None = None
        self._interrupts = 0
        self._printing = threading.Lock()

    def run(self) -> int:
        """The exit code: that of the process that failed first, or 0."""
        before = {s: signal.signal(s, self._pass_on) for s in (signal.SIGTERM, signal.SIGINT)}
        readers: list[threading.Thread] = []
        try:
            for number, variables in enumerate(self._environments):
                child = subprocess.Popen(
                    self._command,
                    env=variables,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    # A Ctrl-C reaches the launcher only, which passes it on to all.
                    start_new_session=True,
                )
                self._children.append(child)
                for stream, out in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
                    thread = threading.Thread(target=self._read, args=(number, stream, out))
                    thread.start()
                    readers.append(thread)
            failed = self._wait()
        finally:
            self._kill()
            for thread in readers:
                thread.join()
            for signum, handler in before.items():
                signal.signal(signum, handler)
        return 0 if failed is None else self._report(failed)

    def _read(self, number: int, stream: IO[str], out: IO[str]) -> None:
        for line in stream:
            with self._printing:
                print(f"[{number}] {line}", end="", file=out, flush=True)
                if out is sys.stderr:
                    self._last[number].append(line)

    def _pass_on(self, signum: int, frame: types.FrameType | None) -> None:
        self._interrupts += signum == signal.SIGINT
        if self._interrupts > 1:
            self._kill()
            return
        self._signalled = signum
        for child in self._children[:1]:  # One tells the others, and all save the same step.
            if child.poll() is None:
                child.terminate()

    def _wait(self) -> int | None:
        """Until all have ended; the number of the one that failed first."""
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()

        def wait(number: int) -> None:
            self._children[number].wait()
            ended.put(number)

        # In the order of their ends: others fail because one has.
        for number in range(len(self._children)):
            threading.Thread(target=wait, args=(number,), daemon=True).start()
        failed: int | None = None
        patience: float | None = None
        for _ in self._children:
            try:
                number = ended.get(timeout=patience)
            except queue.Empty:
                self._kill()
                patience = None
                number = ended.get()
            code = self._children[number].returncode
            if code and failed is None:
                failed, patience = number, self._grace
                if self._signalled is None and code not in _INTERRUPTED:
                    for child in self._children:
                        if child.poll() is None:
                            child.terminate()
        return failed

    def _kill(self) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()

    def _report(self, failed: int) -> int:
        codes = {child.returncode for child in self._children}
        code = self._children[failed].returncode
        if len(codes) == 1 and code in _INTERRUPTED:  # All of them, at the same step.
            return code if self._signalled is None else 128 + self._signalled
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        print(
            f"\njaxlightning: process {failed} {how}, the first of {len(self._children)} to fail; "
            "the others were ended.",
            file=sys.stderr,
        )
        if self._last[failed]:
            print("What it said last:", file=sys.stderr)
            for line in self._last[failed]:
                print(f"  {line}", end="", file=sys.stderr)
        sys.stderr.flush()
        return 128 - code if code < 0 else code
