"""`jaxlightning checkpoint inspect | verify | diff`, on checkpoints made for the purpose."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import saved

import jaxlightning
from jaxlightning._checkpoint import CheckpointStore
from jaxlightning.cli import main

TREE = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "step": np.int32(7),
    "key": jax.random.key(3),
    "half": jnp.ones(4, jnp.bfloat16),
}

ONE = {
    "seed": 1,
    "score": float("nan"),
    "names": ["a", "b"],
    "task": "Net",
    "hyperparameters": {"lr": 0.1, "sizes": [1, 2]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two checkpoints that differ in all that can differ, and what is no checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")
    other = {
        "weight": np.array([[0, 1, 2], [3, 4.5, 9]], np.float32),
        "step": np.int32(7),
        "key": jax.random.key(4),
        "half": jnp.ones(4, jnp.float16),
        "more": np.zeros((2, 2), np.int8),
    }
    with CheckpointStore(root) as store:
        saved(store, TREE, ONE, 7, "one")
        saved(store, other, ONE | {"seed": 2, "names": ["a"]}, 9, "other")
    (root / "notes.txt").write_text("no checkpoint")
    return root


@pytest.fixture
def damaged(tmp_path):
    """Three checkpoints: intact, with one bit flipped in an array, and without its end."""
    with CheckpointStore(tmp_path) as store:
        for name in ("intact", "flipped", "torn"):
            saved(store, TREE, name=name)
    arrays = next((tmp_path / "flipped").glob("arrays*"))
    content = bytearray(arrays.read_bytes())
    content[content.index(np.float32(5).tobytes())] ^= 1
    arrays.write_bytes(content)
    (tmp_path / "torn" / "COMMIT").unlink()
    return tmp_path


def run(capsys, *arguments):
    """`(exit code, standard output, standard error)`."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


# inspect


def test_inspect_lists_all_that_a_checkpoint_holds(folder, capsys):
    code, out, _ = run(capsys, "checkpoint", "inspect", folder / "one")
    assert code == 0
    head, arrays, parameters, rest = out.split("\n\n")
    lines = head.splitlines()
    assert lines[0] == str(folder / "one")
    assert lines[1].split() == ["step", "7"]
    assert f"jax {jax.__version__}" in lines[3]
    rows = [line.split() for line in arrays.splitlines()]
    # 24 bytes of float32, 4 of int32, 8 of a key, 8 of bfloat16.
    assert rows[0] == ["4", "arrays,", "44", "bytes"]
    assert sorted(rows[1:]) == [
        ["half", "bfloat16[4]", "8"],
        ["key", "keys[]", "of", "`threefry2x32`", "8"],
        ["step", "int32[]", "4"],
        ["weight", "float32[2,3]", "24"],
    ]
    assert [line.split(maxsplit=1) for line in parameters.splitlines()] == [
        ["hyper-parameters", "of Net"],
        ["lr", "0.1"],
        ["sizes", "[1, 2]"],
    ]
    assert rest == "metadata of seed, score, names, task: `--all` prints it\n"
    _, out, _ = run(capsys, "checkpoint", "inspect", "--all", folder / "one")
    found = json.loads(out.split("\n\n")[-1].removeprefix("metadata\n"))
    assert (found["seed"], found["names"]) == (1, ["a", "b"])


def test_inspect_lists_the_checkpoints_of_a_folder(folder, damaged, capsys):
    code, out, _ = run(capsys, "checkpoint", "inspect", folder)
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["one", "step", "7", "44", "bytes"],
        ["other", "step", "9", "48", "bytes"],
    ]
    # It reads manifests only, so a bit that is wrong in an array is for `verify` to find.
    code, out, _ = run(capsys, "checkpoint", "inspect", damaged)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["flipped", "step"],
        ["intact", "step"],
        ["torn", "damaged"],
    ]


# verify


def test_verify_finds_one_flipped_bit(damaged, capsys):
    code, out, _ = run(capsys, "checkpoint", "verify", damaged)
    assert code == 1
    flipped, intact, torn = out.splitlines()
    assert flipped.startswith("damaged  flipped: ")
    assert "checksum" in flipped
    assert intact == "intact   intact: step 1, 4 arrays, 44 bytes"
    assert torn.startswith("damaged  torn: ")
    assert "COMMIT" in torn


def test_verify_one(damaged, capsys):
    code, out, _ = run(capsys, "checkpoint", "verify", damaged / "intact")
    assert (code, out) == (0, "intact   intact: step 1, 4 arrays, 44 bytes\n")
    assert run(capsys, "checkpoint", "verify", damaged / "flipped")[0] == 1


# diff


