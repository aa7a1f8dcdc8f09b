"""Checkpoints that somebody made to do harm: refused with a clear error, and without any effect.

Whoever can write a checkpoint can also make its checksums right, so they protect from nothing
here: the manifest is believed nowhere.
"""

import functools
import io
import json
import os
import pickle
import re
import socket
import sys

import numpy as np
import pytest
from checkpoints import saved
from malice import NESTED, Payload
from tasks import Classifier, quiet, rows

from jaxlightning import DataLoader, load_weights
from jaxlightning._checkpoint import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointStore,
    find_checkpoints,
    load_arrays,
    read_checkpoint,
    read_metadata,
    restore_latest,
    verify_checkpoint,
)
from jaxlightning._checkpoint_manifest import commit_of
from jaxlightning.callbacks import ModelCheckpoint
from jaxlightning.cli import main

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

ARRAYS = "arrays-00000-of-00001.safetensors"
FILES = ["COMMIT", "manifest.json", ARRAYS]
TREE = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "n": np.int64(7)}


@pytest.fixture
def payload(tmp_path):
    """Every test that takes it proves that nothing in it has run."""
    found = Payload(tmp_path / "mark")
    yield found
    assert not found.ran


@pytest.fixture
def step(tmp_path):
    """The newer of two checkpoints, to be tampered with."""
    with CheckpointStore(tmp_path / "run") as store:
        saved(store, TREE, {"seed": 1}, step=1)
        return saved(store, TREE, {"seed": 2}, step=2)


READERS = {
    "verify": verify_checkpoint,
    "read": lambda step: read_checkpoint(step, TREE),
    "metadata": read_metadata,
    "arrays": load_arrays,
}


def check_refused(step, capsys, message="", error=CheckpointDamaged, read=READERS):
    """By every reader with the same words; the one before it is used, and it is set aside."""
    for reader in read.values():
        with pytest.raises(error, match=message) as caught:
            reader(step)
        assert f"`{step}`" in str(caught.value)
    for action in ("inspect", "verify") if read is READERS else ("verify",):
        assert main(["checkpoint", action, str(step)]) in (1, 2)
        out, errors = capsys.readouterr()
        assert f"`{step}`" in out + errors
        assert "Traceback" not in out + errors
    with pytest.warns(UserWarning, match="Damaged checkpoints were found"):
        assert restore_latest(step.parent, TREE).metadata == {"seed": 1}
    assert not os.path.lexists(step)
    assert len(list(step.parent.glob(f".damaged-{step.name}-*"))) == 1


def forge(step, change):
    """A changed manifest with the right checksum."""
    content = json.loads((step / "manifest.json").read_text())
    change(content)
    forge_text(step, json.dumps(content))


def forge_text(step, text):
    (step / "manifest.json").write_text(text)
    (step / "COMMIT").write_bytes(commit_of(text.encode()))


def set_(*path):
    """A change of one value in a manifest: the last of `path` is the value."""
    *keys, last, value = path

    def change(content):
        functools.reduce(lambda inner, key: inner[key], keys, content)[last] = value

    change.__name__ = f"{'.'.join(map(str, (*keys, last)))}={str(value)[:30]}"
    return change


# Pickles


def test_the_payload_would_run(tmp_path):
    """Or the other tests would prove nothing."""
    payload = Payload(tmp_path / "mark")
    for form in payload.forms().values():
        assert not payload.ran
        if form.startswith(b"\x93NUMPY"):
            np.load(io.BytesIO(form), allow_pickle=True)
            assert payload.ran
            payload.mark.unlink()
    pickle.loads(payload.forms()["pickle 4"])
    assert payload.ran


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("checksum", ["stale", "right"])
def test_no_file_of_a_checkpoint_is_unpickled(step, payload, file, checksum):
    original = {name: (step / name).read_bytes() for name in FILES}
    for form in payload.forms().values():
        size = len(original[file])
        for content in (form, form[:size].ljust(size, b".")):
            (step / file).write_bytes(content)
            if checksum == "right" and file == "manifest.json":
                (step / "COMMIT").write_bytes(commit_of(content))
            for reader in READERS.values():
                with pytest.raises(CheckpointDamaged, match=re.escape(f"`{step}`")):
                    reader(step)
    for name in FILES:
        (step / name).write_bytes(original[name])
    verify_checkpoint(step)


def test_a_pickle_that_is_an_arrays_data_stays_bytes(tmp_path, payload):
    data = np.frombuffer(payload.forms()["pickle 4"], np.uint8)
    with CheckpointStore(tmp_path / "run") as store:
        path = saved(store, {"x": data})
    assert load_arrays(path)["x"].tobytes() == data.tobytes()


