"""Arguments of the Trainer that are wrong, or contradict each other, and what it says of them."""

import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from naming import named

from jaxlightning import Callback, Trainer
from jaxlightning._arguments import Arguments
from jaxlightning.callbacks import (
    GradientClipping,
    GradientNormMonitor,
    ModelCheckpoint,
    TQDMProgressBar,
)
from jaxlightning.loggers import CSVLogger

INTEGERS = {
    "max_epochs": -1,
    "min_epochs": 0,
    "max_steps": -1,
    "min_steps": 0,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": -1,
    "log_every_n_steps": 1,
    "accumulate_grad_batches": 1,
    "reload_dataloaders_every_n_epochs": 0,
    "steps_per_dispatch": 1,
    "seed": 0,
}
LIMITS = [f"limit_{kind}_batches" for kind in ("train", "val", "test", "predict")]
SWITCHES = [
    "deterministic", "detect_anomaly", "barebones",
    "enable_checkpointing", "enable_progress_bar", "enable_model_summary",
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("unchecked_types")


def refused(error=ValueError, **arguments):
    """What the Trainer says of its arguments."""
    with pytest.raises(error) as caught:
        Trainer(**arguments)
    return str(caught.value)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name):
    least = INTEGERS[name]
    for value in (least - 1, 1.5, "3", True):
        message = refused(**{name: value})
        assert message.startswith(f"`{name}={value!r}` has to be an integer of at least {least}")
    assert ("-1 means no limit" in refused(**{name: 1.5})) == (name in ("max_epochs", "max_steps"))
    assert Trainer(**{name: max(least, 1)}) is not None


@pytest.mark.parametrize("name", SWITCHES)
def test_switches(name):
    assert refused(**{name: "yes"}) == f"`{name}='yes'` has to be `True` or `False`."
    assert refused(**{name: 1}) == f"`{name}=1` has to be `True` or `False`."


@pytest.mark.parametrize("name", [*LIMITS, "overfit_batches", "val_check_interval"])
def test_numbers_and_fractions_of_batches(name):
    for value in (-1, -0.5, 1.5, True, "all", float("nan")):
        assert refused(**{name: value}) == (
            f"`{name}={value!r}` has to be a number of batches (an integer) or a fraction of them "
            "(a float from 0.0 to 1.0)."
        )


WRONG = [
    ({"fast_dev_run": -1}, "`fast_dev_run=-1` has to be `True`, `False`, or a number of batches."),
    ({"fast_dev_run": 1.0}, "`fast_dev_run=1.0` has to be"),
    ({"val_check_interval": 0}, "`val_check_interval=0` would never validate. To switch validat"),
    ({"seed": 2**32}, "`seed=4294967296` has to be below 2**32: of larger ones JAX keeps 32 bits"),
    ({"max_time": "1 hour"}, '`max_time="1 hour"` is no duration. Write `max_time="00:12:00:00"`'),
    ({"precision": "bf16"}, "`precision='bf16'` is unknown; it is one of '32-true', 'bf16-mixed'"),
    ({"precision": "bf16"}, "Did you mean `'bf16-mixed'`?"),
    ({"precision": 16}, "Did you mean `'16-mixed'`?"),
    ({"precision": "16"}, "Did you mean `'16-mixed'`?"),
    ({"precision": "bf16-tru"}, "Did you mean `'bf16-true'`?"),
    ({"precision": 32}, "Did you mean `'32-true'`?"),
    ({"precision": "32"}, "Did you mean `'32-true'`?"),
    ({"precision": 64}, " Double precision is `Precision(*[jnp.float64] * 3)`, after `jax.config"),
    ({"precision": "64-true"}, '`Precision(*[jnp.float64] * 3)`, after `jax.config.update("jax_'),
    ({"on_recompile": "rise"}, 'it is "warn", "raise" or "ignore". Did you mean `raise`?'),
    ({"profiler": "simple"}, '`profiler=\'simple\'` is unknown. Write "jax", or a callback: `Prof'),
    ({"gradient_clip_val": 0}, "To switch clipping off, write `gradient_clip_val=None`."),
    ({"gradient_clip_val": -1.0}, "`gradient_clip_val=-1.0` has to be a positive number."),
    ({"gradient_clip_val": float("nan")}, "`gradient_clip_val=nan` has to be a positive number."),
    (
        {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "norms"},
        "`gradient_clip_algorithm='norms'` is unknown; it is \"norm\" or \"value\".",
    ),
    ({"devices": 0}, "`devices=0`, but JAX sees 4 `cpu` devices. Write a number from 1 to 4"),
    ({"devices": 5}, "or make virtual ones with `JAX_NUM_CPU_DEVICES`."),
    ({"devices": "all"}, '`devices=\'all\'` is unknown. Write "auto", a count, or a list.'),
    ({"devices": [0, 4]}, "`devices` has the entry 4, which is neither a device of `jax.devices"),
    ({"devices": [1, 1]}, "`devices=[1, 1]` has the same device twice."),
    ({"strategy": "dpp"}, "`strategy='dpp'` is unknown; it is one of ['auto', 'ddp', 'fsdp', 't"),
    ({"strategy": "dpp"}, "Did you mean `ddp`?"),
    ({"mesh": {"date": 4}}, "`mesh` has an unknown axis `date`; the axes are ('data', 'fsdp', "),
    ({"mesh": {"date": 4}}, "Did you mean `data`?"),
    ({"mesh": {"data": 3}}, "`mesh={'data': 3}` does not fit 4 devices: the product of the sizes"),
    ({"mesh": {"data": 2, "fsdp": 4}}, "does not fit 4 devices"),
    ({"mesh": {"data": -1, "fsdp": -1}}, "One size may be -1, which means what the others leave."),
    ({"mesh": {"data": -2, "fsdp": -2}}, "`mesh` has the size -2 for its axis `data`."),
    ({"mesh": {"data": 4.0}}, "`mesh` has the size 4.0 for its axis `data`. A size is a positive"),
    ({"mesh": {"data": 0}}, "`mesh` has the size 0 for its axis `data`."),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), WRONG, ids=str)
