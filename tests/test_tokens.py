"""`TokenFile`: rows of a flat file of token ids."""

import os
import pickle
import threading

import numpy as np
import pytest
from feeds import feed

from jaxlightning import DataLoader
from jaxlightning.data import TokenFile


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, 1000, 103)


@pytest.fixture
def path(tmp_path, ids):
    path = tmp_path / "train.bin"
    ids.astype("<u2").tofile(path)
    return path


@pytest.mark.parametrize(
    ("length", "overlap", "count"),
    [(10, 0, 10), (11, 1, 10), (103, 0, 1), (4, 3, 100), (1, 0, 103)],
)
def test_rows_follow_one_another_and_share_the_overlap(path, ids, length, overlap, count):
    rows = TokenFile(path, length, overlap=overlap)
    assert len(rows) == count
    stride = length - overlap
    expected = np.stack([ids[i * stride : i * stride + length] for i in range(count)])
    found = rows[np.arange(count)]["input_ids"]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)
    order = np.random.default_rng(1).permutation(count)
    np.testing.assert_array_equal(rows[order]["input_ids"], expected[order])
    np.testing.assert_array_equal(rows[count - 1]["input_ids"], expected[-1])


def test_every_token_but_the_first_is_a_target_once(path, ids):
    rows = TokenFile(path, 18, overlap=1)
    targets = rows[np.arange(len(rows))]["input_ids"][:, 1:]
    np.testing.assert_array_equal(targets.ravel(), ids[1 : 1 + targets.size])
    assert targets.size == 102


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", ">u2", "uint32", "int64"])
@pytest.mark.parametrize("npy", [False, True])
def test_files_of_any_integers(tmp_path, dtype, npy):
    ids = np.arange(40).astype(dtype)
    path = tmp_path / "ids.bin"
    if npy:
        with path.open("wb") as file:
            np.save(file, ids)
    else:
        ids.tofile(path)
    rows = TokenFile(path, 8, dtype=None if npy else dtype)
    assert rows.dtype.newbyteorder("=") == ids.dtype.newbyteorder("=")
    batch = next(iter(DataLoader(rows, 5)))["input_ids"]
    np.testing.assert_array_equal(batch, np.arange(40).reshape(5, 8))
    assert batch.dtype == np.int32


def test_through_a_loader(path, ids):
    loader = DataLoader(TokenFile(path, 11, overlap=1), 4, shuffle=True, seed=2)
    whole = TokenFile(path, 11, overlap=1)[loader.order(3)]["input_ids"]
    batches = feed(loader).epoch(3, 1)
    np.testing.assert_array_equal(np.concatenate([b.leaves[0] for b in batches]), whole[4:])


def test_the_file_is_not_read_into_memory(tmp_path):
    """Of a sparse file of 8 GB there are two rows to read."""
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(2**33)
        file.seek(2**33 - 8)
        file.write(np.array([5, 6, 7, 8], "<u2").tobytes())
    rows = TokenFile(path, 4, vocab_size=9)
    assert len(rows) == 2**30
    found = rows[np.array([0, 2**30 - 1])]["input_ids"]
    assert found.tolist() == [[0, 0, 0, 0], [5, 6, 7, 8]]
    assert rows.fingerprint()["tokens"] == 2**32


def test_a_batch_is_the_readers_own(path):
    rows = TokenFile(path, 10)
    first = rows[np.array([0])]["input_ids"]
    first[:] = 7
    assert (rows[np.array([0])]["input_ids"] != 7).any()


