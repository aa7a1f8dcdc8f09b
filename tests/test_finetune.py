"""`albert finetune` and what one does with its models, on tiny data, in this process."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml
from tiny_albert import TINY
from tuning import LEARN, short

from albert_task import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForSequenceClassification,
    _finetune,
    from_pretrained,
    load_tokenizer,
    pseudo_perplexity,
    save_pretrained,
    train_tokenizer,
)
from albert_task._cli import main
from albert_task._commands import PlanOptions
from albert_task._finetune_options import DataOptions
from albert_task._kinds import kind_of
from jaxlightning.callbacks import TQDMProgressBar


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
    said = capsys.readouterr().err
    assert "longer" not in said
    (tmp_path / "new.jsonl").write_text('{"text": "film ' + "a " * 40 + '"}\n{"text": "film"}')
    assert main(["predict", "--model", str(tuned), "--max-length", "16", *arguments]) == 0
    said = capsys.readouterr().err
    assert f"1 of 2 examples of `{tmp_path / 'new.jsonl'}` are longer than 16 tokens, and" in said


def test_labels_that_the_model_does_not_know(tuned, tmp_path, capsys):
    (tmp_path / "a.tsv").write_text("sentence\tlabel\nfilm\tgood\nplay\tgreat\n")
    assert main(["evaluate", "--model", str(tuned), "--data", str(tmp_path / "a.tsv")]) == 2
    said = capsys.readouterr().err
    assert "line 3 of" in said
    assert "`great`, which is no label of the model: `bad`, `good`" in said


class Strikes(TQDMProgressBar):
    """Ctrl-C after so many steps."""

    after = 7

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        if trainer.global_step == self.after:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.long
def test_an_interrupted_run_goes_on_to_the_same_model(
    pretrained, data, short_run, tmp_path, capsys
):
    cut = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_finetune, "TQDMProgressBar", Strikes)
        assert main(short(pretrained, data, cut)) == 130
    assert "The same command goes on from there." in capsys.readouterr().err
    assert not (cut / "model").exists()
    assert main(short(pretrained, data, cut)) == 0
    for file in ("model/model.safetensors", "predictions.jsonl", "seed_0/result.json"):
        assert (short_run / file).read_bytes() == (cut / file).read_bytes()
    assert [path.name for path in (cut / "seed_0").iterdir() if "check" in path.name] == []


@pytest.mark.long
def test_what_has_learnt_nothing_is_an_error(pretrained, data, tmp_path, capsys):
    broken = jax.tree.map(lambda x: x * float("nan"), from_pretrained(pretrained))
    save_pretrained(broken, tmp_path / "nan", pretrained)
    more = ["--model", str(tmp_path / "nan"), "--limit", "8", "--epochs", "1"]
    assert main(short(pretrained, data, tmp_path / "run", *more)) == 2
    assert "Seed 0 has learnt nothing: its loss is not finite" in capsys.readouterr().err


@pytest.mark.long
def test_less_than_a_log_interval_is_enough(pretrained, data, tmp_path):
    out = tmp_path / "run"
    assert main(short(pretrained, data, out, "--limit", "8", "--epochs", "1")) == 0
    assert json.loads((out / "result.json").read_text())["seeds"][0]["train_loss"] > 0


def test_labels_of_validation_that_no_example_to_learn_from_has(pretrained, data, tmp_path, capsys):
    lines = (data / "dev.tsv").read_text().splitlines()
    (tmp_path / "dev.tsv").write_text("\n".join([*lines, "the film was fine\tgoood"]))
    arguments = short(pretrained, data, tmp_path / "run", "--validation", str(tmp_path / "dev.tsv"))
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "line 42 of" in said
    assert "`goood`, which is no label of the model: `bad`, `good`. Did you mean `good`?" in said


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


@pytest.mark.long
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
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "article.txt").write_text("the film was nice and Anna wrote it")
    for context, message in (
        ("articl.txt", "`--context articl.txt` is a single word, and no file that can be read"),
        (str(tmp_path), "is a single word, and no file"),
        (str(tmp_path / "empty.txt"), "empty.txt` is empty"),
        (str(tmp_path / "binary.txt"), "binary.txt` is no text in UTF-8"),
    ):
        assert main(["answer", "--model", str(out), *asked, "--context", context]) == 2
        assert message in capsys.readouterr().err
    asked[-1] = str(tmp_path / "article.txt")
    assert main(["answer", "--model", str(out), "--devices", "1", *asked]) == 0
    assert capsys.readouterr().out.startswith("Anna\n")
    assert main(["answer", "--model", str(out), *asked, "--top-k", "0"]) == 2
    assert "`--top-k 0` has to be at least 1" in capsys.readouterr().err


def kinds(folder):
    rows = {
        "tokens": [{"tokens": ["Anna", "lives", "in", "Berlin"], "tags": ["B-A", "O", "O", "B-B"]}],
        "choice": [{"context": "it was", "choices": ["good", "bad"], "label": 0}],
        "regression": [{"text": "good", "score": 1.0}, {"text": "bad", "score": 0.0}],
        "multilabel": [{"text": "good film", "labels": "a,b"}, {"text": "bad", "labels": "b"}],
    }
    for name, some in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in some * (16 // len(some))))
        yield name, path


@pytest.mark.long
@pytest.mark.parametrize("name", ["tokens", "regression", "choice", "multilabel"])
def test_the_other_kinds(pretrained, tmp_path, name, capsys):
    path = dict(kinds(tmp_path))[name]
    out = tmp_path / "run"
    arguments = [
        "finetune", "--task", name, "--model", str(pretrained), "--train", str(path),
        "--validation", str(path), "--epochs", "12", "--out", str(out), *LEARN,
    ]  # fmt: skip
    assert main(arguments) == 0
    scores = json.loads((out / "result.json").read_text())["seeds"][0]["scores"]
    metric = {"regression": "pearson", "multilabel": "f1", "tokens": "f1"}.get(name, "accuracy")
    assert scores[metric] > 0.9
    capsys.readouterr()
    assert main(["predict", "--model", str(out), "--data", str(path), "--devices", "1"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]
    assert len(rows) == 16
    key = {"tokens": "tags", "choice": "label", "regression": "score", "multilabel": "labels"}[name]
    if name == "tokens":
        assert rows[0][key] == ["B-A", "O", "O", "B-B"]
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
        ("train:\n", "There is nothing to learn from"),  # left empty: the default
        ("learningrate: 1\n", "there is no option `learningrate`."),
        ("epoch: 1\n", "there is no option `epoch`. Did you mean `epochs`?"),
        ("epochs: many\n", "`epochs: 'many'` has to be of type `int`, and is `str`"),
        ("epochs: [1, 2]\n", "`epochs` is one value, not a list"),
        ("task: qna\n", "`--task qna` is unknown; it is one of `classification`"),
        ("out: ''\ntrain: a\n", "`--out` has an empty value"),
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
        (
            ["--train", "a.tsv", "--task", "qq"],
            "`--task qq` is unknown; it is one of `classification`, `regression`",
        ),
        (["--task", "clasification"], "Did you mean `classification`?"),
        (["--train", "a.tsv", "--freeze", "("], "`--freeze '('` is no regular expression"),
        (["--train", "a.tsv", "a good film"], "`a good film` belongs to no option. Name its"),
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


def test_models_that_cannot_do_what_is_asked(pretrained, tuned, data, tmp_path, capsys):
    out = str(tmp_path / "none" / "labels.jsonl")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "run.json").write_text("{}")
    on = ["--data", str(data / "dev.tsv")]
    for arguments, message in (
        (["fill-mask", "--model", tuned, "--text", "a [MASK]"], "which fills in no masks. Give"),
        (["fill-mask", "--model", begun, "--text", "a [MASK]"], "has not ended. Go on with it."),
        (["evaluate", "--model", pretrained, *on], "Fine-tune it first: `albert finetune"),
        (["evaluate", "--model", tmp_path, *on], "Give the folder of a run, or of a model"),
        (["predict", "--model", tuned, *on, "--out", out], "is no folder that can be written into"),
        (["predict", "--model", tuned, *on, "--out", tmp_path], "is a folder. Name a file"),
        (["export", "--model", pretrained, "--out", data / "dev.tsv"], "Nothing can be written"),
        (["plan", "--model", "basic"], "Did you mean `base`?"),
        (["plan", "--mesh", "data"], "has to be sizes of axes"),
    ):
        assert main([str(one) for one in arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_reader_that_has_had_enough_is_no_error():
    program = "import sys; from albert_task._cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "fill-mask", "--text", "a", "--print-config"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=240)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_kinds_of_models():
    """Of one label transformers makes a regression."""
    for name, how in (
        ("regression", {"labels": ("score",)}),
        ("classification", {"labels": ("a", "b")}),
        ("multilabel", {"labels": ("a", "b"), "problem_type": "multi_label_classification"}),
    ):
        config = AlbertConfig.preset("tiny", **how)
        assert kind_of(AlbertForSequenceClassification.init(config, jax.random.key(0))) == name


def test_lengths_stay_within_the_positions():
    """Examples are padded to multiples of 8."""
    assert DataOptions().kind("classification", 60).max_length == 56
    assert DataOptions().kind("qa", 512).max_length == 384
    with pytest.raises(ValueError, match=r"`max_position_embeddings=60`\. Write 56 at most"):
        DataOptions(max_length=60).kind("qa", 60)


def test_numbers_to_predict_are_not_rounded():
    batch = {"labels": np.float32([1001, 70000])}
    for name in ("bf16-mixed", "16-mixed"):
        precision = _finetune._precision(DataOptions(precision=name))
        np.testing.assert_array_equal(precision.of_batch(batch)["labels"], batch["labels"])


@pytest.mark.long
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
    assert main(["export", "--model", str(pretrained), *arguments]) == 0
    assert "out, in place of what was there" in capsys.readouterr().out


def test_planning(pretrained, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY.to_dict()))
    how = ["--batch-size", "8", "--seq-len", "16", "--mesh", "data=2", "--device", "h100"]
    assert main(["plan", "--model", str(path), "--task", "qa", *how]) == 0
    assert "temporaries" in capsys.readouterr().out
    assert PlanOptions(model=str(pretrained)).configured().hidden_size == 32
