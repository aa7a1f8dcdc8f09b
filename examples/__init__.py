"""Tasks of all kinds, a short file each: `python -m examples.digits_equinox`."""
