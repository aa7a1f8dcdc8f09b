"""What a run tells its user beside the logs."""

import sys


def say(message: str) -> None:
    """Prints to stderr, below a progress bar if there is one."""
    print(f"\n{message}", file=sys.stderr, flush=True)
