"""Messages to the user, between progress bars."""

from __future__ import annotations

import sys

import jax


def announce(message: str) -> None:
    """Prints, once for all processes, and above a progress bar if there is one."""
    if jax.process_index() != 0:
        return
    # Not imported for this: where nobody has imported tqdm, there is no bar.
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        print(message, flush=True)
    else:
        tqdm.tqdm.write(message)
