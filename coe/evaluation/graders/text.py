"""Graders of plain text: the same string, or a string that contains the right one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coe.answers.text import ENDS, contains_words, fold, without_arabic_marks
from coe.evaluation.graders.base import GraderModel, gold_texts


class TextGrader(GraderModel):
    """Base of the graders that compare normalised texts. Unicode forms never matter: é and e + accent, full-width and
    ASCII, digits of other scripts, marks of writing direction, Arabic vowel signs.

    ignore_case: `Paris` equals `PARIS`. ignore_whitespace: runs of white space are one blank, and none at the ends.
    strip: trailing characters to ignore.
    """

    ignore_case: bool = True
    ignore_whitespace: bool = True
    strip: str = ENDS

    def normal(self, text: str) -> str:
        """The normal form of a text."""
        text = without_arabic_marks(fold(text))
        if self.ignore_whitespace:
            text = " ".join(text.split())
        text = text.rstrip(self.strip).rstrip() if self.ignore_whitespace else text.rstrip(self.strip)
        return text.casefold() if self.ignore_case else text


class Exact(TextGrader):
    """1 when the answer is the right text, or one of several, after normalisation."""

    def grade(self, answer: str, row: Mapping[str, Any]) -> float:
        """See `Grader.grade`."""
        right = {self.normal(gold) for gold in gold_texts(row)}
        return float(self.normal(self.read(answer)) in right)


class Contains(TextGrader):
    """1 when the answer contains the right text, or one of several, as whole words: "It is Paris, I think".

    In Chinese, Japanese and Thai, which write no blanks between words, the right text may stand anywhere.
    """

    def grade(self, answer: str, row: Mapping[str, Any]) -> float:
        """See `Grader.grade`."""
        right, answered = [self.normal(gold) for gold in gold_texts(row)], self.normal(self.read(answer))
        return float(any(contains_words(answered, gold) for gold in right if gold))
