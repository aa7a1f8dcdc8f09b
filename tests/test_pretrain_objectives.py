"""`albert pretrain` as in the paper: pairs, n-grams, packed rows, mixed text, its recipe."""

import json

import numpy as np
import pytest
import yaml

from albert_task import AlbertForPreTraining, from_pretrained
from albert_task._cli import main

ANIMALS = ["fox", "dog", "cat", "hen", "owl", "pig", "cow", "ant", "bee", "elk"]
PLACES = ["barn", "lake", "hill", "wood", "farm", "yard", "road", "nest", "cave", "tree"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    generator = np.random.default_rng(0)
    for name, count in (("a", 30), ("b", 20)):
        documents = []
        for _ in range(count):
            numbers = generator.integers(0, 10, 8)
            lines = [f"The {ANIMALS[n]} is in the {PLACES[n]}." for n in numbers]
            documents.append(" ".join(lines))
        (folder / f"{name}.txt").write_text("\n\n".join(documents))
    return [str(folder / "a.txt"), str(folder / "b.txt")]


def test_a_run_as_in_the_paper(texts, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [
        "pretrain", "--text", *texts, "--weights", "3", "1", "--vocab-size", "80",
        "--model", "tiny", "--seq-len", "24", "--batch-size", "8",
        "--objective", "mlm+sop", "--ngram", "3",
        "--predictions", "4", "--packed", "--optimizer", "lamb_reference", "--schedule",
        "reference", "--lr", "0.1", "--scale-lr", "--warmup", "2", "--ema", "0.5", "--steps", "8",
        "--eval-interval", "4", "--log-interval", "4", "--devices", "1", "--out", str(out),
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "sentence order" in printed
    assert "perplexity" in printed
    result = json.loads((out / "result.json").read_text())
    assert result["steps"] == 8
    assert result["val_loss"] > result["val_mlm"]
    assert 0 <= result["val_sop_accuracy"] <= 1
    task = from_pretrained(out)
    assert type(task) is AlbertForPreTraining
    options = yaml.safe_load((out / "config.yaml").read_text())
    assert options["objective"] == "mlm+sop"
    assert options["weights"] == [3.0, 1.0]
    assert {path.name for path in out.glob("tokens-*")} == {"tokens-0", "tokens-1"}
    assert main(arguments) == 0
    assert "This run is done: 8 steps" in capsys.readouterr().out
    # Its own file of options is the same command.
    assert main(["pretrain", "--config", str(out / "config.yaml")]) == 0
    assert "This run is done: 8 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "1", "2"], "There are 2 `--weights`, but 1 globs of `--text`"),
        (["--objective", "sop"], "`--objective sop` is unknown; it is one of `mlm`, `mlm+sop`"),
        (["--schedule", "reference", "--epochs", "2"], "needs their number: `--steps N`"),
        (["--predictions", "64"], "leave nothing to predict from"),
        (["--ngram", "-1"], "`--ngram -1` has to be at least 0"),
        (["--ema", "1"], "`--ema 1.0` has to be below 1"),
        (["--streaming"], "`--streaming` says something about `--dataset`"),
    ],
)
def test_what_does_not_go_together(texts, capsys, arguments, message):
    assert main(["pretrain", "--text", texts[0], *arguments]) == 2
    assert message in capsys.readouterr().err
