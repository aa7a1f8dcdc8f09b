"""A trainer for JAX, shaped like PyTorch Lightning.

task = Trainer(max_epochs=3).fit(task, DataLoader(arrays, batch_size=32, shuffle=True))
"""

from ._callback import Callback as Callback
from ._callback import Checkpoint as Checkpoint
from ._callback import InsideStep as InsideStep
from ._checkpoint import CheckpointDamaged as CheckpointDamaged
from ._checkpoint import CheckpointError as CheckpointError
from ._checkpoint import CheckpointMismatch as CheckpointMismatch
from ._checkpoint import RunLocked as RunLocked
from ._checkpoint import SaveFailed as SaveFailed
from ._checkpoint import export_weights as export_weights
from ._checkpoint import load_arrays as load_arrays
from ._classification import F1 as F1
from ._classification import Accuracy as Accuracy
from ._classification import ConfusionMatrix as ConfusionMatrix
from ._classification import MatthewsCorrelation as MatthewsCorrelation
from ._classification import Pearson as Pearson
from ._classification import Perplexity as Perplexity
from ._classification import TopKAccuracy as TopKAccuracy
from ._metrics import Last as Last
from ._metrics import Max as Max
from ._metrics import Mean as Mean
from ._metrics import Metric as Metric
from ._metrics import Min as Min
from ._metrics import Sum as Sum
from ._precision import Precision as Precision
from ._program import RecompilationWarning as RecompilationWarning
from ._state import TrainState as TrainState
from ._task import TaskModule as TaskModule
from ._task import buffer as buffer
from ._trainer import Trainer as Trainer
from ._weights import load_weights as load_weights
from ._weights import warm_start as warm_start
from .data import DataLoader as DataLoader
from .data import DataModule as DataModule
from .data import TokenFile as TokenFile

__version__ = "0.1.0"
