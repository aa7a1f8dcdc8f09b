"""Built-in callbacks, installed as `jaxlightning.callbacks`."""

if __name__ != "jaxlightning.callbacks":
    raise ImportError(
        f"`{__name__}` is the source folder of `jaxlightning.callbacks`: run "
        "`pip install -e .` and import it under that name."
    )

from ._device_stats import DeviceStatsMonitor as DeviceStatsMonitor
from ._digest import Digest as Digest
from ._early_stopping import EarlyStopping as EarlyStopping
from ._ema import ExponentialMovingAverage as ExponentialMovingAverage
from ._gradients import GradientClipping as GradientClipping
from ._gradients import GradientNormMonitor as GradientNormMonitor
from ._lambda import LambdaCallback as LambdaCallback
from ._learning_rate import LearningRateSchedule as LearningRateSchedule
from ._loss_spike import LossSpike as LossSpike
from ._lr_monitor import LearningRateMonitor as LearningRateMonitor
from ._model_checkpoint import ModelCheckpoint as ModelCheckpoint
from ._non_finite import SkipNonFinite as SkipNonFinite
from ._plateau import ReduceLROnPlateau as ReduceLROnPlateau
from ._profiler import Profiler as Profiler
from ._progress import TQDMProgressBar as TQDMProgressBar
from ._replay_capsule import ReplayCapsule as ReplayCapsule
from ._summary import ModelSummary as ModelSummary
from ._throughput import ThroughputMonitor as ThroughputMonitor
from ._timer import Timer as Timer

__all__ = [
    "DeviceStatsMonitor",
    "Digest",
    "EarlyStopping",
    "ExponentialMovingAverage",
    "GradientClipping",
    "GradientNormMonitor",
    "LambdaCallback",
    "LearningRateMonitor",
    "LearningRateSchedule",
    "LossSpike",
    "ModelCheckpoint",
    "ModelSummary",
    "Profiler",
    "ReduceLROnPlateau",
    "ReplayCapsule",
    "SkipNonFinite",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
]