def test_values(arguments, says):
    assert says in refused(**arguments)


TYPES = [
    ({"max_time": 3}, "`max_time` is a `int`. Write"),
    ({"devices": []}, '`devices=[]` is neither "auto" nor a count nor a list.'),
    ({"devices": 1.5}, '`devices=1.5` is neither "auto" nor a count nor a list.'),
    ({"strategy": 3}, "`strategy` has the rule 3. A rule is a pair of a regular expression"),
    ({"strategy": [("weight",)]}, "`strategy` has the rule ('weight',). A rule is a pair"),
    ({"mesh": 4}, '`mesh=4` is a `int`. Write the sizes of its axes, such as `mesh={"data": -1}`'),
    ({"callbacks": 3}, "`callbacks` has the object `3`, which is no callback. Pass instances of"),
    ({"callbacks": [Callback]}, "`callbacks` has the class"),
    (
        {"logger": "csv"},
        "`logger` has a `str`, which is no `Logger`. Write `True`, `False`, or log",
    ),
    ({"logger": [3]}, "`logger` has a `int`, which is no `Logger`."),
    ({"default_root_dir": 3}, "`default_root_dir=3` has to be the path of a folder."),
]


@pytest.mark.parametrize(("arguments", "says"), TYPES, ids=str)
def test_types(arguments, says):
    assert says in refused(TypeError, **arguments)


def mesh_of_two():
    import jax

    return Mesh(np.asarray(jax.devices()[:2]), ("data",))


