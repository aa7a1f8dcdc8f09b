"""The processes of a job: how they find each other, and how they agree.

What they compute together goes through JAX (`jax.distributed` and its collectives). What they tell
each other here, on the host, goes through the service that started them: it needs no device, so a
thread may ask while the devices are at work, and it ends in bounded time.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax

COORDINATOR = "JAXLIGHTNING_COORDINATOR"
PROCESSES = "JAXLIGHTNING_PROCESSES"
PROCESS = "JAXLIGHTNING_PROCESS"
BIND = "JAXLIGHTNING_COORDINATOR_BIND"
START_TIMEOUT_S = "JAXLIGHTNING_START_TIMEOUT_S"
HEARTBEAT_TIMEOUT_S = "JAXLIGHTNING_HEARTBEAT_TIMEOUT_S"
AGREE_TIMEOUT_S = "JAXLIGHTNING_AGREE_TIMEOUT_S"
"""The variables that start a job; see `initialise`."""


class Disagreement(RuntimeError):
    """The processes of a job do not do the same thing."""


def initialise() -> None:
    """Joins the job that this process belongs to, if it belongs to one of several processes.

    `Trainer` calls it. A script that uses JAX before it makes its Trainer, for the model say, calls
    it first, or is started by `jaxlightning launch`, which does. The job is that of

    - our variables: `JAXLIGHTNING_COORDINATOR` (`host:port` of process 0), `JAXLIGHTNING_PROCESSES`
      (how many) and `JAXLIGHTNING_PROCESS` (this one's number);
    - or SLURM, Open MPI, Kubernetes or a Cloud TPU, as JAX itself finds out.

    Process 0 listens on the address of the coordinator only, or on the one in
    `JAXLIGHTNING_COORDINATOR_BIND`: whoever reaches it can read and write what processes agree on.
    Where JAX finds the job by itself it listens everywhere, unless that variable is set.
    `JAXLIGHTNING_START_TIMEOUT_S` (120) bounds the wait for all to come; a process that is not
    heard of for `JAXLIGHTNING_HEARTBEAT_TIMEOUT_S` (30) ends the job.

    **Raises:** `RuntimeError` where JAX was used before, or where the others do not come in time.
    """
    if jax.distributed.is_initialized():
        return
    arguments = _of_variables()
    if arguments is None:
        arguments = _of_cluster()
        if arguments is None:
            return
        if os.environ.get(BIND):
            arguments["coordinator_bind_address"] = os.environ[BIND]
    start, heartbeat = _seconds(START_TIMEOUT_S, 120), _seconds(HEARTBEAT_TIMEOUT_S, 30)
    if arguments.get("process_id"):
        _wait_for(arguments["coordinator_address"], start)
    try:
        jax.distributed.initialize(
            **arguments, initialization_timeout=start, heartbeat_timeout_seconds=heartbeat
        )
    except ValueError as error:
        if arguments or "coordinator_address" not in str(error):
            raise
        # A TPU that belongs to no job.
    except RuntimeError as error:
        if "before any JAX c" in str(error):
            raise RuntimeError(
                "This process belongs to a job of several, but JAX was used before the `Trainer` "
                "was made, and by then it is too late to join them. Start the script with "
                "`jaxlightning launch`, or begin it with `from jaxlightning.parallel import "
                "initialise; initialise()`."
            ) from error
        where = arguments.get("coordinator_address", "the coordinator")
        raise RuntimeError(_unreached(where, start, error)) from error
    sigterm_handler()
    sys.excepthook = _end_at_once


def _wait_for(address: str, timeout: int) -> None:
    """Returns when somebody listens there: JAX would end this process without an error to read."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(_unreached(address, timeout, error)) from error
        time.sleep(0.05)


def _unreached(address: str, timeout: int, why: Exception) -> str:
    return (
        f"This process did not get to the others of its job within {timeout} s: it looked for "
        f"process 0 at `{address}`. See that all of them were started, with the same address and "
        f"number of processes, and that this port can be reached. ({why})"
    )


def _end_at_once(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ends a process of a job that failed: at its regular end it would wait for the others, which
    wait for it."""
    sys.__excepthook__(kind, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


_sigterm: list[Any] = []


def sigterm_handler() -> Any:
    """What Python takes for the handler of SIGTERM, which JAX has replaced: that of the time when
    this process joined its job. Another one was installed since, and has replaced JAX's."""
    if not _sigterm:
        _sigterm.append(signal.getsignal(signal.SIGTERM))
    return _sigterm[0]


def _of_variables() -> dict[str, Any] | None:
    present = [name for name in (COORDINATOR, PROCESSES, PROCESS) if os.environ.get(name)]
    if not present:
        return None
    for name in (COORDINATOR, PROCESSES, PROCESS):
        if name not in present:
            raise RuntimeError(
                f"`{present[0]}` is set, but not `{name}`. A process of a job needs "
                f"`{COORDINATOR}=host:port`, `{PROCESSES}=` (how many there are) and `{PROCESS}=` "
                "(which one it is, from 0)."
            )
    count, index = _number(PROCESSES), _number(PROCESS)
    if not 0 <= index < count:
        raise RuntimeError(f"`{PROCESS}={index}` has to be from 0 to {count - 1}: `{PROCESSES}`.")
    address = os.environ[COORDINATOR]
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise RuntimeError(f"`{COORDINATOR}={address}` has to be `host:port`.")
    if count == 1:
        return None
    found: dict[str, Any] = {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
    }
    if index == 0:
        found["coordinator_bind_address"] = os.environ.get(BIND) or address
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        ids = os.environ["JAX_LOCAL_DEVICE_IDS"].split(",")
        found["local_device_ids"] = [int(number) for number in ids]
    return found


def _of_cluster() -> dict[str, Any] | None:
    """What JAX is to detect by itself, where something says that there is anything."""
    for variables, count in (
        (("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST"), "SLURM_STEP_NUM_TASKS"),
        (("OMPI_COMM_WORLD_RANK",), "OMPI_COMM_WORLD_SIZE"),
    ):
        if all(name in os.environ for name in variables) and int(os.environ.get(count, 1)) > 1:
            return {}
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
        return {}
    on_tpu = importlib.util.find_spec("libtpu") is not None
    return {} if on_tpu and jax.config.jax_platforms in (None, "", "tpu") else None  # type: ignore[attr-defined]


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise RuntimeError(f"`{name}={os.environ[name]}` has to be an integer.") from None


def _seconds(name: str, default: int) -> int:
    found = _number(name) if os.environ.get(name) else default
    if found <= 0:
        raise RuntimeError(f"`{name}={found}` has to be a positive number of seconds.")
    return found


def free_port() -> int:
    """A port of this machine's loopback interface that nobody listens on."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# Agreeing


def _service() -> Any:
    # Of all of JAX the one thing here that is internal: `multihost_utils` agrees on devices, which
    # a thread must not use while a step is under way.
    from jax._src import distributed

    return distributed.global_state


def count() -> int:
    """How many processes this job has; JAX's devices are not touched."""
    state = _service()
    return 1 if state.client is None else int(state.num_processes)


def index() -> int:
    """The number of this process."""
    state = _service()
    return 0 if state.client is None else int(state.process_id)


def is_main() -> bool:
    """Whether this is process 0, which logs, prints and decides."""
    return index() == 0


_asked: dict[str, Iterator[int]] = collections.defaultdict(lambda: iter(range(2**62)))


def next_topic(name: str) -> str:
    """A name for the next exchange of its kind: all processes have to ask in the same order."""
    return f"{name}/{next(_asked[name])}"


def gather(topic: str, mine: str) -> list[str]:
    """What each process has to say of a topic, by its number. Each topic is used once.

    **Raises:** `Disagreement` where one does not come to say it within
    `JAXLIGHTNING_AGREE_TIMEOUT_S` (600).
    """
    total = count()
    if total == 1:
        return [mine]
    client, me = _service().client, index()
    client.key_value_set(f"jaxlightning/{topic}/{me}", mine)
    return [mine if other == me else _heard(client, topic, other) for other in range(total)]


def share(topic: str, of_main: str) -> str:
    """What process 0 says of a topic, on all of them; the others' `of_main` is not looked at."""
    if count() == 1:
        return of_main
    client = _service().client
    if is_main():
        client.key_value_set(f"jaxlightning/{topic}/0", of_main)
        return of_main
    return _heard(client, topic, 0)


def _heard(client: Any, topic: str, other: int) -> str:
    timeout = _seconds(AGREE_TIMEOUT_S, 600)
    try:
        found: str = client.blocking_key_value_get(f"jaxlightning/{topic}/{other}", timeout * 1000)
    except Exception as error:
        raise Disagreement(
            f"Process {index()} waited {timeout} s for process {other} at `{topic}`, which did not "
            f"come there. They have to do the same things in the same order. ({error})"
        ) from error
    return found


def same_for_all(name: str, ours: dict[str, str]) -> None:
    """**Raises:** `Disagreement`, on all processes, that lists what differs between them."""
    if count() == 1:
        return
    lines = "\n".join(f"{key}: {value}" for key, value in sorted(ours.items()))
    texts = gather(next_topic(name), lines)
    if len(set(texts)) == 1:
        return
    with contextlib.suppress(Disagreement):
        gather(
            next_topic(f"{name}/told"), ""
        )  # or the first to end would take the word from others
    parts = [dict(line.split(": ", 1) for line in text.splitlines()) for text in texts]
    apart = [key for key in sorted(set().union(*parts)) if len({p.get(key) for p in parts}) > 1]
    told = "".join(
        f"\n  {key}: "
        + ", ".join(f"process {n} has {part.get(key, 'nothing')}" for n, part in enumerate(parts))
        for key in apart
    )
    raise Disagreement(
        f"The processes of this job do not run the same thing:{told}\nStart all of them with the "
        "same script, arguments, packages and data."
    )


def all_or_none(topic: str, error: BaseException | None) -> str | None:
    """Whether something failed on any process: what to say of it, the same on all of them."""
    mine = "" if error is None else f"{type(error).__name__}: {error}"
    for number, told in enumerate(gather(topic, mine)):
        if told:
            return f"process {number}: {told}" if count() > 1 else told
    return None
