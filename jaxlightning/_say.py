"""What a run tells its user beside the logs."""

import contextlib
import os
import sys

may_be_lost = contextlib.suppress(OSError, ValueError)
"""Around the writing of a message, which may never end a run: Ctrl-C in `train.py 2>&1 | tee log`
reaches `tee` too, and from then on all that is written to the pipe is an error."""


def say(message: str) -> None:
    """Prints to stderr, below a progress bar if there is one."""
    with may_be_lost:
        print(f"\n{message}", file=sys.stderr, flush=True)


def say_from_handler(message: str) -> None:
    """As `say`, in a signal's handler: what `print` writes to may be at work already, and is not
    reentrant."""
    with may_be_lost:
        os.write(2, f"\n{message}\n".encode())
