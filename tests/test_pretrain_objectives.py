"""`albert pretrain` as in the paper: pairs, n-grams, packed rows, mixed text, its recipe; and from
the weights of another run, with longer rows."""

import json

import jax
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


@pytest.mark.long
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
        (["--ema", "1"], "`--ema 1.0` has to be at least 0 and below 1"),
        (["--streaming"], "`--streaming` says something about `--dataset`"),
    ],
)
def test_what_does_not_go_together(texts, capsys, arguments, message):
    assert main(["pretrain", "--text", texts[0], *arguments]) == 2
    assert message in capsys.readouterr().err


def test_pairs_that_no_text_has(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n\n".join(f"the fox number {n}" for n in range(400)))
    given = ["--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    small = ["--model", "tiny", "--vocab-size", "60", "--seq-len", "64", "--objective", "mlm+sop"]
    assert main(["pretrain", *given, *small]) == 2
    assert "No row has a pair of segments" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()


# From weights


def first_run(texts, out, *arguments):
    given = [
        "pretrain", "--text", *texts, "--model", "tiny", "--vocab-size", "80", "--seq-len", "8",
        "--batch-size", "16", "--steps", "40", "--eval-interval", "20", "--devices", "1",
        "--out", str(out), *arguments,
    ]  # fmt: skip
    assert main(given) == 0
    return json.loads((out / "result.json").read_text())


@pytest.mark.long
def test_a_run_goes_on_from_the_weights_of_another(texts, tmp_path):
    """One step that changes nothing scores what the other run scored."""
    before = first_run(texts, tmp_path / "first")
    again = [
        "pretrain", "--text", *texts, "--model", str(tmp_path / "first"), "--lr", "1e-12",
        "--steps", "1", "--warmup", "0", "--devices", "1",
    ]  # fmt: skip
    same = ["--seq-len", "8", "--batch-size", "16", "--out", str(tmp_path / "same")]
    assert main([*again, *same]) == 0
    result = json.loads((tmp_path / "same" / "result.json").read_text())
    assert result["val_loss"] == pytest.approx(before["val_loss"], rel=1e-6)
    kept = [(tmp_path / run / "tokenizer.json").read_bytes() for run in ("first", "same")]
    assert kept[0] == kept[1]
    # Longer rows are another run of the same weights.
    longer = ["--seq-len", "32", "--batch-size", "4", "--out", str(tmp_path / "longer")]
    assert main([*again, *longer]) == 0
    first, *others = (from_pretrained(tmp_path / name) for name in ("first", "same", "longer"))
    for other in others:
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.long
def test_heads_that_the_weights_lack_begin_anew(texts, tmp_path, capsys):
    first_run(texts, tmp_path / "first", "--steps", "2")
    capsys.readouterr()
    arguments = [
        "pretrain", "--text", *texts, "--model", str(tmp_path / "first" / "model"), "--objective",
        "mlm+sop", "--seq-len", "24", "--batch-size", "8", "--steps", "2", "--dropout", "0.1",
        "--devices", "1", "--out", str(tmp_path / "pairs"),
    ]  # fmt: skip
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "begun with random weights: `albert.pooler.weight`" in said
    assert "`sop_classifier.classifier.bias`." in said
    task = from_pretrained(tmp_path / "pairs")
    assert type(task) is AlbertForPreTraining
    assert task.config.hidden_dropout_prob == 0.1


@pytest.mark.long
def test_weights_that_are_not_there_or_do_not_fit(texts, tmp_path, capsys):
    first_run(texts, tmp_path / "first", "--steps", "2")

    def refused(*arguments):
        capsys.readouterr()
        given = ["pretrain", "--text", *texts, "--out", str(tmp_path / "other"), *arguments]
        assert main(given) == 2
        return capsys.readouterr().err

    assert "and the hub did not give a model of that name" in refused("--model", "ab/se/nt")
    model = tmp_path / "first" / "model"
    assert "longer than the positions" in refused("--model", str(model), "--seq-len", "65")
    said = refused("--model", str(model), "--seq-len", "8", "--vocab-size", "81")
    assert f"`--vocab-size 81`, but the tokenizer `{model}` has " in said
    (model / "model.safetensors").unlink()
    assert "There are no weights in" in refused("--model", str(model), "--seq-len", "8")
    assert not (tmp_path / "other" / "run.json").exists()
