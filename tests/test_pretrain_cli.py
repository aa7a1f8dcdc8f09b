"""`albert pretrain`: its options, its stages, and what it says about bad input."""

import dataclasses
import json
import os

import pytest
import yaml

from albert_task import _stages
from albert_task._cli import main
from albert_task._option import flag
from albert_task._options import PretrainOptions
from albert_task._run_folder import begin_run, run_folder
from albert_task._stages import prepare
from albert_task._tokenizer import load_tokenizer, tokenizer_hash

SENTENCE = "the quick brown fox jumps over a lazy dog and then it sleeps under an old tree"
WORDS = SENTENCE.split()


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("a", "b"):
        documents = [
            " ".join(WORDS[(i * j + len(name)) % len(WORDS)] for j in range(40)) + "."
            for i in range(60)
        ]
        (folder / f"{name}.txt").write_text("\n\n".join(documents))
    return folder


def options(tmp_path, folder, **changes):
    small = dict(
        text=(str(folder),), out=str(tmp_path / "run"), vocab_size=60, model="tiny", seq_len=16
    )
    return PretrainOptions(**(small | changes))


def refused(capsys, *arguments):
    """What the command says on stderr when it refuses."""
    status = 0
    try:
        status = main(["pretrain", *map(str, arguments)])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    return capsys.readouterr().err


# Options


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("--lerning-rate", "--learning-rate"),
        ("--batchsize=3", "--batch-size"),
        ("--step", "--steps"),
        ("--max-tim", "--max-time"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest(capsys, given, near):
    said = refused(capsys, given, "3")
    assert f"there is no option `{given.split('=')[0]}`. Did you mean `{near}`?" in said
    assert "`albert pretrain --help` lists all options" in said


def test_a_stray_word_and_a_value_of_the_wrong_kind_are_refused(capsys):
    assert "`stray` belongs to no option" in refused(capsys, "--steps", "3", "stray")
    assert "argument --steps: invalid int value: 'many'" in refused(capsys, "--steps", "many")


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["pertrain"])
    assert "`pertrain` is none of `pretrain`" in capsys.readouterr().err
    assert main([]) == 2


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--help"])
    assert stop.value.code == 0
    listed = capsys.readouterr().out
    for field in dataclasses.fields(PretrainOptions):
        assert f"\n  {flag(field.name)} " in listed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "smal"}, r"`--model smal` is no preset, file or folder.*Did you mean `small`\?"),
        ({"optimizer": "adamv"}, r"`--optimizer adamv` is unknown.*Did you mean `adamw`\?"),
        ({"schedule": "cosin"}, r"`--schedule cosin` is unknown.*Did you mean `cosine`\?"),
        ({"precision": "bf16"}, r"`--precision bf16` is unknown; it is one of `32-true`"),
        ({"strategy": "dpp"}, r"`--strategy dpp` is unknown.*Did you mean `ddp`\?"),
        ({"devices": "two"}, r"`--devices two` is neither `auto` nor a number above 0"),
        ({"steps": 0}, r"`--steps 0` has to be at least 1"),
        ({"steps": 9, "epochs": 2}, r"`--steps` and `--epochs` are two lengths of the run. Give o"),
        ({"seq_len": 2}, r"`--seq-len 2` has to be at least 3"),
        ({"lr": 0.0}, r"`--lr 0.0` has to be above 0"),
        ({"lr": float("nan")}, r"`--lr nan` has to be a finite number"),
        ({"weight_decay": -1.0}, r"`--weight-decay -1.0` has to be at least 0"),
        ({"val_fraction": 1.0}, r"`--val-fraction 1.0` has to be above 0 and below 1"),
        ({"mask_probability": 0.0}, r"`--mask-probability 0.0` has to be above 0 and below 1"),
        ({"dropout": 1.0}, r"`--dropout 1.0` has to be at least 0 and below 1"),
        ({"warmup": 300.0, "steps": 300}, r"`--warmup 300` takes all of the `--steps 300`"),
        ({"text": ("",)}, r"`--text` has an empty value"),
        ({"warmup": float("inf")}, r"`--warmup inf` has to be a finite number"),
        ({"warmup": 10.7}, r"`--warmup 10.7` is neither a share below 1 nor a whole number"),
        ({"text": ("a", "b"), "weights": (0.0, 0.0)}, r"All `--weights` have to be above 0"),
        ({"scale_lr": True}, "`--scale-lr` says what `--lr` is meant for: give both"),
        ({"max_time": "3h"}, r'`--max-time="3h"` is no duration. Write `--max-time="00:12:00:00"`'),
        ({"text": ("a",), "dataset": "b"}, r"`--text` and `--dataset` are two sources"),
        ({"dataset_config": "en"}, r"`--dataset-config` says something about `--dataset`"),
        ({"text_column": "body"}, r"`--text-column` says something about"),
    ],
)
def test_a_value_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PretrainOptions(**changes)