@pytest.mark.filterwarnings("ignore:os.fork")  # JAX warns of its own threads
def test_threads_and_processes_read_the_same(path):
    rows = TokenFile(path, 10)
    everything = np.arange(10)
    expected = rows[everything]["input_ids"]
    found: list = []
    threads = [
        threading.Thread(target=lambda: found.append(rows[everything]["input_ids"]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for batch in found:
        np.testing.assert_array_equal(batch, expected)
    child = os.fork()
    if child == 0:
        same = np.array_equal(rows[everything]["input_ids"], expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_pickle_holds_the_path_and_no_tokens(tmp_path):
    path = tmp_path / "ids.bin"
    np.arange(100_000, dtype="<u4").tofile(path)
    rows = TokenFile(path, 10, overlap=2, dtype="uint32", vocab_size=100_000)
    pickled = pickle.dumps(rows)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert again.fingerprint() == rows.fingerprint()
    assert again.vocab_size == 100_000
    assert repr(again) == f"TokenFile({str(path)!r}, 10, overlap=2)"


# What is refused


def refusal(path, *arguments, **options):
    with pytest.raises(ValueError, match=r"\w") as caught:
        TokenFile(path, *arguments, **options)
    return str(caught.value)


def test_a_file_that_is_no_token_file(tmp_path, path):
    assert "`length=0` and `overlap=0` make no rows" in refusal(path, 0)
    assert "`length=4` and `overlap=4` make no rows" in refusal(path, 4, overlap=4)
    assert "holds 103 ids, too few for one row of `length=104`" in refusal(path, 104)
    assert "has 206 bytes, which is no multiple of 4, the size of one uint32. It is cut" in refusal(
        path, 4, dtype="uint32"
    )
    assert "Token ids are integers, but" in refusal(path, 4, dtype="float16")
    empty = tmp_path / "empty.bin"
    empty.touch()
    assert "is empty: it holds no tokens" in refusal(empty, 4)
    with pytest.raises(FileNotFoundError, match=r"no file of tokens at `.*nothing\.bin`"):
        TokenFile(tmp_path / "nothing.bin", 4)


def test_an_npy_file_that_is_none(tmp_path):
    def saved(array, **options):
        np.save(tmp_path / "ids.npy", array, **options)
        return tmp_path / "ids.npy"

    assert "would hold float64" in refusal(saved(np.ones(8)), 4)
    assert "an array of shape (4, 2), where one axis of ids is" in refusal(
        saved(np.ones((4, 2), int)), 4
    )
    assert "holds int64, but `dtype=uint16` was asked for. Leave `dtype` out" in refusal(
        saved(np.ones(8, int)), 4, dtype="uint16"
    )
    whole = saved(np.arange(100)).read_bytes()
    (tmp_path / "ids.npy").write_bytes(whole[:400])
    assert "begins as an `.npy` does, but is none that can be mapped: " in refusal(
        tmp_path / "ids.npy", 4
    )


class Payload:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


def test_a_pickle_in_an_npy_file_is_not_loaded(tmp_path, capsys):
    path = tmp_path / "ids.npy"
    np.save(path, np.array([Payload()], object), allow_pickle=True)
    assert "none that can be mapped" in refusal(path, 1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("npy", [False, True])
@pytest.mark.parametrize(("wrong", "said"), [(500, "500"), (-1, "-1")])
def test_ids_out_of_range_are_an_error_with_their_place(tmp_path, npy, wrong, said):
    ids = np.arange(100, dtype="<i4")
    ids[47] = wrong
    path = tmp_path / "ids.bin"
    if npy:
        with path.open("wb") as file:
            np.save(file, ids)
        byte = path.stat().st_size - 53 * 4
    else:
        ids.tofile(path)
        byte = 47 * 4
    loader = DataLoader(TokenFile(path, 10, dtype=None if npy else "int32", vocab_size=200), 5)
    with pytest.raises(ValueError, match="Row 4 of") as caught:
        list(loader)
    assert str(caught.value).startswith(
        f"Row 4 of the tokens `{path}` has the id {said} at position 7 (byte {byte} of the file), "
        "which is not from 0 to 199, as `vocab_size=200` allows. Is the file of another dtype than "
        "int32"
    )
    assert "row 4 of the source, in batch 0 of epoch 0" in caught.value.__notes__[-1]
    with pytest.raises(ValueError, match="Row 4 of the tokens"):
        TokenFile(path, 10, dtype=None if npy else "int32", vocab_size=200)[4]


def test_without_a_vocabulary_ids_have_to_fit_int32(tmp_path):
    path = tmp_path / "ids.bin"
    np.array([1, 2**31 - 1, 2**31, 3], "<u4").tofile(path)
    rows = TokenFile(path, 2, dtype="uint32")
    assert rows[0]["input_ids"].tolist() == [1, 2**31 - 1]
    with pytest.raises(ValueError, match=r"Row 1 .* has the id 2147483648 at position 0 .* fits i"):
        rows[1]


# The fingerprint


def test_the_fingerprint_tells_a_changed_file(tmp_path, path, ids):
    prints = lambda **options: TokenFile(path, 10, **options).fingerprint()
    before = prints()
    assert prints() == before
    assert prints(overlap=1) != before
    assert TokenFile(path, 9).fingerprint() != before
    path.rename(tmp_path / "moved.bin")
    assert TokenFile(tmp_path / "moved.bin", 10).fingerprint() == before
    for other in (ids[:-1], ids + 1, ids[::-1]):
        other.astype("<u2").tofile(path)
        assert prints() != before


def test_the_fingerprint_reads_a_sample(tmp_path, monkeypatch):
    path = tmp_path / "ids.bin"
    np.arange(2_000_000, dtype="<u4").tofile(path)
    rows = TokenFile(path, 10, dtype="uint32")
    before = rows.fingerprint()
    whole = np.fromfile(path, "<u4")
    whole[3000] += 1  # in the gap between the first two pieces
    whole.tofile(path)
    assert TokenFile(path, 10, dtype="uint32").fingerprint() == before
    whole[-1] += 1
    whole.tofile(path)
    assert TokenFile(path, 10, dtype="uint32").fingerprint() != before
