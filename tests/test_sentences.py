"""`sentences`: where rules say that English sentences end."""

import random

import pytest

from albert_task import sentences


def parted(text):
    """The sentences of a text whose ends are marked by ` | `."""
    expected = text.split(" | ")
    assert sentences(" ".join(expected)) == expected
    return len(expected)


@pytest.mark.parametrize(
    "text",
    [
        "It rained. | We stayed in. | Nobody called!",
        "Who was it? | A fox! | “Indeed…” | And then… | Silence.",
        "What?! | No... | Well. | 25 of them came. | Ärger folgte.",
        "One sentence without an end",
    ],
)
def test_ends_are_marks_that_blanks_and_no_small_letter_follow(text):
    parted(text)


@pytest.mark.parametrize(
    "text",
    [
        "Mr. Jones met Dr. and Mrs. Smith of St. Louis. | They left.",
        "The U.S. Navy sailed on Jan. 5 with Lt. Gen. Grant et al. aboard. | It sank.",
        "See figs. 3 and 4, e.g. Paris (cf. Rome, pp. 5-9, vol. 2). | Then turn.",
        "Some (e.g. Bach) wrote fugues. | “Mr. Holmes” did not.",
        "MR. JONES SHOUTED. | NOBODY HEARD.",
    ],
)
def test_abbreviations_end_no_sentence(text):
    parted(text)


@pytest.mark.parametrize(
    "text",
    [
        "J. R. R. Tolkien met C. S. Lewis. | They wrote.",
        "George W. Bush won. | (J. Smith did not.) | “A. Leaf” came third.",
        "É. Zola wrote it. | Д. Менделеев did not.",
    ],
)
def test_initials_end_no_sentence(text):
    parted(text)


def test_single_small_letters_end_no_sentence():
    parted("Hume (b. 1711, d. 1776) came in c. 1740. | So said Roe v. Wade (p. 5). | It held.")


def test_words_that_are_abbreviations_before_numbers_only():
    parted("He said no. | She sat in the sun. | Then came No. 5 on Sat. 3 Mar. 1990. | It left.")


def test_numbers():
    parted("Pi is 3.14159, and .5 is a half. | It cost $4.50. | In 2008. | Version 1.2.3 came.")
    parted("1. First comes this. | 2. Then that. | It ended in 1999. | Nobody knew.")


def test_names_with_marks_inside_are_left_whole():
    parted("Visit example.org/a?b=c! | Then read README.md. | Yahoo!Inc was one word.")


def test_what_goes_on_in_small_letters_goes_on():
    parted("“Stop!” he cried. | “Why?” asked the fox… and ran. | He waited... then left.")
    parted("The show (“Who?”) began. | It had no end.")


@pytest.mark.parametrize("close", ['"', "'", "”", "’", "»", ")", "]", '")', "”)"])
def test_closing_marks_belong_to_the_sentence_before(close):
    assert sentences(f"It was over.{close} Then it began.") == [
        f"It was over.{close}",
        "Then it began.",
    ]


@pytest.mark.parametrize("opening", ['"', "'", "“", "‘", "«", "(", "[", '("'])
def test_opening_marks_belong_to_the_sentence_after(opening):
    parted(f"It was over. | {opening}Then it began.")
    assert len(sentences(f"It was over. {opening}then it began.")) == 1


def test_what_has_no_ends_is_cut_at_blanks():
    text = " ".join(f"word{n}" for n in range(1000))
    parts = sentences(text)
    assert " ".join(parts) == text
    assert all(300 < len(part) <= 400 for part in parts[:-1])
    assert [len(part) for part in sentences("x" * 900)] == [400, 400, 100]
    long = "a " * 199 + "b."
    assert sentences(f"{long} Then.") == [long, "Then."]


def test_lines_end_sentences_and_blanks_are_dropped():
    assert sentences("A title\n\n  It begins.   It\tends.  \r\nMr.\nJones") == [
        "A title",
        "It begins.",
        "It\tends.",
        "Mr.",
        "Jones",
    ]
    assert sentences("Eins.\u00a0Zwei.\u2003Drei.") == ["Eins.", "Zwei.", "Drei."]


@pytest.mark.parametrize("text", ["", " ", "\n\n", " \t\n \r\n"])
def test_no_text_has_no_sentences(text):
    assert sentences(text) == []


def test_nothing_is_lost_and_a_sentence_is_one_sentence():
    """Held for text that is drawn to have all that the rules know beside one another."""
    parts = [
        *"aZé1.!?…\"'“”‘’«»()[]- \n\t", " ", " ", ". ", "Mr.", "e.g.", " J. ", "12.", "word", "Name"
    ]  # fmt: skip
    draw = random.Random(0)
    several = 0
    for _ in range(3000):
        text = "".join(draw.choices(parts, k=draw.randrange(40)))
        found = sentences(text)
        several += len(found) > 2
        assert "".join("".join(found).split()) == "".join(text.split())
        for sentence in found:
            assert sentence == sentence.strip() != ""
            assert sentences(sentence) == [sentence]
        assert found == [one for line in text.split("\n") for one in sentences(line)]
    assert several > 500


@pytest.mark.parametrize(
    ("piece", "tail", "count"),
    [
        (".", "x", 1251),
        ("?!", "x", 1251),
        ('."', "x", 1251),
        (". ", "x", 1251),
        ("A. ", "x", 1254),
        ("Mr. ", "x", 1251),
        ("a", ". B", 1252),
        (" ", "so. B", 2),
        ('"', ". B", 1252),
        ("Ab. ", "c", 125_000),
    ],
)
def test_half_a_million_characters_of_one_kind(piece, tail, count):
    """Were time the square of the length, one of these would take half an hour."""
    text = piece * (500_000 // len(piece)) + tail
    found = sentences(text)
    assert len(found) == count
    assert sum(map(len, found)) + count > len(text.strip())
