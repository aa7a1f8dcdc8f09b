"""What a run tells its user beside the logs."""

import contextlib
import os
import sys
import warnings
from types import FrameType

may_be_lost = contextlib.suppress(OSError, ValueError)
"""Around the writing of a message, which may never end a run: Ctrl-C in `train.py 2>&1 | tee log`
reaches `tee` too, and from then on all that is written to the pipe is an error."""


def _is_main() -> bool:
    """Whether this process speaks for its job: of what all of them would say, one is enough."""
    # Not imported above: what is imported by all may import nothing.
    from .parallel._processes import is_main

    return is_main()


def say(message: str) -> None:
    """Prints to stderr, below a progress bar if there is one; of several processes, the first."""
    if not _is_main():
        return
    with may_be_lost:
        print(f"\n{message}", file=sys.stderr, flush=True)


def say_from_handler(message: str) -> None:
    """As `say`, in a signal's handler: what `print` writes to may be at work already, and is not
    reentrant."""
    with may_be_lost:
        os.write(2, f"\n{message}\n".encode())


_ON_THE_WAY = {"jaxlightning", "jaxtyping", "beartype", "contextlib", "threading"}
"""Top-level names of the modules between a line of the user's and a warning."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns of something, as of the user's line that led to it, such as `trainer.fit(...)`; of
    several processes, the first."""
    if not _is_main():
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _top_level(frame) in _ON_THE_WAY:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _top_level(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0]
