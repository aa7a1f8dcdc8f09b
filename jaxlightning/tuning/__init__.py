"""Finding what a run should be started with."""

from ._batch_size import batch_size as batch_size
