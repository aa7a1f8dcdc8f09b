"""Where sentences end: rules for English prose, good enough to say which came first."""

from __future__ import annotations

import re

# A full stop after one of these ends no sentence.
_SHORT = (
    "mr mrs ms dr prof rev fr sr jr st mt ft gen col maj capt lt sgt cpl adm cmdr gov sen rep hon "
    "pres vs etc al cf ca approx nos vol vols pp fig figs eq eqs ch sec ed eds est dept univ "
    "assn bros inc ltd co corp op e.g i.e u.s u.k u.n a.m p.m d.c ph.d b.a m.a m.d b.c a.d jan feb "
    "apr jun jul aug sep sept oct nov dec mon tue wed thu fri"
)
_ABBREVIATIONS = frozenset(_SHORT.split())
_WORDS_TOO = frozenset(["no", "mar", "sat", "sun"])  # abbreviations before a number only
# Only from a run's first mark: of a million dots each would else be tried. Looking behind after the
# mark, not before it, keeps the search for marks fast.
_ENDS = re.compile(r"""[.!?…](?<![.!?…]{2})[.!?…]*["'”’»)\]]*(?=\s)""")
_PART = re.compile(r"\S.{0,399}(?!\S)|\S{400}")
_OPENS = re.compile(r"""\s*["'“‘«(\[]*(\S)""")
_WORD_BEFORE = re.compile(r"(\S+)$")


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, without the blanks between them; a new line ends one.
    What is longer than 400 characters is cut at a blank: text without full stops has no other
    ends, and would else be one sentence of which little is used.

    A full stop ends a sentence where blanks follow it and then no small letter, except after an
    abbreviation, a single letter ("J. R. Smith", "d. 1849") or the number of an enumeration
    ("1. First").
    """
    found = []
    for line in text.split("\n"):
        begin = 0
        for match in _ENDS.finditer(line):
            if _ends(line, begin, match):
                found.append(line[begin : match.end()].strip())
                begin = match.end()
        found.append(line[begin:].strip())
    return [part for sentence in found for part in _parts(sentence)]


def _parts(sentence: str) -> list[str]:
    return [part.strip() for part in _PART.findall(sentence)]


def _ends(line: str, begin: int, match: re.Match[str]) -> bool:
    following = _OPENS.match(line, match.end())
    if following is None:
        return False
    if following[1].islower():
        return False
    if match[0][0] != "." or len(match[0]) > 1:
        return True
    # Only the end of what came before is looked at: a long line stays linear.
    word = _WORD_BEFORE.search(line, max(begin, match.start() - 20), match.start())
    if word is None:
        return False
    bare = word[1].lstrip("\"'“‘«([").lower()
    if bare in _ABBREVIATIONS:
        return False
    if bare in _WORDS_TOO:
        return not following[1].isdigit()
    initial = len(bare) == 1 and bare.isalpha()  # small ones too: "(d. 1849)", "Roe v. Wade"
    number = bare.isdigit() and not line[begin : word.start()].strip()
    return not (initial or number)
