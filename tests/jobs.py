"""Runs of `resume_job.py` as processes of their own, which can be struck at any moment.

A process that has all modules but no backend yet is forked for each of them, and they share a
compilation cache: what takes long in a new process has been done, and nothing else.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

JOB = Path(__file__).parent / "resume_job.py"
PATIENCE_S = 240
"""After that a process counts as hanging."""


def environment(cache):
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


class Jobs:
    """The fork server."""

    def __init__(self, folder):
        self.folder = folder
        self._count = 0
        self._server = subprocess.Popen(
            [sys.executable, str(JOB), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(folder / "cache"),
        )

    def start(self, *arguments):
        self._count += 1
        return Job(self._server, self.folder / f"job{self._count}", list(map(str, arguments)))

    def run(self, *arguments):
        """A job that nobody strikes from outside, at its end."""
        job = self.start(*arguments)
        job.wait()
        return job

    def close(self):
        self._server.stdin.close()
        self._server.wait(PATIENCE_S)
        self._server.stdout.close()


class Job:
    def __init__(self, server, name, arguments):
        self._server = server
        self._err = name.with_suffix(".err")
        out = name.with_suffix(".out")
        os.mkfifo(out)
        self.said = []
        self._lines = []
        self._rest = b""
        self.code = None
        order = {"arguments": arguments, "out": str(out), "err": str(self._err)}
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        self._pid = os.pidfd_open(int(server.stdout.readline()))
        self._out = os.open(out, os.O_RDONLY)

    @property
    def err(self):
        return self._err.read_text()

    def lines(self, until=None):
        """What it says from now on, line by line, up to its end or the time `until`."""
        deadline = time.monotonic() + PATIENCE_S if until is None else until
        while True:
            while self._lines:
                self.said.append(self._lines.pop(0))
                yield self.said[-1]
            ready, _, _ = select.select([self._out], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                if until is None:
                    self.send(signal.SIGKILL)
                    raise TimeoutError(f"The job said nothing any more.\n{self.err}")
                return
            read = os.read(self._out, 65536)
            if not read:
                return
            *lines, self._rest = (self._rest + read).split(b"\n")
            self._lines += [line.decode() for line in lines]

    def strike(self, signum, line, count=1, delay=0.0):
        """Sends a signal `delay` seconds after it said for the `count`th time what begins with
        `line`, or if `line` is `None` after its start. Returns whether it still ran then."""
        if line is not None:
            for said in self.lines():
                count -= said.startswith(line)
                if count == 0:
                    break
            else:
                return False
        for _ in self.lines(time.monotonic() + delay):
            pass
        return self.send(signum)

    def send(self, signum):
        """Returns whether there was still somebody to send it to."""
        try:
            signal.pidfd_send_signal(self._pid, signum)
        except ProcessLookupError:
            return False
        return True

    def wait(self):
        """Its exit code; minus the signal that killed it."""
        if self.code is None:
            for _ in self.lines():
                pass
            last = self.said[-1] if self.said else ""
            self.result = json.loads(last) if last.startswith("{") else None
            os.close(self._out)
            os.close(self._pid)
            self.code = int(self._server.stdout.readline())
        return self.code

    def saved_step(self):
        return int(re.search(r"saved step (\d+)", self.err)[1])