def test_diff_names_every_difference(folder, capsys):
    code, out, _ = run(capsys, "checkpoint", "diff", folder / "one", folder / "other")
    assert code == 1
    assert sorted(out.splitlines()) == [
        "half: bfloat16[4] in the first, float16[4] in the second",
        "key: other keys[] of `threefry2x32`",
        'metadata/names/1: "b" in the first, absent in the second',
        "metadata/seed: 1 in the first, 2 in the second",
        "more: int8[2,2] only in the second",
        "step: 7 in the first, 9 in the second",
        "weight: 2 of 6 elements differ, by 4 at most",
    ]
    code, out, _ = run(capsys, "checkpoint", "diff", folder / "other", folder / "one")
    assert code == 1
    assert "more: int8[2,2] only in the first" in out.splitlines()


def test_diff_of_equals(folder, capsys):
    code, out, _ = run(capsys, "checkpoint", "diff", folder / "one", folder / "one")
    assert (code, out) == (0, "No difference.\n")


def test_diff_looks_at_bits(tmp_path, capsys):
    """Zeros of either sign and numbers that are not: equal bits are equal, others are not."""
    nan = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    with CheckpointStore(tmp_path) as store:
        saved(store, {"x": np.float32([0.0, nan[0]])}, name="a")
        saved(store, {"x": np.float32([-0.0, nan[0]])}, name="b")
        saved(store, {"x": np.array([0.0, nan[1]], np.float32)}, name="c")
    code, out, _ = run(capsys, "checkpoint", "diff", tmp_path / "a", tmp_path / "b")
    assert (code, out) == (1, "x: 1 of 2 elements differ, by 0 at most\n")
    code, out, _ = run(capsys, "checkpoint", "diff", tmp_path / "a", tmp_path / "c")
    assert (code, out) == (1, "x: 1 of 2 elements differ, by 0 at most\n")


def test_diff_verifies_what_it_reads(damaged, capsys):
    code, _, errors = run(capsys, "checkpoint", "diff", damaged / "intact", damaged / "flipped")
    assert code == 2
    assert errors.startswith("jaxlightning: ")
    assert "flipped" in errors


# Names of anybody

ESCAPE = "\x1b]0;title\x07\x1b[2J\nintact   all"


@pytest.fixture
def spoofed(tmp_path):
    """Two checkpoints whose names and values would steer a terminal, and forge a line."""
    metadata = {"task": ESCAPE, "hyperparameters": {ESCAPE: 1}, ESCAPE: 2}
    with CheckpointStore(tmp_path) as store:
        for step in (1, 2):
            saved(store, {ESCAPE: np.zeros(step), f"{ESCAPE}!": np.zeros(1)}, metadata, step)
    return sorted(tmp_path.glob("step_*"))


@pytest.mark.parametrize("action", ["inspect", "inspect --all", "diff", "verify"])
def test_what_a_terminal_would_obey_is_escaped(spoofed, capsys, action):
    one, other = spoofed
    if action == "verify":  # which then names the damaged leaf
        (arrays,) = one.glob("arrays*")
        content = arrays.read_bytes()
        arrays.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    others = [other] if action == "diff" else []
    code, out, errors = run(capsys, "checkpoint", *action.split(), one, *others)
    assert (code, errors) == (int(action in ("diff", "verify")), "")
    assert "\\x1b]0;title\\x07\\x1b[2J" in out or "\\u001b]0;title\\u0007\\u001b[2J" in out
    assert all(char.isprintable() or char == "\n" for char in out)
    assert not [line for line in out.splitlines() if line.startswith("intact")]


def test_errors_are_escaped_too(spoofed, capsys):
    code, out, errors = run(capsys, "checkpoint", "inspect", spoofed[0].parent / "a\x1b[2J\ud800")
    assert (code, out) == (2, "")
    assert "a\\x1b[2J\\ud800` is no checkpoint" in errors
    assert "\x1b" not in errors


# What can't be carried out


@pytest.mark.parametrize("action", ["inspect", "verify"])
def test_what_is_no_checkpoint(folder, tmp_path, capsys, action):
    for path in (tmp_path, tmp_path / "nowhere", folder / "notes.txt"):
        code, out, errors = run(capsys, "checkpoint", action, path)
        assert (code, out) == (2, "")
        assert errors == (f"jaxlightning: `{path}` is no checkpoint, and there is none below it.\n")


def test_diff_of_what_is_no_checkpoint(folder, tmp_path, capsys):
    code, _, errors = run(capsys, "checkpoint", "diff", folder / "one", tmp_path / "nowhere")
    assert code == 2
    assert str(tmp_path / "nowhere") in errors


@pytest.mark.parametrize("arguments", [[], ["checkpoint"], ["chekpoint"], ["checkpoint", "diff"]])
def test_what_is_no_command(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: jaxlightning" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"{jaxlightning.__version__}\n"


def test_a_real_process_whose_reader_has_enough(folder):
    """`jaxlightning checkpoint inspect PATH | true` ends without a word."""
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from jaxlightning.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "checkpoint", "inspect", str(folder)],
        stdout=write,
        stderr=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        timeout=120,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
