"""Signals as flags that the loop polls, so that a run ends between two steps, saved."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import threading
import types
from typing import Any

from jax.experimental import multihost_utils

from ._say import say, say_from_handler, warn
from .parallel import _processes as processes


class Interrupted(BaseException):
    """A signal asked the run to end, and it is at a point where it can."""

    goes_on = True
    """Whether the same command would go on from here, so that requeueing the job makes sense."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """The shell's convention: 130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1.

        Not 0 for a requeued job either: the next command of its script must not take the run for
        finished, and SLURM runs a requeued job again whatever it exits with.
        """
        return 128 + self.signum


class Signals:
    """What becomes of SIGINT, SIGTERM and, in a SLURM job, SIGUSR1 while this is entered.

    Until `defer` is called a run has nothing to save, and a signal raises `Interrupted` where it
    arrives, so that a download or a slow loader ends at once. From then on the first signal only
    sets a flag, which `poll` turns into `Interrupted` where the run can be saved; a second SIGINT
    raises `KeyboardInterrupt`, and nothing is saved. Python runs handlers when the function at
    work returns to it: while XLA compiles, a signal waits for the end of that.

    On leaving, the handlers from before are put back, and `Interrupted` becomes `SystemExit`. So
    does a signal that arrived after the last poll. Before that, the job is requeued if the signal
    was SIGUSR1 (`#SBATCH --signal=USR1@120`), and a handler that the user had installed for the
    signal is called, which may raise something else.

    Within a run of another Trainer, whose callback evaluates something say, it is that run which
    has to be saved: on leaving, what arrived is handed to it, and `Interrupted` stays what it is.

    In a job of several processes a signal may reach one of them, and all have to end at the same
    step. There SIGTERM is JAX's, which tells the others, and `poll` asks it: no handler of Python's
    is installed, which would keep it from noticing. SIGINT and SIGUSR1 are passed on to it.

    Left alone are signals that are ignored, as SIGINT is in a shell's background job; SIGUSR1 if
    it has a handler, or outside SLURM; and all of them outside the main thread, where Python
    allows no handlers.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferring = self._saves = False
        self._interrupts = 0
        self._previous: dict[int, Any] = {}
        self._replaced: set[int] = set()
        self._outer: Signals | None = None
        self._together = False

    def __enter__(self) -> Signals:
        # Not kept, or the run after an interrupted one would end at once.
        self._outer = outer = _within()
        self.received = None if outer is None else outer.received
        self._interrupts = 0 if outer is None else outer._interrupts
        self._deferring = self._saves = False
        self._replaced.clear()
        self._together = processes.count() > 1
        if threading.current_thread() is threading.main_thread():
            mine = (signal.SIGINT,) if self._together else (signal.SIGINT, signal.SIGTERM)
            for signum in mine:
                # `None`: a handler that is not Python's, which could not be put back.
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    self._previous[signum] = signal.signal(signum, self._handle)
            before = signal.getsignal(signal.SIGUSR1)
            if slurm_job() and (before == signal.SIG_DFL or _owner(before) is not None):
                self._previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._handle)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        previous, self._previous = self._previous, {}
        for signum, handler in previous.items():
            # A handler that somebody installed over ours stays.
            if signal.getsignal(signum) == self._handle:
                signal.signal(signum, handler)
        outer, self._outer = self._outer, None
        if outer is not None:
            outer.received, outer._interrupts = self.received, self._interrupts
            return
        if error is None and self.received is not None:
            error = Interrupted(self.received)
            say(f"{error}: it arrived when the run was over and all was saved.")
        if isinstance(error, Interrupted):
            for note in getattr(error, "__notes__", ()):
                say(note)
            if error.signum == signal.SIGUSR1:
                requeue(error.goes_on)
            handler = previous.get(error.signum)
            if callable(handler) and handler is not signal.default_int_handler:
                handler(error.signum, None)
            raise SystemExit(error.exit_code) from None

    def _handle(self, signum: int, frame: types.FrameType | None) -> None:
        if signum == signal.SIGINT:
            self._interrupts += 1
            if self.stopped_at_once:
                raise KeyboardInterrupt("second SIGINT: stopped without saving")
        if self.received is not None:
            return
        self.received = signum
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if not self._deferring:
            raise Interrupted(signum)
        if signum == signal.SIGINT:
            say_from_handler(
                "SIGINT: saving after this step. Once more stops at once, unsaved."
                if self._saves
                else "SIGINT: stopping after this batch. Once more stops at once."
            )

    @property
    def stopped_at_once(self) -> bool:
        """Whether a second SIGINT came."""
        return self._interrupts > 1

    @property
    def deferring(self) -> bool:
        """Whether there is a run that can be saved."""
        return self._deferring

    def defer(self, saves: bool) -> None:
        """From here on a run ends between two steps, and `saves` there, as one around it may."""
        self._deferring = True
        self._saves = saves or (self._outer is not None and self._outer._saves)

    def poll(self) -> None:
        """**Raises:** `Interrupted` once a signal has arrived: on all processes of a job at once,
        which have to poll equally often."""
        if self._together:
            self._poll_together()
        elif self.received is not None:
            raise Interrupted(self.received)

    def poll_waiting(self) -> None:
        """As `poll`, while waiting for data, which processes do for different times: those of a
        job hear of a signal after that."""
        if not self._together:
            self.poll()

    def _poll_together(self) -> None:
        number = next(_polls)
        if not multihost_utils.reached_preemption_sync_point(number):
            return
        mine = "" if self.received is None else str(int(self.received))
        told = processes.gather(f"signal/{number}", mine)
        self.received = max((int(s) for s in told if s), default=int(signal.SIGTERM))
        if any(s == str(int(signal.SIGUSR1)) for s in told):
            self.received = int(signal.SIGUSR1)
        raise Interrupted(self.received)

    def check(self) -> None:
        """Warns, once for each signal, of a handler that has taken the place of ours."""
        if self._together and signal.SIGTERM not in self._replaced:
            handler = signal.getsignal(signal.SIGTERM)
            if callable(handler) and handler != processes.sigterm_handler():
                self._replaced.add(signal.SIGTERM)
                warn(
                    f"`{_name(handler)}` is the handler of SIGTERM, so that JAX does not hear of "
                    "one, and a SIGTERM to a process of this job saves nothing. Install no handler "
                    "after `jaxlightning.parallel.initialise`, or the first `Trainer`."
                )
        for signum in self._previous.keys() - self._replaced:
            handler = signal.getsignal(signum)
            if handler != self._handle:
                self._replaced.add(signum)
                name = signal.Signals(signum).name
                warn(
                    f"`{_name(handler)}` became the handler of {name} during the run, so that a "
                    f"{name} no longer saves it. Install that handler before `fit`, which calls "
                    "it after saving, or have it call the handler it replaces, which "
                    "`signal.signal` returns.",
                )