def test_what_else_lies_in_a_checkpoint_is_not_read(step, payload):
    for name, form in payload.forms().items():
        (step / f"{name}.pkl").write_bytes(form)
    for name in ("state.npy", "state.npz", "pytorch_model.bin", "hparams.json", "task.py"):
        (step / name).write_bytes(payload.forms()["npy"])
    assert verify_checkpoint(step).step == 2


def test_nothing_is_imported_that_a_checkpoint_names(tmp_path, payload, monkeypatch):
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "evil_plan.py").write_text(f"open({str(payload.mark)!r}, 'w')\nclass Task: pass\n")
    monkeypatch.syspath_prepend(str(folder))
    trainer = quiet(max_steps=1)
    trainer.fit(Classifier(), DataLoader(rows(8), 4))
    trainer.save_checkpoint(tmp_path / "run" / "last")
    step = tmp_path / "run" / "last"
    for name in ("evil_plan.Task", "evil_plan:Task", "os.system", "__import__('evil_plan')"):
        forge(step, lambda content, name=name: content["metadata"].update(task=name))
        with pytest.raises(ValueError, match=re.escape(f"is of a `{name}`")):
            Classifier.load_from_checkpoint(step)
        load_weights(step, Classifier())
    assert "evil_plan" not in sys.modules


# Links, pipes, sockets, folders


def plant(path, kind, target):
    path.unlink()
    if kind == "link":
        path.symlink_to(target)
    elif kind == "dangling":
        path.symlink_to(target.parent / "nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            here = os.getcwd()
            os.chdir(path.parent)  # the name of a socket has to be short
            one.bind(path.name)
            os.chdir(here)
    elif kind == "folder":
        path.mkdir()


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "socket", "folder"])
@pytest.mark.parametrize("file", FILES)
def test_a_file_has_to_be_a_file(step, capsys, tmp_path, file, kind):
    outside = tmp_path / "outside"
    outside.write_bytes((step / file).read_bytes())
    plant(step / file, kind, outside)
    check_refused(step, capsys, f"its `{file}` is a link or a folder, and has to be a file")
    assert outside.exists()


def test_a_folder_has_to_be_a_folder(step, capsys, tmp_path):
    outside = tmp_path / "outside"
    step.rename(outside)
    step.symlink_to(outside)
    check_refused(step, capsys, "neither a file nor a symbolic link")
    assert sorted(os.listdir(outside)) == sorted(FILES)


