"""`albert pretrain` from text to filled-in masks: trained, cut short, resumed, and done."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from naming import named

from albert_task import AlbertConfig, AlbertForMaskedLM, _pretrain, load_tokenizer
from albert_task._cli import main
from albert_task._demonstration import SENTENCES, blanked, demonstrated
from albert_task._options import PretrainOptions
from albert_task._pretrain import make_trainer, new_task
from albert_task._stages import prepare
from albert_task._tokenizer import tokenizer_hash
from jaxlightning._checkpoint_files import RunLock
from jaxlightning._checkpoint_read import load_arrays
from jaxlightning.callbacks import EarlyStopping, LearningRateSchedule, ModelCheckpoint

ANIMALS = ["fox", "dog", "cat", "hen", "owl", "pig", "cow", "ant", "bee", "elk"]
PLACES = ["barn", "lake", "hill", "wood", "farm", "yard", "road", "nest", "cave", "tree"]

# The command, with a signal to itself at a step where one is given.
PROGRAM = """
import os, signal, sys
from albert_task import _cli, _pretrain
from jaxlightning import Callback

class Strike(Callback):
    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        if trainer.global_step == int(os.environ["STRIKE_AT"]):
            os.kill(os.getpid(), getattr(signal, os.environ["STRIKE"]))

made = _pretrain._callbacks
if "STRIKE" in os.environ:
    _pretrain._callbacks = lambda *given: [*made(*given), Strike()]
