"""The letter of the option that a text names: `B`, `(b)`, `The answer is B`, `Option A is wrong, so B`, `答案是B。`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from coe.answers import phrases
from coe.answers.phrases import WINDOW
from coe.answers.text import fold, spaced

MAX_MENTIONS: Final = 400
"""Letters that are read, the last ones of a text; each takes some ten microseconds."""
_COMMAND: Final = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\s?\{([^{}]*)\}")
_NESTED: Final = 4
_MARKUP: Final = re.compile(r"[*_`$]")
_LEADS: Final = re.compile(r"\s*[)\].:]|\s*\Z|\s+[-–—]\s")
_WORD: Final = re.compile(r"\w")
_ENDS: Final = re.compile(r"[)\]]?(?:\s*\Z|\s*[)\],;:!?。、\n]|\.(?!\s*[a-z])|\s+[-–—(]|\s+[^\x00-\x7f])")
"""What may follow a letter that stands for itself, beside the words of `phrases.FOLLOWS`."""
_HEDGED: Final = "?"


@dataclass(frozen=True, slots=True)
class _Mention:
    """A letter in a text. `marked`: in brackets, or called an option. `lower`: a lower-case letter that ends a line."""

    letter: str
    start: int
    end: int
    marked: bool
    lower: bool


def letter_in(answer: str, letters: str, choices: Sequence[str] = ()) -> str | None:
    """The letter of the option that the answer names; None if it names none or several.

    What the text states as its answer counts first, then an option that it confirms, a leading letter, a last line that
    is a letter, and the only letter in the text. Letters that the text rules out do not count.
    """
    text = _prepared(answer)
    for choice, letter in zip(choices, letters, strict=False):
        if text.casefold().rstrip(".。") == _prepared(str(choice)).casefold().rstrip(".。"):
            return letter
    alone = text.strip("()[]{}<>\"'.,:;!?。、-– \n\t")
    if len(alone) == 1 and alone.upper() in letters:
        return alone.upper()
    reading = _Reading(text, letters)
    for named in (reading.stated(), reading.confirmed(), reading.leading(), reading.last_line()):
        if named is not None:
            return None if named == _HEDGED else named
    return reading.only_one()


def named_option(answer: str, letters: str) -> str | None:
    """The letter that the answer states, confirms or begins with; None for a text that is about something else.

    Stricter than `letter_in`: `The answer is C major` names no option.
    """
    reading = _Reading(_prepared(answer), letters, strict=True)
    named = reading.stated() or reading.confirmed() or reading.leading()
    return None if named == _HEDGED else named


def _prepared(text: str) -> str:
    """The folded text without LaTeX commands and markup."""
    text = spaced(fold(text))
    for _ in range(_NESTED):
        unwrapped = _COMMAND.sub(r"\1", text)
        if unwrapped == text:
            break
        text = unwrapped
    return _MARKUP.sub("", text).strip()


@lru_cache(maxsize=64)
def _letter_pattern(letters: str) -> re.Pattern[str]:
    upper, lower = re.escape(letters), re.escape(letters.lower())
    return re.compile(
        rf"""(?<![\w'’.+/-])(?:[(\[]\s?(?P<bracketed>[{upper}{lower}])\s?[)\]]|(?P<upper>[{upper}])
            |(?P<lower>[{lower}])(?=[^\w\n]*+(?:\n|\Z)))(?![\w'’+\#]|-\w|\.\w)""",
        re.VERBOSE,
    )


class _Reading:
    """The mentions of letters in a prepared text, in groups that are named together ("A, B or C")."""

    def __init__(self, text: str, letters: str, *, strict: bool = False) -> None:
        self._text, self._strict = text, strict
        found = list(_letter_pattern(letters).finditer(text))
        mentions = [self._mention(match) for match in found[-MAX_MENTIONS:]]
        self._groups = list(self._grouped([mention for mention in mentions if mention is not None]))

    def stated(self) -> str | None:
        """The letter stated last as the answer; `?` if it is one of several."""
        for group in reversed(self._groups):
            before = self._before(group[0])
            if self._plain(group[0]) and phrases.STATED.search(before) and not phrases.DOUBTED.search(before):
                named = self._left(group)
                if named:
                    return named.pop() if len(named) == 1 else _HEDGED
        return None

    def confirmed(self) -> str | None:
        """The only letter that is confirmed ("B is correct", "it must be B"); `?` if several are."""
        named: set[str] = set()
        for group in self._groups:
            suggested = self._free(group[0]) and phrases.SUGGESTED.search(self._before(group[0]))
            sure = not group[-1].lower and phrases.CONFIRMED.match(self._after(group[-1]))
            if (suggested or sure) and not phrases.DOUBTED.search(self._before(group[0])):
                whole = suggested or phrases.SEVERAL.match(self._after(group[-1])) or len(group) == 1
                named |= self._left(group if whole else group[-1:])
        if not named:
            return None
        return named.pop() if len(named) == 1 else _HEDGED

    def leading(self) -> str | None:
        """The letter that the text begins with, as `B)` or `B:`; `?` if several do."""
        first = self._groups[0][0] if self._groups else None
        if first is None or first.lower or _WORD.search(self._text, 0, first.start):
            return None
        after = self._after(first)
        leads = _LEADS.match(after) or self._text[first.end - 1] in ")]" or len(self._groups[0]) > 1
        if self._strict:
            leads = self._plain(first) and not first.lower
        named = self._left(self._groups[0]) if leads else set()
        if not named:
            return None
        return named.pop() if len(named) == 1 else _HEDGED

    def last_line(self) -> str | None:
        """The letter that is the last line."""
        last = self._groups[-1][-1] if self._groups else None
        if last is None or last.lower or _WORD.search(self._text, last.end):
            return None
        line = self._text.rfind("\n", 0, last.start) + 1
        return None if _WORD.search(self._text, line, last.start) else last.letter

    def only_one(self) -> str | None:
        """The only letter that is marked as an option, else the only one that stands alone."""
        free = [[m for m in group if not m.lower and (m.marked or self._free(m))] for group in self._groups]
        named = [(m, m.letter in self._left(group)) for group in free if group for m in group]
        for candidates in (
            {m.letter for m, left in named if left and m.marked},
            {m.letter for m, left in named if left},
        ):
            if candidates:
                return candidates.pop() if len(candidates) == 1 else None
        return None

    def _mention(self, match: re.Match[str]) -> _Mention | None:
        kind = match.lastgroup or ""
        start, end = match.span()
        marked = kind == "bracketed" or phrases.MARKED.search(self._text[max(0, start - WINDOW) : start]) is not None
        mention = _Mention(match[kind].upper(), start, end, marked, kind == "lower" and not marked)
        pronoun = kind == "upper" and mention.letter == "I" and not marked and not self._free(mention)
        return None if pronoun else mention

    def _grouped(self, mentions: Sequence[_Mention]) -> Iterator[list[_Mention]]:
        """Groups of mentions that are joined; a comma joins only in a list that ends with a conjunction."""
        group: list[_Mention] = []
        commas = 0
        for mention in mentions:
            joined = None
            if group and mention.start - group[-1].end < WINDOW:
                joined = phrases.JOIN.fullmatch(self._text[group[-1].end : mention.start] or " ")
            if joined is None and group:
                yield from self._parts(group, commas)
                group, commas = [], 0
            group.append(mention)
            commas = commas + 1 if joined and joined["comma"] else 0
        if group:
            yield from self._parts(group, commas)

    @staticmethod
    def _parts(group: list[_Mention], commas: int) -> Iterator[list[_Mention]]:
        """The group, without those at its end that only commas join."""
        whole = len(group) - commas
        yield group[:whole] if whole else group[:1]
        yield from ([one] for one in group[max(whole, 1) :])

    def _left(self, group: Sequence[_Mention]) -> set[str]:
        """The letters of a group that the text does not rule out."""
        if not group or phrases.RULED_OUT.search(self._before(group[0])):
            return set()
        letters = {mention.letter for mention in group}
        after = self._after(group[-1])
        if phrases.DENIED.match(after):
            return set() if len(group) == 1 or phrases.SEVERAL.match(after) else letters - {group[-1].letter}
        return letters

    def _before(self, mention: _Mention) -> str:
        return self._text[max(0, mention.start - WINDOW) : mention.start]

    def _after(self, mention: _Mention) -> str:
        return self._text[mention.end : mention.end + WINDOW]

    def _free(self, mention: _Mention) -> bool:
        """Whether the letter is a name: not the English words A and I."""
        if mention.letter not in "AI" or mention.marked:
            return True
        after = self._after(mention)
        if mention.letter == "I" and after.startswith(","):
            return bool(phrases.FOLLOWS_I.match(after[1:].lstrip()))
        if not after.startswith(" ") or not after.lstrip()[:1].isascii() or not after.lstrip()[:1].isalpha():
            return True
        follows = phrases.FOLLOWS_I if mention.letter == "I" else phrases.FOLLOWS
        return bool(follows.match(after.lstrip()))

    def _plain(self, mention: _Mention) -> bool:
        """Whether the letter may be an option here: always, or under `strict` if no name follows ("C major")."""
        if not self._strict or mention.marked:
            return True
        after = self._after(mention)
        return bool(_ENDS.match(after) or (after.startswith(" ") and phrases.FOLLOWS.match(after.lstrip())))
