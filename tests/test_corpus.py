"""The embedded corpus: what of a docstring is prose, and how it is collected."""

import json
import sys
import textwrap

import pytest

from albert_task._corpus import build_corpus, python_roots, python_sources, write_corpus
from albert_task._prose import clean, docstrings, is_prose, prose_of_file, topics

NUMPY_STYLE = """
    Compute the weighted mean of the samples along the given axis.

    The weights are normalised first, so that they need not sum to one, and
    samples of weight zero are left out of the result altogether.

    Parameters
    ----------
    a : array_like
        The array that holds the samples to be averaged.
    axis : int, optional
        This is the axis along which the mean is to be computed.

    Returns
    -------
    mean : ndarray
        It is the mean of the samples, which has one axis less.

    Notes
    -----
    The sum is computed in double precision, which is what makes it accurate.

    Examples
    --------
    >>> mean([1, 2, 3])
    2.0
    The result of the call above is the mean of the list.
    """


def test_keeps_the_sentences_of_a_numpy_docstring_and_drops_its_lists():
    assert clean(NUMPY_STYLE) == [
        "Compute the weighted mean of the samples along the given axis.",
        "The weights are normalised first, so that they need not sum to one, and samples of weight "
        "zero are left out of the result altogether.",
        "The sum is computed in double precision, which is what makes it accurate.",
    ]


def test_drops_arguments_in_google_and_sphinx_style_with_their_continuation_lines():
    google = """Opens the file for reading in the mode that was given.

    Args:
      path: where the file is on the disk of this machine.
        It can be relative to the current folder.
    Returns:
      The file, which is to be closed by the caller.

    The file is closed when the process comes to its end.
    """
    sphinx = """Opens the file for reading in the mode that was given.

    :param path: where the file is on the disk of this machine
        and it can be relative to the current folder.
    :returns: the file that has been opened.
    """
    opened = "Opens the file for reading in the mode that was given."
    assert clean(google) == [opened, "The file is closed when the process comes to its end."]
    assert clean(sphinx) == [opened]


def test_drops_doctests_code_blocks_and_tables():
    text = """The table below is what the parser makes of it.

    >>> parse("a line of text that looks like it is a sentence.")
    'this is the answer of the parser to the line.'

    An example of how it is used in practice follows here::

        for each in the_list_of_all:
            this is the code and not prose at all.

    ```
    this is fenced and it is not prose either.
    ```

    =====  =====================================
    name   what it is that the column stands for
    =====  =====================================

    All of it is read in one pass over the file.
    """
    assert clean(text) == [
        "The table below is what the parser makes of it.",
        "An example of how it is used in practice follows here:",
        "All of it is read in one pass over the file.",
    ]


def test_inline_markup_becomes_plain_words():
    text = (
        "Use :func:`~package.module.opens` or *any* of the ``other`` functions of `the docs <x>`_ "
        "that are in |this| module, as it is said in the paper [1]_."
    )
    assert clean(text) == [
        "Use opens or any of the other functions of the docs that are in this module, as it is "
        "said in the paper."
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Copyright of the Python Software Foundation, all of it reserved.",
        "See the page at https://example.org for all that there is to know.",
        "x = f(y) + g(z) * 3 - the_value_of[0] and a | b & c.",
        "too short it is.",
        "Это предложение написано на русском языке the a of to in is.",
        "nouns verbs adjectives adverbs pronouns prepositions conjunctions.",
    ],
)
def test_what_is_no_english_sentence_is_no_prose(text):
    assert not is_prose(text)


def test_docstrings_are_found_at_every_depth_without_importing(tmp_path):
    source = textwrap.dedent('''
        """The module."""
        raise SystemExit("imported")
        class A:
            """The class."""
            async def method(self):
                """The method."""
        if True:
            try:
                def inner():
                    """The inner one."""
            except ImportError:
                def inner():
                    """The other one."""
        text = """No docstring."""
    ''')
    found = ["The module.", "The class.", "The method.", "The inner one.", "The other one."]
    assert list(docstrings(source.encode())) == found


def test_topics_of_the_language_reference_are_read_by_name():
    assert topics(b'topics = {"assert": "The assert statement.", "if": "The if."}') == {
        "assert": "The assert statement.",
        "if": "The if.",
    }


def test_a_file_that_cannot_be_parsed_says_why(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text('"""Text."""\ndef broken(:\n')
    assert prose_of_file(str(path)) == {"error": "SyntaxError"}
    path.write_bytes(b'"""Text \xff."""')
    assert prose_of_file(str(path))["error"] in ("SyntaxError", "UnicodeDecodeError")


ONE = "It is the first of the sentences that are in this module."
TWO = "It is the second of the sentences that are in this module."


@pytest.fixture
def sources(tmp_path):
    root = tmp_path / "lib"
    files = {
        "b/second.py": f'"""{TWO}\n\n{ONE}"""',
        "a/first.py": f'"""{ONE}"""',
        "a/broken.py": '"""Text."""\ndef (:',
        "a/empty.py": "x = 1",
        "a/tests/test_first.py": '"""This is a test and it is to be left out of the corpus."""',
        "a/test_more.py": '"""This is a test and it is to be left out of the corpus."""',
        "jaxlightning/own.py": '"""This is our own and it is to be left out of the corpus."""',
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return python_sources([root])


def test_sources_come_in_the_order_of_their_names_without_tests_and_ourselves(sources):
    names = [name for name, _ in sources]
    assert names == ["a/broken.py", "a/empty.py", "a/first.py", "b/second.py"]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_corpus_does_not_depend_on_the_number_of_workers(sources, workers):
    calls = []
    corpus = build_corpus(sources, workers=workers, progress=lambda *done: calls.append(done))
    assert corpus.documents == [("a/first.py", ONE), ("b/second.py", TWO)]
    assert (corpus.files, corpus.skipped, corpus.paragraphs, corpus.duplicates) == (4, 1, 2, 1)
    assert corpus.characters == len(ONE) + len(TWO)
    assert calls[-1] == (4, 4)
    assert calls == sorted(calls)


def test_a_corpus_without_prose_is_an_error_that_points_to_text(sources):
    with pytest.raises(ValueError, match=r"No English prose .* 1 Python sources.*--text"):
        build_corpus([source for source in sources if source[0] == "a/empty.py"])


def test_a_failing_progress_ends_the_workers(sources):
    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_corpus(sources, workers=2, progress=fail)


def test_a_corpus_is_written_as_json_lines_whole_or_not_at_all(sources, tmp_path):
    path = tmp_path / "corpus.jsonl"
    write_corpus(build_corpus(sources, workers=1), path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"name": "a/first.py", "text": ONE}, {"name": "b/second.py", "text": TWO}]
    assert [file.name for file in tmp_path.glob("*corpus*")] == ["corpus.jsonl"]


def test_this_interpreter_has_a_corpus():
    # The language reference alone, which every CPython ships, is a small corpus.
    wanted = [source for source in python_sources(python_roots()[:1]) if "topics" in source[0]]
    corpus = build_corpus(wanted)
    assert sys.version_info >= (3, 11)
    assert corpus.characters > 100_000
    assert any("statement" in document.text for document in corpus.documents)
