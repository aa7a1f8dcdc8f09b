"""What `jaxlightning launch` starts: joins the job, then runs the user's script as `__main__`."""

from __future__ import annotations

import os
import runpy
import sys

from ._processes import initialise


def main() -> None:
    """`python -m jaxlightning.parallel._child [-m] SCRIPT ARGUMENT ...`"""
    is_module = sys.argv[1] == "-m"
    target, *arguments = sys.argv[2 if is_module else 1 :]
    initialise()
    sys.argv = [target, *arguments]
    if is_module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(target)))
        runpy.run_path(target, run_name="__main__")


if __name__ == "__main__":
    main()
