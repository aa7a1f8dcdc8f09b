"""The user's text: every format that is read, and what is said about a bad file."""

import json
import re

import pyarrow as pa
import pyarrow.parquet
import pytest

from albert_task._text import DatasetText, TextFiles, open_dataset, text_column

TEXTS = ["The first document.\nIts second line.", "The second document, naïve and short."]


def texts(source):
    return [document.text for document in source]


def write_plain(path):
    path.write_text("\n\n \n".join(TEXTS) + "\n\n", encoding="utf-8")


def write_json_lines(path):
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")


def write_parquet(path):
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"id": [0, 1], "text": TEXTS}), path)


def write_arrow_stream(path):
    import pyarrow as pa

    table = pa.table({"text": pa.array(TEXTS, pa.large_string())})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def write_arrow_file(path):
    import pyarrow as pa

    table = pa.table({"text": TEXTS})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


FORMATS = [
    ("a.txt", write_plain),
    ("a.md", write_plain),
    ("a.jsonl", write_json_lines),
    ("a.json", write_json_lines),
    ("a.parquet", write_parquet),
    ("a.arrow", write_arrow_stream),
    ("b.arrow", write_arrow_file),
]


@pytest.mark.parametrize(("name", "write"), FORMATS, ids=lambda x: getattr(x, "__name__", x))
def test_every_format_gives_the_same_documents_again_and_again(tmp_path, name, write):
    write(tmp_path / name)
    source = TextFiles(tmp_path / name)
    assert texts(source) == TEXTS
    assert texts(source) == TEXTS
    assert next(iter(source)).name == f"{name} 0"


def test_a_glob_a_folder_and_a_list_find_the_same_files_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "inner/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"This is {name}.")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    expected = ["This is a.txt.", "This is b.txt.", "This is inner/c.txt."]
    assert texts(TextFiles(tmp_path)) == expected
    assert texts(TextFiles(f"{tmp_path}/**/*.txt")) == expected
    assert texts(TextFiles([f"{tmp_path}/*.txt", f"{tmp_path}/a.txt", f"{tmp_path}/inner"])) == (
        expected
    )


def test_a_folder_gives_files_however_their_names_are_written(tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "A.TXT").write_text("one")
    (tmp_path / "b.JsonL").write_text('{"text": "two"}')
    assert texts(TextFiles(tmp_path)) == ["one", "two"]


def test_half_a_character_is_replaced(tmp_path):
    """As JSON can write it; a whole one in two halves is one."""
    (tmp_path / "a.jsonl").write_text(r'{"text": "cut \ud83d off, \ud83d\ude00"}')
    assert texts(TextFiles(tmp_path)) == ["cut \ufffd off, \U0001f600"]


def test_a_name_that_looks_like_a_glob_is_that_file(tmp_path):
    (tmp_path / "notes[1].txt").write_text("These are the notes.")
    assert texts(TextFiles(tmp_path / "notes[1].txt")) == ["These are the notes."]


def test_a_byte_order_mark_and_carriage_returns_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    assert texts(TextFiles(tmp_path / "a.txt")) == ["one", "two"]


def test_a_pattern_without_a_match_is_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No file matches `.*nothing\*\.txt`.*Quote"):
        TextFiles(f"{tmp_path}/nothing*.txt")
    with pytest.raises(FileNotFoundError, match=r"has no text in it: no file that ends in `\.txt`"):
        TextFiles(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"`.*a\.txt` is empty"),
        (b" \n\n", r"`.*a\.txt` holds no text, only blanks"),
    ],
)
def test_an_empty_file_is_named(tmp_path, data, message):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        texts(TextFiles(tmp_path / "a.txt"))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("before", [b"", b"caf", b"one line\n\nand caf"])
def test_invalid_utf8_is_named_with_the_byte_and_its_offset(tmp_path, mark, before):
    path = tmp_path / "a.txt"
    path.write_bytes(mark + before + b"\xe9 in latin-1\n")
    offset = path.read_bytes().index(b"\xe9")
    with pytest.raises(ValueError, match=re.escape(f"byte 0xe9 at offset {offset} ")) as caught:
        texts(TextFiles(path))
    assert f"The file `{path}` is not UTF-8" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"broken on line 2, column \d+"),
        ('["text"]', r"a JSON list on line 2"),
        ('{"text": 3}', r"Line 2 of `.*` has no string in `text`: it is a `int`"),
        ('{"body": "b"}', r"Line 2 of `.*` has no column `text`. Found: `body`"),
    ],
)
def test_a_broken_json_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        texts(TextFiles(path, "text"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_table_that_is_none_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is no table at all, but text")
    with pytest.raises(ValueError, match=r"cannot be read as (parquet|arrow)"):
        texts(TextFiles(tmp_path / name))


@pytest.fixture
def table():
    return pa.table({"text": [f"document {i} " * 20 for i in range(1000)]})


def test_a_table_that_is_cut_short_names_the_first_row_that_is_gone(tmp_path, table):
    path = tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"`.*a\.arrow` cannot be read as arrow from row 500 on: "):
        texts(TextFiles(path))


def test_a_table_that_is_damaged_is_named(tmp_path, table):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(table, path)
    damaged = bytearray(path.read_bytes())
    damaged[200:240] = bytes(40)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"`.*a\.parquet` cannot be read as parquet: "):
        texts(TextFiles(path))


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_a_row_of_a_table_that_is_no_utf_8_is_named(tmp_path, table, kind):
    path = tmp_path / "a.arrow"
    new = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[kind]
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"document 777", b"d\xffcument 777", 1))
    with pytest.raises(
        ValueError, match=r"is damaged: row 777 is not UTF-8 \(byte 0xff at offset 1 of its text\)"
    ):
        texts(TextFiles(path))