raise SystemExit(_cli.main())
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents in which a place follows from the animal: what a model can learn."""
    generator = np.random.default_rng(0)
    documents = []
    for _ in range(40):
        numbers = generator.integers(0, 10, 12)
        documents.append(" ".join(f"the {ANIMALS[n]} is in the {PLACES[n]}." for n in numbers))
    path = tmp_path_factory.mktemp("text") / "animals.txt"
    path.write_text("\n\n".join(documents))
    return path


def arguments(text, out, **changes):
    given = {
        "text": text,
        "out": out,
        "model": "tiny",
        "vocab-size": 70,
        "seq-len": 16,
        "batch-size": 8,
        "steps": 30,
        "eval-interval": 10,
        "log-interval": 4,
        "val-rows": 16,
        "devices": 1,
    }
    given |= {name.replace("_", "-"): value for name, value in changes.items()}
    return ["pretrain", *(part for k, v in given.items() for part in (f"--{k}", str(v)))]


def command(text, out, strike=None, **changes):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if strike is not None:
        environment |= {"STRIKE": strike[0], "STRIKE_AT": str(strike[1])}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments(text, out, **changes)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def logged(out):
    """What was logged, but for how long it took."""
    with (out / "logs" / "metrics.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if "throughput" not in name}
            for row in csv.DictReader(file)
        ]


def arrays(out, step):
    return load_arrays(out / "checkpoints" / f"step={step}")


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = command(text, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(out=out, stdout=done.stdout, stderr=done.stderr)


# A whole run


def test_the_table_compares_with_the_baseline_and_says_where_everything_is(whole, text):
    result = json.loads((whole.out / "result.json").read_text())
    rows = {line[:17].strip(): line[17:].split() for line in whole.stdout.splitlines()}
    assert rows["validation loss"][0] == f"{result['val_loss']:.3f}"
    assert rows["validation loss"][1] == f"{result['baseline']['cross_entropy']:.3f}"
    assert rows["masked accuracy"][0] == f"{result['val_accuracy']:.1%}"
    assert rows["training"][:2] == ["30", "steps,"]
    assert rows["speed"][1] == "tokens/s,"
    assert rows["logs"][0] == str(whole.out / "logs")
    assert Path(rows["checkpoint"][0]).is_dir()


def test_the_baseline_is_that_of_the_validation_rows(whole, text):
    """By counting, for a tokenizer and a split that were made before."""
    store = prepare(PretrainOptions(**options_of(text, whole.out))).data
    train = np.bincount(
        store.train_rows[0][np.arange(len(store.train_rows[0]))]["input_ids"].ravel(), minlength=70
    )
    validation = store.val_rows[0][np.arange(len(store.val_rows[0]))]["input_ids"].ravel()
    validation = validation[validation > 4]
    train[:5] = 0
    baseline = json.loads((whole.out / "result.json").read_text())["baseline"]
    assert baseline["accuracy"] == pytest.approx(np.mean(validation == train.argmax()))
    assert baseline["piece"] in whole.stdout


def options_of(text, out):
    return dict(
        text=(str(text),), out=str(out), model="tiny", vocab_size=70, seq_len=16, batch_size=8,
        steps=30, eval_interval=10, log_interval=4, val_rows=16, devices="1",
    )  # fmt: skip


def test_every_mask_gets_its_guesses(whole, text):
    """In held-out text, of which a word is hidden."""
    said = whole.stdout[whole.stdout.index("What the model fills in:") :]
    result = json.loads((whole.out / "result.json").read_text())
    assert 0 < len(result["filled"]) <= len(SENTENCES)
    for one in result["filled"]:
        assert f"  {one['text']}    (there was: {one['word']})\n" in said
        assert one["text"].replace("[MASK]", one["word"]) in text.read_text().lower()
        (guesses,) = one["guesses"]
        assert [p for _, p in guesses] == sorted((p for _, p in guesses), reverse=True)


def test_sentences_of_the_corpus_that_nobody_chose(whole, text):
    prepared = prepared_of(text, whole.out, {})
    prepared = dataclasses.replace(prepared, options=dataclasses.replace(prepared.options, text=()))
    task = AlbertForMaskedLM.init(prepared.config, jax.random.key(0))
    found = demonstrated(task, prepared)
    room = prepared.config.max_position_embeddings
    fitting = [s for s in SENTENCES if len(prepared.tokenizer.encode(s).ids) <= room]
    assert [one["text"] for one in found] == fitting
    assert [len(one["guesses"]) for one in found] == [s.count("[MASK]") for s in fitting]


@pytest.mark.parametrize(
    ("sentence", "word"),
    [
        ("one two three four five six seven.", "four"),
        ("a is to be or not", None),
        ("the dog's tail is hidden in here", "tail"),
    ],
)
def test_the_word_in_the_middle_is_hidden(sentence, word):
    found = blanked(sentence)
    assert (found and found.word) == word
    assert found is None or found.text.replace("[MASK]", word) == sentence


def test_the_loss_begins_at_the_unigram_entropy(whole):
    rows = [row for row in logged(whole.out) if row["train/loss"]]
    result = json.loads((whole.out / "result.json").read_text())
    assert float(rows[0]["train/loss"]) == pytest.approx(result["baseline"]["entropy"], rel=0.1)


@pytest.mark.long
def test_the_loss_falls_below_that_of_unigrams(text, tmp_path):
    more = {"steps": 150, "batch_size": 64, "val_rows": 256, "eval_interval": 30}
    assert main(arguments(text, tmp_path / "run", **more)) == 0
    first, *_, last = (row for row in logged(tmp_path / "run") if row["val/loss"])
    assert float(last["val/loss"]) < float(first["val/loss"])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["val_loss"] < result["baseline"]["cross_entropy"]


def test_logs_are_on_their_steps_and_the_best_checkpoint_is_kept(whole):
    rows = logged(whole.out)
    assert [int(r["step"]) for r in rows if r["train/loss"]] == list(range(4, 30, 4))
    assert [int(r["step"]) for r in rows if r["val/loss"]] == [10, 20, 30]
    peak = PretrainOptions(model="tiny").peak
    assert all(0 <= float(r["train/lr"]) <= peak * 1.001 for r in rows if r["train/lr"])
    assert list((whole.out / "logs").glob("events.out.tfevents.*"))
    parameters = json.loads((whole.out / "logs" / "hparams.json").read_text())
    assert (parameters["hidden_size"], parameters["seed"]) == (32, 0)
    found = json.loads((whole.out / "result.json").read_text())
    losses = {int(r["step"]): float(r["val/loss"]) for r in rows if r["val/loss"]}
    assert found["val_loss"] == pytest.approx(min(losses.values()))
    assert found["checkpoint"].endswith(f"step={min(losses, key=losses.__getitem__)}")


def test_there_is_a_progress_bar_for_every_stage(whole):
    for title in ("Reading", "Tokenizer", "Encoding", "Training: 30/30"):
        assert title in whole.stderr


def test_the_same_command_again_says_that_it_is_done(whole, text, capsys, monkeypatch):
    monkeypatch.setattr(_pretrain, "_trained", None)
    assert main(arguments(text, whole.out)) == 0
    said = capsys.readouterr().out
    assert (
        f"This run is done: 30 steps. To go on from it, `--model {whole.out} --out FOLDER`" in said
    )
    assert whole.stdout[whole.stdout.index("validation loss") :] in said


# Cut short


@pytest.mark.long
@pytest.mark.parametrize(
    ("signal", "code", "step"),
    [("SIGINT", 130, 13), pytest.param("SIGTERM", 143, 20, marks=pytest.mark.slow)],
)
def test_an_interrupted_run_goes_on_to_the_same_result(whole, text, tmp_path, signal, code, step):
    out = tmp_path / "run"
    cut = command(text, out, strike=(signal, step))
    assert cut.returncode == code, cut.stderr[-3000:]
    assert f"saved step {step}" in cut.stderr
    assert "The same command goes on from there" in cut.stderr
    assert "Traceback" not in cut.stderr
    assert not (out / "result.json").exists()
    resumed = command(text, out)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    expected, found = arrays(whole.out, 30), arrays(out, 30)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert logged(out) == logged(whole.out)


def test_a_second_run_in_a_folder_is_refused_at_once(text, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lock = RunLock(folder)
    try:
        code = "from albert_task._cli import main; raise SystemExit(main())"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments(text, tmp_path / "run")],
            capture_output=True,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            timeout=300,
        )
    finally:
        lock.release()
    assert done.returncode == 2, done.stderr[-3000:]
    assert f"`{folder}` is in use by process {os.getpid()}" in done.stderr
    assert "Here that is `--out FOLDER`" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Reading" not in done.stderr


# Options


@pytest.mark.slow
def test_a_run_that_stops_improving_is_over_until_it_gets_more_patience(text, tmp_path, capsys):
    given = dict(lr=3.0, clip=0, warmup=0, eval_interval=2, log_interval=2, steps=20)
    out = tmp_path / "run"
    assert main(arguments(text, out, patience=1, **given)) == 0
    first = json.loads((out / "result.json").read_text())
    assert first["steps"] < 20
    assert "`val/loss` did not improve" in first["stopped"]
    capsys.readouterr()
    assert main(arguments(text, out, patience=1, **given)) == 0
    assert f"This run is done: {first['steps']} steps (stopped: " in capsys.readouterr().out
    assert main(arguments(text, out, patience=99, **given)) == 0
    assert json.loads((out / "result.json").read_text())["steps"] == 20


@pytest.mark.slow
def test_options_together_reach_the_trainer_and_the_optimizer(text, tmp_path, capsys):
    given = dict(
        epochs=2, accumulate=3, precision="bf16-mixed", optimizer="lamb", schedule="linear",
        dropout=0.1, b1=0.8, keep=2, eval_interval=3, mask_probability=0.3, max_time="00:01:00:00",
    )  # fmt: skip
    out = tmp_path / "run"
    assert main(arguments(text, out, **given)) == 0
    result = json.loads((out / "result.json").read_text())
    batches = len(prepared_of(text, out, given).data.train_dataloader())
    assert (result["epochs"], result["steps"]) == (2, 2 * -(-batches // 3))
    parameters = json.loads((out / "logs" / "hparams.json").read_text())
    expected = {
        "optimizer": "lamb", "b1": 0.8, "hidden_dropout_prob": 0.1, "mask_rate": 0.3,
        "accumulate_grad_batches": 3, "precision": "bf16-mixed",
    }  # fmt: skip
    assert {name: parameters[name] for name in expected} == expected
    assert len(list((out / "checkpoints").glob("step=*"))) >= 2


def prepared_of(text, out, given):
    return prepare(PretrainOptions(**(options_of(text, out) | given)))


WIRES = [
    ({"steps": 7}, lambda t: t.max_steps, 7),
    ({"epochs": 4}, lambda t: (t.max_epochs, t.max_steps), (4, -1)),
    ({"max_time": "00:00:01:00"}, lambda t: t.max_time, "00:00:01:00"),
    ({"accumulate": 3}, lambda t: (t.accumulate_grad_batches, t.val_check_interval), (3, 1500)),
    ({"steps_per_dispatch": 4}, lambda t: t.steps_per_dispatch, 4),
    ({"clip": 0.5}, lambda t: t.gradient_clip_val, 0.5),
    ({"clip": 0.0}, lambda t: t.gradient_clip_val, None),
    ({"precision": "16-mixed"}, lambda t: t.precision.compute, jax.numpy.float16),
    ({"devices": "2"}, lambda t: t.mesh.size, 2),
    ({"devices": "4", "strategy": "fsdp"}, lambda t: dict(t.mesh.shape)["fsdp"], 4),
    ({"seed": 5}, lambda t: t.seed, 5),
    ({"eval_interval": 9}, lambda t: t.val_check_interval, 9),
    ({"eval_interval": 9}, lambda t: of(t, ModelCheckpoint).every_n_train_steps, 9),
    ({"log_interval": 9}, lambda t: t.log_every_n_steps, 9),
    ({"patience": 3}, lambda t: of(t, EarlyStopping).patience, 3),
    ({"keep": 3}, lambda t: of(t, ModelCheckpoint).save_top_k, 3),
    ({"schedule": "linear"}, lambda t: of(t, LearningRateSchedule).schedule, "linear"),
    ({"warmup": 0.25}, lambda t: of(t, LearningRateSchedule).warmup, 0.25),
    ({"deterministic": True}, lambda t: t.deterministic, True),
    ({"detect_anomaly": True}, lambda t: t.detect_anomaly, True),
    ({"profile": True}, lambda t: t.profiler, "jax"),
]


def of(trainer, kind):
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))


@pytest.mark.parametrize(("given", "read", "expected"), WIRES, ids=named)
def test_an_option_reaches_the_trainer(tmp_path, given, read, expected):
    trainer = make_trainer(PretrainOptions(**({"devices": "1"} | given)), tmp_path)
    assert read(trainer) == expected


def test_options_of_the_task_reach_it(whole, text):
    given = dict(optimizer="lion", lr=0.5, weight_decay=0.25, b1=0.7, b2=0.8, mask_probability=0.4)
    prepared = prepared_of(text, whole.out, {})
    options = dataclasses.replace(prepared.options, **given)
    shares = np.linspace(1, 2, 70)
    task = new_task(jax.random.key(0), dataclasses.replace(prepared, options=options), shares)
    recipe = task.recipe
    found = (recipe.optimizer, recipe.learning_rate, recipe.weight_decay, recipe.b1, recipe.b2)
    assert found == ("lion", 0.5, 0.25, 0.7, 0.8)
    assert task.mask_rate == 0.4
    np.testing.assert_allclose(task.head.bias, np.log(shares), rtol=1e-6)


def test_more_devices_than_there_are_is_refused_before_anything_is_read(tmp_path, capsys):
    given = ["pretrain", "--text", str(tmp_path / "none"), "--devices", "99"]
    assert main([*given, "--out", str(tmp_path / "run")]) == 2
    assert "`devices=99`, but JAX sees" in capsys.readouterr().err


@pytest.mark.long
def test_few_positions_and_a_given_tokenizer(whole, text, tmp_path, capsys):
    """What is not done yet can be exported."""
    size = load_tokenizer(whole.out).get_vocab_size()
    config = AlbertConfig.preset("tiny", vocab_size=size, max_position_embeddings=16)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    out = tmp_path / "run"
    given = arguments(text, out, model=tmp_path / "config.json", steps=2, eval_interval=2)
    place = given.index("--vocab-size")
    given[place : place + 2] = ["--tokenizer", str(whole.out / "tokenizer.json")]
    assert main(given) == 0
    capsys.readouterr()
    assert main(given) == 0
    assert "This run is done: 2 steps." in capsys.readouterr().out
    (out / "result.json").unlink()
    assert main(["export", "--model", str(out), "--out", str(tmp_path / "exported")]) == 0
    kept = load_tokenizer(tmp_path / "exported")
    assert tokenizer_hash(kept) == tokenizer_hash(load_tokenizer(whole.out))
