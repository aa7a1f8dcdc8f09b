"""Messages to the user, between progress bars."""

from __future__ import annotations

import sys

import jax

from jaxlightning._say import may_be_lost


def announce(message: str, everywhere: bool = False) -> None:
    """Prints, above a progress bar if there is one; once for all processes, or in each of them."""
    if everywhere and jax.process_count() > 1:
        message = f"[process {jax.process_index()}] {message}"
    elif jax.process_index() != 0:
        return
    # Not imported for this: where nobody has imported tqdm, there is no bar.
    tqdm = sys.modules.get("tqdm")
    with may_be_lost:
        if tqdm is None:
            print(message, flush=True)
        else:
            tqdm.tqdm.write(message)
