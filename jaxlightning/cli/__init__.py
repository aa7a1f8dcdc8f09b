"""The command line, `jaxlightning COMMAND ...`."""

from ._main import main as main
