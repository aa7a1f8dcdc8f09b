"""All other files that are read: weights, tokenizers, configurations, text, prepared corpora and
logs. What was planted in them does not run, and what makes no sense is refused with its name."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from malice import NESTED, Payload
from tasks import Classifier
from tiny_albert import TINY

from albert_task import AlbertConfig, AlbertForMaskedLM, from_pretrained
from albert_task._convert import save_pretrained
from albert_task._corpus import Document
from albert_task._options import PretrainOptions
from albert_task._pretrain import finished
from albert_task._run_folder import check_same_run, read_json
from albert_task._store import encode_documents, open_tokens
from albert_task._text import TextFiles, open_dataset
from albert_task._tokenizer import load_tokenizer, train_tokenizer
from jaxlightning import load_weights
from jaxlightning._checkpoint import CheckpointError
from jaxlightning.loggers import CSVLogger, JSONLLogger, TensorBoardLogger

FORMS = ("pickle 0", "pickle 5", "npy", "torch")
NUMBER = "9" * 5000
"""More digits than Python turns into a number."""


@pytest.fixture
def payload(tmp_path):
    found = Payload(tmp_path / "mark")
    yield found
    assert not found.ran


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the fox dog jumps over a lazy brown quick and then sleeps"] * 9, 60)


@pytest.fixture(scope="module")
def tokens(tokenizer, tmp_path_factory):
    documents = [Document(str(i), "the quick brown fox jumps over the dog") for i in range(20)]
    folder = tmp_path_factory.mktemp("data") / "tokens"
    return encode_documents(documents, tokenizer, folder, text="abc").folder


@pytest.fixture
def prepared(tokens, tmp_path):
    """A token store, to be tampered with."""
    folder = tmp_path / "tokens"
    shutil.copytree(tokens, folder)
    assert len(open_tokens(folder)) == 20
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(AlbertForMaskedLM.init(TINY, jax.random.key(0)), folder)
    return folder


@pytest.fixture
def model(released, tmp_path):
    return shutil.copytree(released, tmp_path / "model")


# Weights


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_pretrained_model_is_not_unpickled(model, payload, file, form):
    (model / file).write_bytes(payload.forms()[form])
    reason = "no safetensors file" if file == "model.safetensors" else "not valid JSON"
    with pytest.raises(ValueError, match=re.escape(f"`{model / file}` is {reason}")):
        from_pretrained(model)


def test_a_bin_file_runs_nothing(model, payload):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(payload.forms()["torch"])
    with pytest.raises(ValueError, match=r"wants more than tensors: `posix\.system`"):
        from_pretrained(model)


@pytest.mark.parametrize("form", FORMS)
def test_weights_in_one_file_are_not_unpickled(tmp_path, payload, form):
    path = tmp_path / "weights"
    path.write_bytes(payload.forms()[form])
    with pytest.raises(CheckpointError, match=re.escape(f"`{path}` is no safetensors file")):
        load_weights(path, Classifier())


def header(content, data=b""):
    encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SAFETENSORS = {
    "no header": b"\xff" * 8,
    "a huge header": (2**62).to_bytes(8, "little") + b"{}",
    "nested": header(NESTED["lists"].encode()),
    "outside": header({"a": F32 | {"data_offsets": [0, 2**62], "shape": [2**60]}}),
    "overflow": header({"a": F32 | {"shape": [2**33, 2**33]}}, bytes(8)),
    "overlap": header({"a": F32, "b": F32}, bytes(8)),
    "hole": header({"a": F32 | {"data_offsets": [8, 16]}}, bytes(16)),
    "negative": header({"a": F32 | {"shape": [-2]}}, bytes(8)),
    "object": header({"a": F32 | {"dtype": "O"}}, bytes(8)),
    "empty": b"",
}


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_a_safetensors_file_that_lies(model, tmp_path, kind):
    (model / "model.safetensors").write_bytes(SAFETENSORS[kind])
    with pytest.raises(ValueError, match="is no safetensors file"):
        from_pretrained(model)
    (tmp_path / "weights").write_bytes(SAFETENSORS[kind])
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        load_weights(tmp_path / "weights", Classifier())


@pytest.mark.parametrize("kind", NESTED)
def test_a_configuration_that_is_nested_deep(tmp_path, kind):
    (tmp_path / "config.json").write_text(NESTED[kind])
    with pytest.raises(ValueError, match=r"`.*config\.json` is not valid JSON"):
        AlbertConfig.from_json(tmp_path / "config.json")


@pytest.mark.parametrize("value", ["NaN", "1e999", "-1", "true", '"64"', "[64]", "null", "64.0"])
def test_sizes_of_a_configuration_are_whole_numbers(tmp_path, unchecked_types, value):
    (tmp_path / "config.json").write_text(f'{{"hidden_size": {value}}}')
    with pytest.raises(ValueError, match=r"`hidden_size=.*` has to be an integer of at least 1"):
        AlbertConfig.from_json(tmp_path / "config.json")


def test_a_configuration_of_a_giant_asks_for_no_memory(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 2**40}))
    with pytest.raises(ValueError, match="Of another shape"):
        from_pretrained(model)


# Tokenizers


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("file", ["tokenizer.json", "spiece.model"])
def test_a_tokenizer_is_not_unpickled(tmp_path, payload, file, form):
    (tmp_path / file).write_bytes(payload.forms()[form])
    with pytest.raises(ValueError, match=re.escape(f"`{tmp_path / file}` is no tokenizer")):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", NESTED["lists"].encode()),
        ("tokenizer.json", NESTED["objects"].encode()),
        ("spiece.model", b"\x80" * 10**6),  # a number without an end
        ("spiece.model", b"\x0a" + b"\xff" * 9 + b"\x7f"),  # a piece of 2^69 bytes
        ("spiece.model", b"\x0b"),  # a kind of field that there is no more
        ("spiece.model", b""),
    ],
)
def test_a_tokenizer_that_makes_no_sense(tmp_path, file, content):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match="is no tokenizer that can be read"):
        load_tokenizer(tmp_path / file)


# Text and prepared corpora


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet", "arrow"])
def test_text_is_not_unpickled(tmp_path, payload, suffix, form):
    path = tmp_path / f"text.{suffix}"
    path.write_bytes(payload.forms()[form])
    if (suffix, form) == ("txt", "pickle 0"):  # which is a text
        assert len(list(TextFiles(path))) == 1
        return
    with pytest.raises(ValueError, match=re.escape(f"`{path}`")):
        list(open_dataset(path))


@pytest.mark.parametrize("kind", [*NESTED, "number"])
def test_a_line_of_json_that_cannot_be_read(tmp_path, kind):
    line = NESTED.get(kind, f'{{"text": {NUMBER}}}')
    (tmp_path / "text.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"`.*text\.jsonl` is broken on line 2"):
        list(TextFiles(tmp_path / "text.jsonl"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("file", ["header.json", "offsets.npy", "sentences.npy"])
def test_prepared_tokens_are_not_unpickled(prepared, payload, file, form):
    (prepared / file).write_bytes(payload.forms()[form])
    with pytest.raises(ValueError, match=r"`.*tokens` are damaged: .*Delete `.*tokens`, and it is"):
        open_tokens(prepared)


def test_tokens_that_are_a_pickle_are_no_tokens(prepared, payload):
    size = (prepared / "tokens.bin").stat().st_size
    form = payload.forms()["pickle 4"]
    (prepared / "tokens.bin").write_bytes(form[:size].ljust(size, b"."))
    with pytest.raises(ValueError, match=r"block 0 of `tokens.bin` has another checksum"):
        open_tokens(prepared)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "|O"},  # an object's bytes are an address
        {"dtype": "O"},
        {"dtype": ["<u2"]},
        {"dtype": "<f4"},
        {"tokens": -1},
        {"tokens": 2**62},
        {"tokens": float("nan")},
        {"tokens": None},
        {"documents": -1},
        {"documents": 2**62},
        {"special": {"pad": 0}},
        {"special": None},
        {"format": 9},
    ],
    ids=str,
)
def test_a_header_of_tokens_that_lies(prepared, change):
    content = json.loads((prepared / "header.json").read_text())
    (prepared / "header.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=r"`.*tokens` are damaged"):
        open_tokens(prepared)


@pytest.mark.parametrize("kind", [*NESTED, "list", "number"])
def test_a_header_of_tokens_that_is_none(prepared, kind):
    text = {"list": "[]", "number": NUMBER, **NESTED}[kind]
    (prepared / "header.json").write_text(text)
    with pytest.raises(ValueError, match=r"`.*tokens` are damaged"):
        open_tokens(prepared)


def npy(shape, descr="<i8"):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(168)


@pytest.mark.parametrize(
    "content",
    [
        npy("(9000000000000000,)"),  # 64 PiB
        npy("(-21,)"),
        npy("(21, 1)"),
        npy("(21,)", "<f8"),
        npy("(21,)"),
        npy("__import__('os').system('touch mark')"),
        np.array([0, 2**60, -(2**60)]).tobytes(),
    ],
)
def test_offsets_that_lie(prepared, content):
    (prepared / "offsets.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"`.*tokens` are damaged"):
        open_tokens(prepared)


@pytest.mark.parametrize("change", [(5, -1), (5, 2**60), (0, 1), (5, 0)])
def test_offsets_stay_inside_and_go_up(prepared, change):
    offsets = np.load(prepared / "offsets.npy")
    offsets[change[0]] = change[1]
    np.save(prepared / "offsets.npy", offsets)
    with pytest.raises(ValueError, match=r"`.*tokens` are damaged"):
        open_tokens(prepared)


@pytest.mark.parametrize("content", [*NESTED.values(), "[]", NUMBER, "null", ""])
def test_what_a_run_wrote_of_itself_is_ignored_where_it_makes_no_sense(tmp_path, content):
    for name in ("run.json", "result.json"):
        (tmp_path / name).write_text(content)
        assert read_json(tmp_path / name) is None
    check_same_run(tmp_path, {"seed": 1})
    assert finished(tmp_path, PretrainOptions()) is None


@pytest.mark.parametrize("form", FORMS)
def test_what_a_run_wrote_of_itself_is_not_unpickled(tmp_path, payload, form):
    (tmp_path / "run.json").write_bytes(payload.forms()[form])
    check_same_run(tmp_path, {"seed": 1})
    assert read_json(tmp_path / "run.json") is None


# Logs


@pytest.mark.parametrize("kind", [CSVLogger, JSONLLogger])
def test_lines_of_a_log_that_make_no_sense_are_dropped(tmp_path, payload, kind):
    logger = kind(tmp_path, version="a")
    for step in (1, 2, 3):
        logger.log_metrics({"loss": 0.5}, step)
    logger.finalize("success")
    path = tmp_path / "jaxlightning_logs" / "a" / logger.file_name
    good = path.read_bytes()
    evil = [*payload.forms().values(), *(text.encode() for text in NESTED.values())]
    evil += [f"{NUMBER},0.5".encode(), f'{{"step": {NUMBER}}}'.encode(), b'{"step": NaN}', b"\xff"]
    evil += ["\u0661\u0662,0.5".encode(), b"-1,0.5", b'{"step": "1"}', b"nan,0.5", b"1e0,0.5"]
    path.write_bytes(good + b"\n".join(evil) + b"\n")
    again = kind(tmp_path, version="a")
    again.resume(2, {})
    assert path.read_bytes() == good[: good.rindex(b"\n", 0, -1) + 1]
    again.finalize("success")


def test_events_and_hyper_parameters_are_never_read(tmp_path, payload):
    folder = tmp_path / "jaxlightning_logs" / "a"
    folder.mkdir(parents=True)
    for name in ("hparams.json", "events.out.tfevents.1.a.0000"):
        (folder / name).write_bytes(payload.forms()["pickle 4"])
    logger = TensorBoardLogger(tmp_path, version="a")
    logger.resume(2, {})
    logger.log_hyperparams({"lr": 1})
    logger.log_metrics({"loss": 0.5}, 3)
    logger.finalize("success")
    assert json.loads((folder / "hparams.json").read_text()) == {"lr": 1}
