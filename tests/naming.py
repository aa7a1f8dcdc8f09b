"""Names of parametrised tests, on which all processes of `pytest -n` agree."""

import re


def named(value):
    """`str(value)` without addresses, and short."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))[:80]
