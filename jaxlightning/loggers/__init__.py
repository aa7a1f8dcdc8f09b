"""Loggers: where the numbers of a run go."""

from ._csv import CSVLogger as CSVLogger
from ._jsonl import JSONLLogger as JSONLLogger
from ._logger import Logger as Logger
from ._tensorboard import TensorBoardLogger as TensorBoardLogger
