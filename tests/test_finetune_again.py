"""What a folder of `albert finetune` keeps: of which run it is, its seeds, how it is used."""

import json
import shutil

import pytest
import yaml
from tuning import save_tiny, short

from albert_task import _finetune, from_pretrained, load_tokenizer
from albert_task._cli import main
from albert_task._features import Columns
from albert_task._kinds import QuestionAnswering

# Seeds


def test_a_seed_that_is_done_is_not_trained_again(
    pretrained, data, short_run, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "run"
    shutil.copytree(short_run, out)
    first = json.loads((out / "result.json").read_text())
    monkeypatch.setattr(_finetune, "_trainer", None)
    assert main(short(pretrained, data, out)) == 0
    assert "Seed 0 is done: 10 steps." in capsys.readouterr().err
    assert json.loads((out / "result.json").read_text()) == first
    monkeypatch.undo()
    assert main(short(pretrained, data, out, "--seeds", "2")) == 0
    both = json.loads((out / "result.json").read_text())
    assert both["seeds"][0] == first["seeds"][0]
    # Fewer: what is done stays, and the model stays that of the best one.
    capsys.readouterr()
    assert main(short(pretrained, data, out)) == 0
    assert "over 2 seeds" in capsys.readouterr().out
    assert json.loads((out / "result.json").read_text()) == both
    scores = [one["scores"]["accuracy"] for one in both["seeds"]]
    assert both["best_seed"] == scores.index(max(scores))
    assert main(["evaluate", "--model", str(out), "--data", str(data / "dev.tsv")]) == 0
    assert f"accuracy                {max(scores):.4f}" in capsys.readouterr().out


# Of which run it is


def test_a_folder_keeps_its_run(pretrained, data, short_run, tmp_path, capsys):
    for more, message in (
        (["--epochs", "3"], "begun with other options: `--epochs` was 2 and is 3. Go on"),
        (["--train", str(data / "dev.tsv")], "the fingerprint of `--train` was"),
        (["--epochs", "3"], f"Its weights can be begun with: `--model {short_run}`."),
    ):
        assert main(short(pretrained, data, short_run, *more)) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "run.json").write_text('{"objective": "mlm"}')
    assert main(short(pretrained, data, tmp_path)) == 2
    assert "holds a run of `albert pretrain`. Choose another folder" in capsys.readouterr().err
    assert main(["export", "--model", str(short_run), "--out", str(short_run)]) == 2
    assert "is a run's folder. Choose another: `--out FOLDER`" in capsys.readouterr().err


def test_what_the_model_holds_counts_not_where_it_lies(
    pretrained, data, short_run, tmp_path, capsys
):
    run, moved, other = (tmp_path / name for name in ("run", "moved", "other"))
    shutil.copytree(short_run, run)
    shutil.copytree(pretrained, moved)
    assert main(short(moved, data, run)) == 0
    assert "Seed 0 is done" in capsys.readouterr().err
    save_tiny(other, seed=1)
    assert main(short(other, data, run)) == 2
    assert "`--model` was 'weights " in capsys.readouterr().err
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    assert main(short(moved, data, run)) == 2
    assert "`--model` was 'weights " in capsys.readouterr().err


def test_other_names_of_labels_are_other_labels(pretrained, data, short_run, tmp_path, capsys):
    for name in ("train.tsv", "dev.tsv"):
        text = (data / name).read_text()
        (tmp_path / name).write_text(text.replace("\tbad", "\t0").replace("\tgood", "\t1"))
    assert main(short(pretrained, tmp_path, short_run)) == 2
    said = capsys.readouterr().err
    assert "the list of labels was ['bad', 'good'] and is ['0', '1']" in said


def test_any_of_several_answers_counts(pretrained, tmp_path):
    """Windows hold the first one only."""
    tokenizer = load_tokenizer(pretrained)

    def fingerprint(*answers):
        given = [{"text": text, "answer_start": start} for text, start in answers]
        asked = [{"id": "1", "question": "who", "answers": given}]
        paragraph = {"context": "Anna wrote it", "qas": asked}
        (tmp_path / "a.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
        kind = QuestionAnswering("qa", Columns(), 64)
        source = kind.read(str(tmp_path / "a.json"))
        return kind.fingerprint(source, kind.encode(source, tokenizer, ()))

    first, second = (("Anna", 0), ("wrote", 5)), (("Anna", 0), ("it", 11))
    assert fingerprint(*first) == fingerprint(*first) != fingerprint(*second)


# How it is used


def test_a_model_is_scored_as_in_its_run(short_run, tmp_path, capsys):
    """By the name of its folder, and by that of the model in it, which `finetune` prints."""
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    options = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(options | {"max_length": 24}))
    for folder in (run, run / "model"):
        for command in ("evaluate", "predict"):
            given = ["--model", str(folder), "--data", "a.tsv", "--print-config"]
            assert main([command, *given]) == 0
            assert yaml.safe_load(capsys.readouterr().out)["max_length"] == 24
            assert main([command, *given, "--max-length", "32"]) == 0
            assert yaml.safe_load(capsys.readouterr().out)["max_length"] == 32


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        ("", 0, "max_length: null"),
        ("a: [\n", 2, "config.yaml` is no YAML file"),
        ("- 1\n", 2, "config.yaml` has to hold options"),
        ("max_length: many\n", 2, "`max_length: 'many'` has to be of type `int`"),
        (None, 0, "max_length: null"),
    ],
)
def test_options_of_a_run_that_make_no_sense(tmp_path, capsys, content, status, message):
    (tmp_path / "run.json").write_text('{"command": "finetune"}')
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    given = ["evaluate", "--model", str(tmp_path), "--data", "a.tsv", "--print-config"]
    assert main(given) == status
    said = capsys.readouterr()
    assert message in said.out + said.err


def test_the_problem_is_in_the_models_configuration(short_run):
    assert from_pretrained(short_run).config.problem_type == "single_label_classification"