def test_the_column_is_text_or_the_only_one_of_strings_or_the_named_one():
    assert text_column(["a", "text"], ["a", "text"], None, "It") == "text"
    assert text_column(["id", "body"], ["body"], None, "It") == "body"
    assert text_column(["a", "b"], ["a", "b"], "b", "It") == "b"
    with pytest.raises(ValueError, match=r"no column `text`, and several that hold strings.*`a`"):
        text_column(["a", "b"], ["a", "b"], None, "It")
    with pytest.raises(ValueError, match=r"and none that holds strings. Found: `id`"):
        text_column(["id"], [], None, "It")
    with pytest.raises(ValueError, match=r"no strings in the column `id`"):
        text_column(["id", "a"], ["a"], "id", "It")
    with pytest.raises(ValueError, match=r"no column `boddy`\..*Did you mean `body`\?"):
        text_column(["id", "body"], ["body"], "boddy", "It")


def test_a_fingerprint_follows_content_and_column_but_not_the_place(tmp_path):
    for folder, text in (("x", "same"), ("y", "same"), ("z", "other")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text(text)
    x, y, z = (TextFiles(tmp_path / folder).fingerprint() for folder in "xyz")
    assert x == y
    assert x != z
    assert x != TextFiles(tmp_path / "x", "body").fingerprint()


def test_a_saved_dataset_is_read_by_column_and_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_dict({"id": [0, 1, 2], "body": [TEXTS[0], "", TEXTS[1]]})
    datasets.DatasetDict(train=train, extra=train.select([2])).save_to_disk(tmp_path / "set")
    source = open_dataset(tmp_path / "set")
    assert texts(source) == TEXTS
    assert [document.name for document in source] == ["row 0", "row 2"]
    assert texts(open_dataset(tmp_path / "set", split="extra", column="body")) == TEXTS[1:]
    assert source.fingerprint() == open_dataset(tmp_path / "set").fingerprint()
    assert source.fingerprint() != open_dataset(tmp_path / "set", split="extra").fingerprint()
    with pytest.raises(ValueError, match=r"no split `test`. Found: `train`, `extra`"):
        open_dataset(tmp_path / "set", split="test")
    with pytest.raises(ValueError, match=r"has no column `bod`.*Did you mean `body`"):
        open_dataset(tmp_path / "set", column="bod")


def test_a_folder_of_files_is_no_saved_dataset(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    assert texts(open_dataset(tmp_path)) == TEXTS
    with pytest.raises(ValueError, match=r"has no splits, of which `test` could be one\. Name no"):
        open_dataset(tmp_path, split="test")
    with pytest.raises(ValueError, match=r"has no configurations to choose from"):
        open_dataset(tmp_path, configuration="en")


def test_a_dataset_without_rows_is_refused():
    datasets = pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="It is empty: it has no rows"):
        DatasetText(datasets.Dataset.from_dict({"text": ["a"]}).select([]), name="It")


def test_a_hub_dataset_gets_name_and_configuration_and_failure_says_so(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*args, streaming):
        assert not streaming
        asked.append(args)
        if args[0] == "owner/absent":
            raise ConnectionError("no network here")
        return datasets.Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts(open_dataset("owner/name", configuration="en")) == TEXTS
    assert asked == [("owner/name", "en")]
    with pytest.raises(FileNotFoundError, match=r"`owner/absent` is no folder.*no network here"):
        open_dataset("owner/absent")


def test_a_dataset_that_is_streamed(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"text": [*TEXTS, ""], "n": range(len(TEXTS) + 1)})
    asked = []

    def load(*args, streaming):
        asked.append(streaming)
        return {"train": rows.to_iterable_dataset()}

    monkeypatch.setattr(datasets, "load_dataset", load)
    text = open_dataset("owner/name", streaming=True)
    assert asked == [True]
    assert texts(text) == texts(text) == TEXTS
    other = open_dataset("owner/other", streaming=True)
    assert text.fingerprint() != other.fingerprint()
    assert text.fingerprint() == open_dataset("owner/name", streaming=True).fingerprint()
    with pytest.raises(ValueError, match="has no strings in the column `n`"):
        open_dataset("owner/name", streaming=True, column="n")


def test_plain_text_has_no_columns(tmp_path):
    (tmp_path / "a.csv").write_text("body\nsome text\n")
    with pytest.raises(
        ValueError, match=r"no column `body` in plain text, .*`.jsonl`, .* have col"
    ):
        TextFiles(tmp_path / "a.csv", "body")


def test_every_line_has_the_column_that_was_chosen(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"title": "two"}\n')
    with pytest.raises(ValueError, match=r"Line 2 of .* has no column `text`. Found: `title`"):
        list(TextFiles(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"id": "1", "text": null}\n')
    with pytest.raises(ValueError, match=r"Line 1 of .* has no strings in the column `text`"):
        list(TextFiles(tmp_path / "a.jsonl"))