def test_the_warm_up_is_a_share_or_a_number_of_steps():
    assert isinstance(PretrainOptions(warmup=0.1).warmup_amount, float)
    assert PretrainOptions(warmup=200.0).warmup_amount == 200
    assert isinstance(PretrainOptions(warmup=200.0).warmup_amount, int)


def test_the_peak_learning_rate_is_lower_for_larger_models_unless_given():
    peaks = [PretrainOptions(model=name).peak for name in ("small", "base", "large", "xlarge")]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4
    assert PretrainOptions(model="xlarge", lr=0.5).peak == 0.5


# The model's configuration


def test_a_preset_takes_the_vocabulary_of_the_tokenizer():
    assert PretrainOptions(model="small").config(1234).vocab_size == 1234
    assert PretrainOptions(model="small", dropout=0.25).config().hidden_dropout_prob == 0.25


@pytest.mark.parametrize(("size", "which"), [(601, "larger"), (599, "smaller")])
def test_a_vocabulary_that_is_not_the_models_is_refused(tmp_path, size, which):
    path = tmp_path / "config.json"
    fields = {"vocab_size": 600, "hidden_size": 32, "num_attention_heads": 2}
    path.write_text(json.dumps(fields | {"model_type": "albert", "intermediate_size": 64}))
    chosen = PretrainOptions(model=str(path))
    assert chosen.own_vocab_size == 600
    assert chosen.config(600).hidden_size == 32
    with pytest.raises(ValueError, match=f"vocabulary is {which} than the model's: {size} pieces"):
        chosen.config(size)


def test_sequences_longer_than_the_positions_are_refused_first(capsys, tmp_path):
    said = refused(capsys, "--model", "tiny", "--seq-len", "65", "--out", tmp_path / "run")
    assert "`--seq-len 65` is longer than the positions of the model `tiny`" in said
    assert "Write `--seq-len 64` or less" in said


# Bad input


def test_an_output_folder_that_cannot_be_written_is_refused(capsys, tmp_path, text):
    (tmp_path / "file").write_text("no folder")
    said = refused(capsys, "--out", tmp_path / "file", "--text", text)
    assert f"Nothing can be written into the folder `{tmp_path / 'file'}`" in said
    assert "--out FOLDER" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(OSError, match="Nothing can be written"):
        run_folder(tmp_path)


def test_no_data_an_empty_file_and_invalid_utf8_are_refused(capsys, tmp_path):
    out = ("--out", tmp_path / "run")
    assert "No file matches" in refused(capsys, *out, "--text", f"{tmp_path}/none/*.txt")
    path = tmp_path / "a.txt"
    path.write_bytes(b"")
    assert f"The file `{path}` is empty" in refused(capsys, *out, "--text", path)
    path.write_bytes(b"one document\n\nand caf\xe9 in another\n")
    said = refused(capsys, *out, "--text", path)
    assert f"The file `{path}` is not UTF-8: byte 0xe9 at offset 21" in said


def test_text_that_does_not_suffice_is_refused(capsys, tmp_path, text):
    path = tmp_path / "one.txt"
    path.write_text(" ".join(WORDS * 50))
    out = ("--out", tmp_path / "run", "--vocab-size", 40)
    assert "single document" in refused(capsys, *out, "--text", path)
    said = refused(capsys, *out, "--text", text, "--batch-size", 100_000)
    assert "gives no batch of 100000" in said


