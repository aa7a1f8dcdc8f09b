"""Plans for devices that are not there, held against programs on devices that are."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stacked import Sharded, Transformer, series
from tasks import Classifier, quiet, rows

from albert_task import AlbertConfig, AlbertForMaskedLM
from albert_task._masking import num_predictions
from jaxlightning import DataLoader, cli
from jaxlightning._hardware import HARDWARE, Hardware, hardware
from jaxlightning._plan import peak_bytes
from jaxlightning.parallel._collectives import collectives

HERE = Path(__file__).parent


def tokens(rows, length):
    return {"tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32)}


def albert(config, **options):
    return lambda key: AlbertForMaskedLM.init(config, key, optimizer="adamw", **options)


def albert_flops(config, rows, length):
    """Of a training step, by the formula: products of the forward pass, and twice that back."""
    hidden, inner, width = config.hidden_size, config.intermediate_size, config.embedding_size
    layer = 4 * hidden * hidden + 2 * length * hidden + 2 * hidden * inner
    predicted = num_predictions(length, 0.15)
    body = length * (width * hidden + config.num_hidden_layers * layer)
    head = predicted * (hidden * width + width * config.vocab_size)
    return 3 * 2 * rows * (body + head)


@pytest.mark.long
def test_eight_devices_are_planned_exactly():
    done = subprocess.run(
        [sys.executable, str(HERE / "plan_job.py")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 1
    for held, planned in lines:
        assert planned == held


SCRIPT = """
import json, resource, time
import jax, jax.numpy as jnp
from albert_task import AlbertConfig, AlbertForMaskedLM
from jaxlightning import Trainer
trainer = Trainer(strategy="fsdp", precision="bf16-mixed", logger=False, enable_checkpointing=False)
config = AlbertConfig.preset("xxlarge")
plan = trainer.plan(
    lambda key: AlbertForMaskedLM.init(config, key, optimizer="adamw"),
    {"tokens": jax.ShapeDtypeStruct((4096, 512), jnp.int32)},
    mesh={"data": 64, "fsdp": 16},
    device="h100",
)
with open("/proc/self/status") as status:  # `ru_maxrss` would be the parent's, if that is more
    peak = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
print(json.dumps(plan.as_dict() | {"rss": peak, "cpu": sum(resource.getrusage(0)[:2])}))
"""


@pytest.mark.long
def test_xxlarge_on_1024_devices_is_planned_on_a_laptop():
    """In less than 1 GB and, of this machine's processors, 40 seconds on two of them."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    config = AlbertConfig.preset("xxlarge")
    assert found["flops"] == albert_flops(config, 4096, 512)
    assert found["rss"] < 10**9
    assert found["cpu"] < 40
    assert found["devices"] == 1024
    assert found["fits"] is True
    parameters = sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(
            eqx.filter(
                eqx.filter_eval_shape(albert(config), jax.random.key(0)),
                lambda x: isinstance(x, jax.ShapeDtypeStruct),
            )
        )
    )
    assert found["parameters"] * 16 == pytest.approx(parameters, rel=0.01)
    assert found["optimizer"] == pytest.approx(2 * found["parameters"], rel=0.01)
    by_kind = {talk["kind"]: talk for talk in found["talk"]}
    # Gathered in half precision, once; reduced in single precision, once.
    assert by_kind["all-gather"]["bytes"] == pytest.approx(parameters / 2, rel=0.01)
    assert by_kind["reduce-scatter"]["bytes"] == pytest.approx(parameters / 16, rel=0.01)
    assert 0 < found["mfu"] < 1
    assert any("fused" in sentence for sentence in found["estimated"])


@pytest.mark.long
def test_flops_are_those_of_the_formula_whatever_the_mesh():
    config = AlbertConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
    )
    for mesh in ({"data": 1}, {"data": 8}, {"fsdp": 4, "tensor": 2}):
        plan = quiet(strategy="auto").plan(albert(config), tokens(16, 32), mesh=mesh)
        assert plan.flops == albert_flops(config, 16, 32)


@pytest.mark.long
def test_flops_and_collectives_are_counted_in_scans():
    task = Transformer(layers=3)
    plan = quiet(accumulate_grad_batches=4).plan(
        task, {k: v[:8] for k, v in series().items()}, mesh={"data": 4}
    )
    one = quiet().plan(task, {k: v[:8] for k, v in series().items()}, mesh={"data": 1})
    assert plan.flops == 4 * one.flops
    assert plan.rows == 32
    assert 0 < plan.recomputed < plan.flops
    assert {talk.kind for talk in plan.talk} == {"all-reduce"}
    assert not one.talk


