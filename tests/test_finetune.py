"""`albert finetune` and what one does with its models, on tiny data, in this process."""

import json

import jax
import numpy as np
import pytest
import yaml
from tiny_albert import TINY

from albert_task import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForPreTraining,
    from_pretrained,
    load_tokenizer,
    pseudo_perplexity,
    save_pretrained,
    train_tokenizer,
)
from albert_task._cli import main

GOOD, BAD = ("good fine great nice", "bad poor awful sad")
WORDS = f"{GOOD} {BAD} the a film was it and play who where Anna Berlin wrote lives in"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The folder of a tiny model with random weights and its tokenizer."""
    folder = tmp_path_factory.mktemp("pretrained")
    tokenizer = train_tokenizer([WORDS] * 30, 90)
    config = AlbertConfig.preset(
        "tiny", vocab_size=tokenizer.get_vocab_size(), classifier_dropout_prob=0.0
    )
    save_pretrained(AlbertForPreTraining.init(config, jax.random.key(0)), folder, tokenizer)
    return folder


def sentences(count, seed):
    generator = np.random.default_rng(seed)
    for _ in range(count):
        label = int(generator.integers(0, 2))
        word = generator.choice((BAD, GOOD)[label].split())
        yield f"the {generator.choice(['film', 'play'])} was {word}", ("bad", "good")[label]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, count, seed in (("train", 160, 0), ("dev", 40, 1)):
        lines = ["sentence\tlabel", *("\t".join(one) for one in sentences(count, seed))]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


LEARN = ["--optimizer", "muon", "--lr", "1e-2", "--batch-size", "8", "--devices", "1"]


@pytest.fixture(scope="module")
def tuned(pretrained, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "run"
    arguments = [
        "finetune", "--model", str(pretrained), "--train", str(data / "train.tsv"),
        "--validation", str(data / "dev.tsv"), "--epochs", "8", "--seeds", "2",
        "--patience", "6", "--out", str(out), *LEARN,
    ]  # fmt: skip
    assert main(arguments) == 0
    return out


def test_it_learns_keeps_the_best_and_says_so(tuned, data):
    result = json.loads((tuned / "result.json").read_text())
    assert [one["seed"] for one in result["seeds"]] == [0, 1]
    values = [one["scores"]["accuracy"] for one in result["seeds"]]
    assert max(values) > 0.95
    assert result["summary"]["accuracy"]["mean"] == pytest.approx(np.mean(values))
    assert result["summary"]["accuracy"]["spread"] == pytest.approx(np.std(values, ddof=1))
    task = from_pretrained(tuned)
    assert task.config.labels == ("bad", "good")
    rows = [json.loads(line) for line in (tuned / "predictions.jsonl").read_text().splitlines()]
    truth = [line.split("\t")[1] for line in (data / "dev.tsv").read_text().splitlines()[1:]]
    right = np.mean([row["label"] == label for row, label in zip(rows, truth, strict=True)])
    assert right == pytest.approx(max(values))
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5) for row in rows)
    options = yaml.safe_load((tuned / "config.yaml").read_text())
    assert (options["epochs"], options["optimizer"], options["seeds"]) == (8, "muon", 2)


def test_evaluating_and_predicting_with_it(tuned, data, tmp_path, capsys):
    assert main(["evaluate", "--model", str(tuned), "--data", str(data / "dev.tsv")]) == 0
    printed = capsys.readouterr().out
    best = max(
        s["scores"]["accuracy"] for s in json.loads((tuned / "result.json").read_text())["seeds"]
    )
    assert f"{'accuracy':<24}{best:.4f}" in printed
    (tmp_path / "new.jsonl").write_text('{"text": "the play was awful"}\n{"text": "a nice film"}')
    assert main(["predict", "--model", str(tuned), "--data", str(tmp_path / "new.jsonl")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]
    assert [row["label"] for row in rows] == ["bad", "good"]
    out = tmp_path / "labels.jsonl"
    arguments = ["--data", str(tmp_path / "new.jsonl"), "--out", str(out)]
    assert main(["predict", "--model", str(tuned), *arguments]) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows


def test_labels_that_the_model_does_not_know(tuned, tmp_path, capsys):
    (tmp_path / "a.tsv").write_text("sentence\tlabel\nfilm\tgood\nplay\tgreat\n")
    assert main(["evaluate", "--model", str(tuned), "--data", str(tmp_path / "a.tsv")]) == 2
    said = capsys.readouterr().err
    assert "line 3 of" in said
    assert "`great`, which is no label of the model: `bad`, `good`" in said


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squad")
    qas = []
    for number in range(48):
        name, city = ("Anna", "Berlin")[:: 1 if number % 2 else -1]
        context = f"the film was nice and {name} wrote it and {city} was great"
        answer = {"text": name, "answer_start": context.index(name)}
        one = {"id": str(number), "question": "who wrote it", "answers": [answer]}
        qas.append({"context": context, "qas": [one]})
    (folder / "squad.json").write_text(json.dumps({"data": [{"paragraphs": qas}]}))
    return folder / "squad.json"


def test_answers(pretrained, questions, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [
        "finetune", "--task", "qa", "--model", str(pretrained), "--train", str(questions),
        "--validation", str(questions), "--epochs", "12", "--max-length", "40", "--doc-stride",
        "8", "--out", str(out), *LEARN, "--batch-size", "16",
    ]  # fmt: skip
    assert main(arguments) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["seeds"][0]["scores"]["f1"] > 0.8
    capsys.readouterr()
    asked = ["--question", "who wrote it", "--context", "the film was nice and Anna wrote it"]
    assert main(["answer", "--model", str(out), "--devices", "1", "--top-k", "2", *asked]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "Anna"
    assert len(lines) == 3
    assert main(["answer", "--model", str(pretrained), *asked]) == 2
    assert "is a `AlbertForPreTraining`, which answers no questions" in capsys.readouterr().err


def kinds(folder):
    rows = {
        "tokens": [{"tokens": ["Anna", "lives", "in", "Berlin"], "tags": ["A", "O", "O", "B"]}],
        "choice": [{"context": "it was", "choices": ["good", "bad"], "label": 0}],
        "regression": [{"text": "good", "score": 1.0}, {"text": "bad", "score": 0.0}],
        "multilabel": [{"text": "good film", "labels": "a,b"}, {"text": "bad", "labels": "b"}],
    }
    for name, some in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in some * (16 // len(some))))
        yield name, path


@pytest.mark.parametrize(
    "name",
    [
        "tokens",
        "regression",
        pytest.param("choice", marks=pytest.mark.slow),
        pytest.param("multilabel", marks=pytest.mark.slow),
    ],
)
def test_the_other_kinds(pretrained, tmp_path, name, capsys):
    path = dict(kinds(tmp_path))[name]
    out = tmp_path / "run"
    arguments = [
        "finetune", "--task", name, "--model", str(pretrained), "--train", str(path),
        "--validation", str(path), "--epochs", "12", "--out", str(out), *LEARN,
    ]  # fmt: skip
    assert main(arguments) == 0
    scores = json.loads((out / "result.json").read_text())["seeds"][0]["scores"]
    metric = {"regression": "pearson", "multilabel": "f1"}.get(name, "accuracy")
    assert scores[metric] > 0.9
    capsys.readouterr()
    assert main(["predict", "--model", str(out), "--data", str(path), "--devices", "1"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]
    assert len(rows) == 16
    key = {"tokens": "tags", "choice": "label", "regression": "score", "multilabel": "labels"}[name]
    if name == "tokens":
        assert rows[0][key] == ["A", "O", "O", "B"]
    assert all(key in row for row in rows)


# Files of options, and what cannot be


def test_options_from_a_file(tmp_path, capsys):
    path = tmp_path / "options.yaml"
    path.write_text("train: a.tsv\nlr: 1e-3\nfreeze: [embeddings]\nmax-length: 64\nseeds: 3\n")
    arguments = ["finetune", "--config", str(path), "--seeds", "2", "--print-config"]
    assert main(arguments) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["train"], found["lr"], found["freeze"]) == ("a.tsv", 1e-3, ["embeddings"])
    assert (found["max_length"], found["seeds"], found["epochs"]) == (64, 2, 3)
    path.write_text(yaml.safe_dump(found))
    assert main(["finetune", "--config", str(path), "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learningrate: 1\n", "there is no option `learningrate`."),
        ("epoch: 1\n", "there is no option `epoch`. Did you mean `epochs`?"),
        ("epochs: many\n", "`epochs: 'many'` has to be of type `int`, and is `str`"),
        ("epochs: [1, 2]\n", "`epochs` is one value, not a list"),
        ("task: qna\n", "`task: qna` is unknown; it is one of `classification`"),
        ("a: [\n", "is no YAML file"),
        ("- a\n", "has to hold options, such as `steps: 1000`"),
    ],
)
def test_files_of_options_that_cannot_be(tmp_path, capsys, content, message):
    path = tmp_path / "options.yaml"
    path.write_text(content)
    assert main(["finetune", "--config", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "There is nothing to learn from. Give some examples: `--train FILE`"),
        (["--train", "a.tsv", "--epochs", "0"], "`--epochs 0` has to be at least 1"),
        (["--train", "a.tsv", "--warmup", "5"], "`--warmup 5.0` is a share of the run"),
        (["--train", "a.tsv", "--patience", "2"], "Give some: `--validation FILE`"),
        (["--train", "a.tsv", "--model", "tiny"], "has random weights and no tokenizer of its own"),
        (["--train", "a.tsv", "--optimizer", "adam"], "Did you mean `adamw`"),
        (["--train", "a.tsv", "--tsk", "qa"], "there is no option `--tsk`. Did you mean `--task`"),
    ],
)
def test_options_that_cannot_be(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["finetune", *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_that_is_not_the_models(pretrained, data, tmp_path, capsys):
    train_tokenizer(["some other words are here"] * 9, 40).save(str(tmp_path / "tokenizer.json"))
    arguments = [
        "finetune", "--model", str(pretrained), "--train", str(data / "train.tsv"),
        "--tokenizer", str(tmp_path / "tokenizer.json"), "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(arguments) == 2
    assert "The tokenizer's vocabulary is smaller than the model's" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


# Pretrained models


def test_masks_and_scores(pretrained, capsys):
    arguments = ["fill-mask", "--model", str(pretrained), "--text", "the [MASK] was nice"]
    assert main([*arguments, "--top-k", "2"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines[0].startswith("the")
    assert lines[0].endswith("was nice")
    assert lines[1].count("%") == 2
    assert main(["fill-mask", "--model", str(pretrained), "--text", "a film", "--score"]) == 0
    assert capsys.readouterr().out.strip().endswith("a film")


def test_pseudo_perplexity_is_that_of_a_plain_loop(pretrained):
    task = from_pretrained(pretrained, AlbertForMaskedLM)
    tokenizer = load_tokenizer(pretrained)
    text = "the film was nice and Anna wrote it in Berlin"
    ids = np.asarray(tokenizer.encode(text).ids, np.int32)
    total = 0.0
    for place in range(1, len(ids) - 1):
        masked = ids.copy()
        masked[place] = 4
        found = task.logits({"input_ids": jax.numpy.asarray(masked[None])})
        logits = np.asarray(found, np.float64)[0, place]
        total += np.log(np.exp(logits).sum()) - logits[ids[place]]
    expected = np.exp(total / (len(ids) - 2))
    assert pseudo_perplexity(task, tokenizer, text) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="has no token to score"):
        pseudo_perplexity(task, tokenizer, "[MASK]")


def test_exporting(pretrained, tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "out"), "--max-shard-size", "20000"]
    assert main(["export", "--model", str(pretrained), *arguments]) == 0
    assert "AlbertForPreTraining in" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    again, before = from_pretrained(tmp_path / "out"), from_pretrained(pretrained)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(one, other)


def test_planning(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY.to_dict()))
    shape = ["--batch-size", "8", "--seq-len", "16", "--mesh", "data=2"]
    assert main(["plan", "--model", str(path), "--task", "qa", "--device", "h100", *shape]) == 0
    assert "temporaries" in capsys.readouterr().out