def test_a_tokenizer_that_does_not_fit_is_refused(capsys, tmp_path, text):
    prepare(options(tmp_path, text))
    given = ("--tokenizer", tmp_path / "run" / "tokenizer.json", "--text", text)
    out = ("--out", tmp_path / "other")
    size = prepare(options(tmp_path, text)).tokenizer.get_vocab_size()
    said = refused(capsys, *given, *out, "--vocab-size", size + 1)
    assert f"`--vocab-size {size + 1}`, but the tokenizer" in said
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "albert", "vocab_size": 30000}))
    said = refused(capsys, *given, *out, "--model", config)
    assert f"vocabulary is smaller than the model's: {size} pieces" in said


def test_a_vocabulary_that_does_not_fit_is_refused_before_a_tokenizer_is_trained(
    capsys, tmp_path, text
):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "albert", "vocab_size": 512}))
    given = ("--text", text, "--model", config, "--vocab-size", 60, "--out", tmp_path / "run")
    assert "vocabulary is smaller than the model's: 60 pieces" in refused(capsys, *given)
    assert not (tmp_path / "run" / "tokenizer.json").exists()


def test_a_file_of_options_gives_way_to_what_takes_its_place(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "config.yaml"
    path.write_text("steps: 1500\ntext: [a]\nout: ~/run\n")
    more = ("--epochs", "2", "--dataset", "b", "--print-config")
    assert main(["pretrain", "--config", str(path), *more]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["steps"], found["epochs"], found["text"], found["dataset"]) == (None, 2, [], "b")
    assert found["out"] == str(tmp_path / "run")
    path.write_text("max_time: 12:30:00:00\n")
    assert 'in quotes: `max_time: "00:12:00:00"`' in refused(capsys, "--config", path)


# Stages


def test_stages_are_made_once_and_used_again(tmp_path, text, monkeypatch):
    first = prepare(options(tmp_path, text))
    assert first.config.vocab_size == first.tokenizer.get_vocab_size()

    def never(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr(_stages, "train_tokenizer", never)
    monkeypatch.setattr(_stages, "encode_documents", never)
    monkeypatch.setattr(_stages, "_read", never)
    again = prepare(options(tmp_path, text, eval_interval=2))
    assert again.data.store.tokens.tolist() == first.data.store.tokens.tolist()
    assert again.identity == first.identity


def test_other_text_before_training_makes_the_stages_anew(tmp_path, text):
    first = prepare(options(tmp_path, text))
    (text / "c.txt").write_text("Yet another document, with words of its own: zebra, zoo.")
    second = prepare(options(tmp_path, text))
    assert len(second.data.store) == len(first.data.store) + 1
    assert second.tokenizer.get_vocab() != first.tokenizer.get_vocab()


def test_a_run_that_has_begun_is_not_gone_on_with_otherwise(tmp_path, text, capsys):
    begun = prepare(options(tmp_path, text))
    begin_run(begun.folder, begun.identity)
    prepare(options(tmp_path, text, patience=3, max_time="00:00:01:00"))
    begin = r"`--steps` was \d+ and is 9\. .* delete this one\."
    with pytest.raises(ValueError, match=rf"{begin}$"):
        prepare(options(tmp_path, text, steps=9))
    for folder, advice in (
        ("checkpoints", "`albert export --model .*run --out EXPORTED`, then `--model EXPORTED`"),
        ("model", "`--model .*run`"),
    ):
        (begun.folder / folder).mkdir()
        with pytest.raises(ValueError, match=rf"{begin} Its weights can be begun with: {advice}"):
            prepare(options(tmp_path, text, steps=9))
    with pytest.raises(ValueError, match=r"other options: `--seq-len` was 16 and is 8\. Go on"):
        prepare(options(tmp_path, text, seq_len=8))
    (text / "c.txt").write_text("More of it.")
    with pytest.raises(ValueError, match=r"the text's fingerprint was '\w+' and is '\w+'"):
        prepare(options(tmp_path, text))


def test_other_options_are_refused_before_a_corpus_is_built(tmp_path, text, monkeypatch):
    begun = prepare(options(tmp_path, text))
    begin_run(begun.folder, begun.identity)
    monkeypatch.setattr(_stages, "build_corpus", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match=r"other options: .*`--seq-len` was 16 and is 64"):
        prepare(PretrainOptions(out=str(begun.folder)))


def test_a_tokenizer_and_a_dataset_can_be_given(tmp_path, text):
    trained = prepare(options(tmp_path, text))
    folder = tmp_path / "run"
    given = prepare(
        options(
            tmp_path,
            text,
            text=(),
            dataset=str(text),
            out=str(tmp_path / "other"),
            tokenizer=str(folder / "tokenizer.json"),
            vocab_size=None,
        )
    )
    assert given.data.store.tokens.tolist() == trained.data.store.tokens.tolist()
    kept = load_tokenizer(tmp_path / "other")  # for `albert export` of a run that has not ended
    assert tokenizer_hash(kept) == tokenizer_hash(trained.tokenizer)
    again = prepare(options(tmp_path, text, out=str(tmp_path / "other"), vocab_size=40))
    assert again.tokenizer.get_vocab_size() == 40  # not that one, which was given


def test_without_text_the_embedded_corpus_is_built_and_kept(tmp_path, monkeypatch, capsys):
    module = tmp_path / "module.py"
    lines = [
        f'def f{i}():\n    """It is the {WORDS[i % 16]} that {WORDS[i % 7]} the {i} of them."""'
        for i in range(90)
    ]
    module.write_text("\n".join(lines))
    found = [("module.py", module), ("other.py", tmp_path / "other.py")]
    (tmp_path / "other.py").write_text('"""What is said here is said in the other module."""')
    monkeypatch.setattr(_stages, "python_sources", lambda: found)
    chosen = options(tmp_path, "", text=())
    first = prepare(chosen)
    assert "2 documents" in capsys.readouterr().out
    monkeypatch.setattr(_stages, "python_sources", lambda: 1 / 0)
    assert prepare(chosen).identity == first.identity


def test_a_large_text_is_thinned_out_for_the_tokenizer(tmp_path, text, monkeypatch):
    seen = []

    def train(texts, size):
        seen.extend(texts)
        return train_tokenizer(seen, size)

    train_tokenizer = _stages.train_tokenizer
    monkeypatch.setattr(_stages, "train_tokenizer", train)
    monkeypatch.setattr(_stages, "_TOKENIZER_CHARACTERS", 5000)
    prepare(options(tmp_path, text))
    assert 0 < sum(map(len, seen)) <= 6000


def test_an_error_in_the_tokenizers_thread_is_the_commands_own(capsys, tmp_path, text):
    said = refused(capsys, "--text", text, "--out", tmp_path / "run", "--vocab-size", 8)
    assert "No tokenizer of `vocab_size=8` pieces can be trained" in said


def test_an_interrupt_between_stages_says_how_to_go_on(capsys, tmp_path, text, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(_stages, "encode_documents", interrupted)
    given = ["--text", str(text), "--out", str(tmp_path / "run"), "--vocab-size", "60"]
    assert main(["pretrain", *given]) == 130
    assert "The same command goes on from there" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_told_in_the_commands_words(tmp_path, text, capsys):
    how = {"out": tmp_path / "run", "model": "tiny", "vocab-size": 60, "seq-len": 16, "steps": 20,
           "text": text, "batch-size": 4, "lr": 1e30, "clip": 0, "optimizer": "sgd",
           "log-interval": 5, "val-rows": 4, "devices": 1}  # fmt: skip
    assert main(["pretrain", *(str(one) for k, v in how.items() for one in (f"--{k}", v))]) == 1
    said = capsys.readouterr().err
    assert "Here the learning rate is `--lr`, and `--clip` clips." in said
    assert "Traceback" not in said