def test_a_plan_says_what_this_machines_own_program_needs():
    data = rows(16)
    trainer = quiet(max_steps=1, devices=4, strategy="fsdp")
    trainer.fit(Sharded(), DataLoader(data, 16))
    (program,) = trainer._run.program._compiled.values()
    plan = trainer.plan(Sharded(), data)
    assert plan.mesh == {"fsdp": 4}
    assert plan.peak == peak_bytes(program)
    assert sum(talk.times for talk in plan.talk) == len(collectives(program))
    assert plan.fits is plan.step_s is plan.mfu is None


def test_nothing_is_run_to_plan():
    def make(key):
        jax.debug.callback(lambda: pytest.fail("the initialiser was run"))
        return Classifier(key)

    plan = quiet().plan(make, rows(8), mesh={"data": 2})
    assert plan.devices == 2


def test_the_table_and_what_would_help():
    tiny = Hardware("tiny", 1e9, 1e9, 2**22, 1e9, 1e5, 1e5, 8)
    plan = quiet(strategy="auto").plan(Sharded(), rows(4096), mesh={"data": 4}, device=tiny)
    text = str(plan)
    assert plan.fits is False
    assert "DOES NOT FIT" in text
    assert re.search(r"temporaries +[\d.]+ MiB  \(estimate\)", text)
    assert "task/net/layers/1/weight" in text
    assert any(sentence.startswith("Larger batches:") for sentence in plan.advice)
    assert any(sentence.startswith("Micro-batches:") for sentence in plan.advice)
    large = quiet().plan(Sharded(), rows(8), mesh={"data": 4}, device="h100")
    assert any(sentence.startswith("FSDP:") for sentence in large.advice)
    assert "what would help" in text
    assert json.loads(plan.to_json())["peak"] == plan.peak
    assert plan.overlapped_s <= plan.step_s


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": {"data": 3}}, "The batch of 8 rows can't be split into 3 equal parts"),
        ({"mesh": {"data": -1}}, "got the size -1 for the axis `data`"),
        ({"mesh": {"date": 2}}, "unknown axis `date`"),
        ({"mesh": {"data": 4096}}, "has 4,096 devices, and 2,048 is the most that can be planned"),
        ({"device": "h10"}, "`device='h10'` is unknown. Did you mean"),
    ],
)
def test_what_cannot_be_planned(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        quiet().plan(Classifier(), rows(8), **options)


def test_the_table_of_devices_makes_sense():
    for name, known in HARDWARE.items():
        assert hardware(name.upper()) is known
        assert known.half >= known.single > 1e12
        assert known.network <= known.link < known.bandwidth
        assert 2**33 <= known.memory < 2**38
        assert known.peak(jnp.bfloat16) == known.half
        assert known.peak(np.float32) == known.single


# The command line


def script(tmp_path, returned):
    (tmp_path / "train.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "from tasks import Classifier, quiet, rows\n"
        "from jaxlightning import DataLoader\n"
        "def run():\n"
        f"    return {returned}\n"
        "other = 1\n"
        "def takes(argument): pass\n"
    )
    return f"{tmp_path / 'train.py'}:run"


def test_the_command_plans(tmp_path, capsys):
    run = script(tmp_path, "quiet(), Classifier(), DataLoader(rows(64), 32)")
    assert cli.main(["plan", run, "--mesh", "data=4", "--device", "a100-80g"]) == 0
    assert "4 devices (a100-80g), mesh {'data': 4}, 32 examples a step" in capsys.readouterr().out
    assert cli.main(["plan", run, "--mesh", "data=2,fsdp=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert math.prod(found["mesh"].values()) == found["devices"] == 4


@pytest.mark.parametrize(
    ("returned", "arguments", "message"),
    [
        ("quiet(), Classifier()", [], "returned a `tuple`. It has to return `(trainer, task, batc"),
        ("quiet(), Classifier(), rows(8)", ["--mesh", "data4"], "`--mesh data4` has to be sizes"),
        ("quiet(), Classifier(), rows(8)", ["--mesh", "data=3"], "can't be split into 3 equal"),
        ("quiet(), Classifier(), rows(8)", ["--device", "x"], "`device='x'` is unknown."),
        ("quiet().fit(Classifier(), DataLoader(rows(8), 8))", [], "return it before it trains"),
    ],
)
def test_what_the_command_refuses(tmp_path, capsys, returned, arguments, message):
    assert cli.main(["plan", script(tmp_path, returned), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Classifier", "is no function that returns `(trainer, task, batch)`"),
        ("other", "is no function that returns"),
        ("takes", "takes arguments. It has to be a function without any"),
    ],
)
def test_what_is_no_run(tmp_path, capsys, name, message):
    file = script(tmp_path, "None").removesuffix("run")
    assert cli.main(["plan", f"{file}{name}"]) == 2
    assert message in capsys.readouterr().err