def test_the_lock_is_not_written_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run" / "LOCK").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"):
        CheckpointStore(tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "mine"


def test_what_is_swept_away_ends_at_links(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / "run").mkdir()
    for name in (".tmp-step_0000000001-0", ".trash-x-1"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    inner = tmp_path / "run" / ".trash-y-2"
    inner.mkdir()
    (inner / "link").symlink_to(tmp_path / "mine")
    with CheckpointStore(tmp_path / "run") as store:
        assert os.listdir(store.root) == ["LOCK"]
    assert (tmp_path / "mine" / "file").read_text() == "mine"


# Names


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/b", "..", "LOCK/x", "a\0b", ""])
def test_names_of_files_in_a_manifest_stay_inside(step, capsys, tmp_path, name):
    (tmp_path / "run" / "outside").write_bytes((step / ARRAYS).read_bytes())

    def change(content):
        content["files"] = {name: content["files"][ARRAYS]}
        for array in content["arrays"].values():
            array["shards"][0]["file"] = name

    forge(step, change)
    check_refused(step, capsys, "is not the name of an array file")
    assert (tmp_path / "run" / "outside").exists()


@pytest.mark.parametrize("name", ["../evil", "/evil", "", ".", "a/b"])
def test_a_left_over_checkpoint_does_not_choose_where_it_goes(tmp_path, step, name):
    """Its own name in the manifest is no path."""
    left = step.rename(step.with_name(".tmp-x-0"))
    forge(left, set_("name", name))
    with CheckpointStore(step.parent) as store:
        assert [entry.step for entry in store.entries()] == [1]
    assert sorted(os.listdir(tmp_path)) == ["run"]
    assert sorted(os.listdir(step.parent)) == ["LOCK", "step_0000000001"]


@pytest.mark.parametrize("where", ["scores", "last", "newest", "replaced"])
def test_a_state_of_model_checkpoint_deletes_nothing_elsewhere(tmp_path, where):
    """Its names come from the metadata of a checkpoint, and what they name may be deleted."""
    with CheckpointStore(tmp_path / "mine") as store:
        mine = saved(store, TREE)
    folder = tmp_path / "run"
    saver = lambda: ModelCheckpoint(dirpath=folder, every_n_train_steps=2)
    fit = lambda steps, **how: quiet(
        max_steps=steps, enable_checkpointing=None, callbacks=saver()
    ).fit(Classifier(), DataLoader(rows(8), 4), **how)
    fit(2)
    (entry,) = find_checkpoints(folder)
    name = f"../mine/{mine.name}"

    def change(content):
        (state,) = [v for k, v in content["metadata"]["callbacks"].items() if "ModelCheck" in k]
        state[where] = {"scores": [[name, None]], "replaced": [name]}.get(where, name)

    forge(entry.path, change)
    with pytest.raises(ValueError, match=re.escape(f"`{name}` is no name of a checkpoint")):
        fit(6, resume="auto")
    assert sorted(os.listdir(tmp_path / "mine")) == ["LOCK", mine.name]


# Manifests that lie


HUGE = 2**47


W = ("arrays", "w")
SHARD = (*W, "shards", 0)
LIES = [
    set_("step", -1),
    set_("step", 2**48),
    set_("step", 1.0),
    set_("step", float("nan")),
    set_("step", True),
    set_("step", "1"),
    set_("step", None),
    set_("step", 10**4000),
    set_("serial", float("inf")),
    set_("serial", -1),
    set_("name", 3),
    set_("name", "../evil"),
    set_("saved_at", 3),
    set_("versions", []),
    set_("versions", {"jax": 1}),
    set_("metadata", []),
    set_("metadata", None),
    set_("scalars", {"x": [1]}),
    set_("scalars", {"x": "text"}),
    set_("arrays", []),
    set_("files", []),
    set_("files", {}),
    set_("format", -1),
    set_("format", "1"),
    set_("format", float("nan")),
    set_("files", ARRAYS, "size", -1),
    set_("files", ARRAYS, "size", HUGE),
    set_("files", ARRAYS, "header_size", -8),
    set_("files", ARRAYS, "header_size", 0),
    set_("files", ARRAYS, "header_size", HUGE),
    set_("files", ARRAYS, "header_size", float("nan")),
    set_("files", ARRAYS, "header_sha256", 5),
    set_("files", ARRAYS, "header_sha256", "0" * 64),
    set_(*W, "dtype", "object"),
    set_(*W, "dtype", "O"),
    set_(*W, "dtype", "V12"),
    set_(*W, "dtype", "float64"),
    set_(*W, "dtype", ["float32"]),
    set_(*W, "shape", [-3, -4]),
    set_(*W, "shape", [3, 5]),
    set_(*W, "shape", [12.0]),
    set_(*W, "shape", [True, 12]),
    set_(*W, "shape", [HUGE, HUGE, HUGE]),
    set_(*W, "shape", [0, HUGE, HUGE]),
    set_(*W, "shape", [2**62]),
    set_(*W, "shape", [1] * 65),
    set_(*W, "shape", "34"),
    set_(*W, "shape", float("nan")),
    set_(*W, "prng", "threefry2x32"),
    set_(*W, "prng", ""),
    set_(*W, "prng", ["os.system"]),
    set_(*W, "shards", []),
    set_(*W, "shards", None),
    set_(*SHARD, "offset", -8),
    set_(*SHARD, "offset", 2**64),
    set_(*SHARD, "offset", 0),
    set_(*SHARD, "offset", float("nan")),
    set_(*SHARD, "size", 2**63),
    set_(*SHARD, "size", -48),
    set_(*SHARD, "size", 44),
    set_(*SHARD, "region", [[0, 3]]),
    set_(*SHARD, "region", [[0, 3], [0, 5]]),
    set_(*SHARD, "region", [[3, 0], [4, 0]]),
    set_(*SHARD, "region", [[-3, 0], [0, 4]]),
    set_(*SHARD, "region", [[0, HUGE], [0, HUGE]]),
    set_(*SHARD, "region", [[0, 3, 1], [0, 4, 1]]),
    set_(*SHARD, "sha256", []),
    set_(*SHARD, "sha256", "0" * 64),
    set_(*SHARD, "sha256", [0]),
    set_(*SHARD, "sha256", ["0" * 64] * 2),
    set_(*SHARD, "file", "arrays-00001-of-00002.safetensors"),
    set_(*SHARD, "file", ["x"]),
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_manifest_is_believed_nothing(step, lie):
    forge(step, lie)
    for reader in READERS.values():
        with pytest.raises(CheckpointDamaged, match=re.escape(f"`{step}`")):
            reader(step)


def test_a_wrong_checksum_is_believed_no_more_than_a_right_one(step, capsys):
    forge(step, set_(*SHARD, "sha256", ["0" * 64]))
    read = {name: READERS[name] for name in ("verify", "read", "arrays")}
    check_refused(step, capsys, "which belong to `w`, do not match their checksum", read=read)


def test_bytes_that_two_arrays_share(step, capsys):
    def change(content):
        content["arrays"]["twin"] = content["arrays"]["w"]

    forge(step, change)
    check_refused(step, capsys, "has bytes that belong to no array, or to two")


@pytest.mark.parametrize(
    "regions",
    [
        [[[0, 2], [0, 4]], [[1, 3], [0, 4]]],  # a row twice
        [[[0, 3], [0, 4]]] * 2,
        [[[0, 2], [0, 4]], [[0, 1], [0, 4]]],
    ],
)
def test_shards_that_overlap_or_leave_something_out(step, capsys, regions):
    def change(content):
        shard = content["arrays"]["w"]["shards"][0]
        end, shards = shard["offset"], []
        for rows_, columns in regions:
            size = 4 * (rows_[1] - rows_[0]) * (columns[1] - columns[0])
            shards.append(shard | {"region": [rows_, columns], "offset": end, "size": size})
            end += size
        content["arrays"]["w"]["shards"] = shards

    forge(step, change)
    check_refused(step, capsys, r"shards of `w` (overlap|leave a part)")


@pytest.mark.parametrize("key", ["format", "arrays", "step", "metadata"])
def test_keys_that_come_twice(step, capsys, key):
    """Readers differ in which of the two they take, so one may check what another one uses."""
    text = (step / "manifest.json").read_text()
    assert text.endswith("}")
    forge_text(step, f'{text[:-1]},"{key}":{{}}}}')
    check_refused(step, capsys, f"`{key}` comes twice")


def test_keys_that_come_twice_deep_inside(step, capsys):
    text = (step / "manifest.json").read_text().replace('"offset":', '"offset":1,"offset":')
    forge_text(step, text)
    check_refused(step, capsys, "`offset` comes twice")


@pytest.mark.parametrize("kind", NESTED)
def test_a_manifest_that_is_nested_100_000_levels_deep(step, capsys, kind):
    forge_text(step, NESTED[kind])
    check_refused(step, capsys, "Its manifest makes no sense")


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("depth", [101, 900, 100_000])
def test_metadata_that_is_nested_deep(step, capsys, kind, depth):
    left, right = ("[", "]") if kind == "lists" else ('{"a":', "}")
    nested = left * depth + "1" + right * depth
    text = (step / "manifest.json").read_text().replace('{"seed":2}', f'{{"seed":{nested}}}')
    forge_text(step, text)
    check_refused(step, capsys, "Its manifest makes no sense")


@pytest.mark.parametrize("text", ["", "null", "[]", "3", '"x"', "NaN", "{}", "\ufeff{}", "\0" * 9])
def test_json_that_is_no_manifest(step, capsys, text):
    forge_text(step, text)
    check_refused(step, capsys, "Its manifest makes no sense")


def test_a_manifest_that_is_no_text(step, capsys):
    (step / "manifest.json").write_bytes(b"\xff\xfe\x00")
    (step / "COMMIT").write_bytes(commit_of(b"\xff\xfe\x00"))
    check_refused(step, capsys, "Its manifest makes no sense")


@pytest.mark.parametrize("file", ["manifest.json", ARRAYS])
def test_a_file_of_holes_is_not_read_into_memory(step, capsys, file):
    """4 TiB that take no room on the disk."""
    os.truncate(step / file, 2**42)
    if file == ARRAYS:
        header = 2**42 - sum(array.nbytes for array in TREE.values())

        def change(content):
            content["files"][ARRAYS] |= {"size": 2**42, "header_size": header}
            for array in content["arrays"].values():
                array["shards"][0]["offset"] += header
                # Behind the header, in the same order.
            first = min(a["shards"][0]["offset"] for a in content["arrays"].values())
            for array in content["arrays"].values():
                array["shards"][0]["offset"] += header - first

        forge(step, change)
    message = "its manifest has" if file == "manifest.json" else "the header of .* has .* bytes"
    check_refused(step, capsys, message)


def test_an_error_message_is_not_as_long_as_what_it_is_about(step):
    forge(step, set_("saved_at", ["x" * 10**6]))
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(step)
    assert len(str(caught.value)) < 1000