TOGETHER = [
    ({"min_steps": 3, "max_steps": 2}, "`min_steps=3` is more than `max_steps=2`."),
    ({"min_epochs": 3, "max_epochs": 2}, "`min_epochs=3` is more than `max_epochs=2`."),
    (
        {"steps_per_dispatch": 2, "accumulate_grad_batches": 3},
        "`steps_per_dispatch=2` makes one program of several steps, `accumulate_grad_batches=3` "
        "one step of several batches; only one of them can be more than 1.",
    ),
    (
        {"steps_per_dispatch": 2, "detect_anomaly": True},
        "blocks of `steps_per_dispatch=2` steps do not have. Write `steps_per_dispatch=1`.",
    ),
    (
        {"detect_anomaly": True, "precision": "16-mixed"},
        'Look for it with `precision="32-true"`.',
    ),
    (
        {"gradient_clip_val": 1.0, "callbacks": GradientClipping(1.0)},
        "would clip twice. Remove one of the two.",
    ),
    (
        {"gradient_clip_algorithm": "value"},
        "clips nothing without `gradient_clip_val`. Write `gradient_clip_val=1.0`.",
    ),
    (
        {"check_val_every_n_epoch": None},
        "counts batches across epochs, so `val_check_interval` has to be a number of batches, not "
        "the fraction 1.0.",
    ),
    (
        {"overfit_batches": 2, "limit_train_batches": 3},
        "`overfit_batches=2` and `limit_train_batches=3` contradict each other",
    ),
    (
        {"overfit_batches": 0.5, "limit_val_batches": 3},
        "`overfit_batches=0.5` and `limit_val_batches=3` contradict each other",
    ),
    (
        {"strategy": "fsdp", "mesh": {"data": -1}},
        '`strategy="fsdp"` shards over the axis "fsdp", which `mesh={\'data\': -1}` does not have. '
        'Write `mesh={"fsdp": -1}`, or leave `mesh` out.',
    ),
    (
        {"strategy": [("w", PartitionSpec("tensor"))], "mesh": {"data": -1}},
        '`strategy` shards `w` over the axis "tensor", which the mesh does not have; its axes are '
        "['data']. Write `mesh={\"tensor\": -1}`.",
    ),
    (
        {"mesh": mesh_of_two, "devices": 2},
        "`mesh` is a `Mesh`, which has its devices, so `devices=2` contradicts it.",
    ),
    (
        {"enable_checkpointing": False, "callbacks": [ModelCheckpoint()]},
        "`enable_checkpointing=False`, but `callbacks` has a `ModelCheckpoint`. Remove one of the",
    ),
    (
        {"enable_progress_bar": False, "callbacks": [TQDMProgressBar()]},
        "`enable_progress_bar=False`, but `callbacks` has a `TQDMProgressBar`.",
    ),
    (
        {"barebones": True, "callbacks": [ModelCheckpoint()]},
        "`barebones=True`, but `callbacks` has a `ModelCheckpoint`. Remove one of the two.",
    ),
    (
        {"callbacks": [GradientNormMonitor(), GradientNormMonitor(), ModelCheckpoint(),
                       ModelCheckpoint()]},
        "Two callbacks have the same `state_key`",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), TOGETHER, ids=named)
def test_contradictions(arguments, says):
    made = {name: value() if value is mesh_of_two else value for name, value in arguments.items()}
    assert says in refused(**made)


BARE = {
    "logger": CSVLogger("unused"),
    "enable_checkpointing": True,
    "enable_progress_bar": True,
    "enable_model_summary": True,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 2,
    "fast_dev_run": True,
    "detect_anomaly": True,
    "profiler": "jax",
}


@pytest.mark.parametrize("name", BARE)
def test_what_barebones_leaves_out_cannot_be_asked_for(name):
    message = refused(barebones=True, **{name: BARE[name]})
    assert message.startswith("`barebones=True` leaves out all that costs time, so `" + name)
    assert message.endswith("contradicts it. Write one of them.")


def test_unknown_arguments_are_named_with_the_nearest():
    assert refused(TypeError, max_epoch=3) == (
        "`Trainer` has no argument `max_epoch`. Did you mean `max_epochs`?"
    )
    assert "Did you mean `gradient_clip_val`" in refused(TypeError, gradient_clip_value=1.0)
    assert refused(TypeError, zzz=1) == "`Trainer` has no argument `zzz`."


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("accelerator", "set the variable `JAX_PLATFORMS`"),
        ("num_nodes", "processes are those of `jax.distributed`"),
        ("benchmark", "XLA tunes its kernels itself"),
        ("inference_mode", "evaluation never computes gradients"),
        ("use_distributed_sampler", "split over the devices"),
        ("model_registry", "`ModelCheckpoint` says where checkpoints go"),
        ("enable_autolog_hparams", "`TaskModule.hyperparameters` says what is logged"),
        ("sync_batchnorm", "statistics are those of the global batch already"),
        ("plugins", "there are none"),
    ],
)
def test_arguments_that_only_lightning_has_are_explained(name, says):
    assert f"`Trainer` has no argument `{name}`." in refused(TypeError, **{name: 1})
    assert says in refused(TypeError, **{name: 1})


def test_every_argument_has_a_case():
    """So that one that is added gets its test, here or beside what it does."""
    cases = {name for arguments, _ in (*WRONG, *TYPES, *TOGETHER) for name in arguments}
    cases |= {*INTEGERS, *LIMITS, *SWITCHES, *BARE, "overfit_batches", "val_check_interval"}
    assert set(Arguments.__dataclass_fields__) - cases == set()