_polls = itertools.count(1)
"""Numbers that are the same on all processes, and always grow."""


def _owner(handler: Any) -> Signals | None:
    """Whose handler it is, if it is that of a run under way."""
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, Signals) and owner._previous else None


def _within() -> Signals | None:
    """The run of another Trainer in which a run begins."""
    if threading.current_thread() is not threading.main_thread():
        return None
    handlers = map(signal.getsignal, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
    return next(filter(None, map(_owner, handlers)), None)


def _name(handler: Any) -> str:
    if isinstance(handler, signal.Handlers):
        return f"signal.{handler.name}"
    name = getattr(handler, "__qualname__", None)
    return repr(handler) if name is None else f"{handler.__module__}.{name}"


def slurm_job() -> str | None:
    """What `scontrol` calls the SLURM job that this process belongs to."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID") or None


def requeue(goes_on: bool) -> None:
    """Puts this SLURM job back into the queue, once for all its processes, or says why not."""
    job = slurm_job()
    if job is None or not processes.is_main():
        return
    if not goes_on:
        say(f"The SLURM job {job} was not requeued: nothing was saved, so it would start anew.")
        return
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        why = f"exit status {done.returncode}: {done.stderr.strip()}" if done.returncode else ""
    except FileNotFoundError:
        why = "there is no `scontrol` on the `PATH`"
    except (OSError, subprocess.TimeoutExpired) as error:
        why = re.sub(r"\.$", "", str(error))
    if why:
        say(
            f"The SLURM job {job} was NOT requeued, `{' '.join(command)}` failed: {why}. "
            "Submit it again to go on."
        )
    else:
        say(f"The SLURM job {job} was requeued.")
