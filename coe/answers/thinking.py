"""Thinking text: what a model writes for itself before its answer, in the forms of the common chat templates."""

from __future__ import annotations

import re
from typing import Final

_NAMES = r"(?:seed:)?think(?:ing)?|thoughts?|reasoning|scratchpad"
_MARK: Final = re.compile(
    rf"""(?<![`"'])(?:
        (?P<open><(?:{_NAMES})>|\[THINK\]|◁think▷|<\|START_THINKING\|>|<\|begin_of_thought\|>
            |<\|channel>thought\b)
        |(?P<close></(?:{_NAMES})>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>|<\|end_of_thought\|>|<channel\|>)
        |(?P<channel><\|channel\|>[ ]?(?P<name>[a-z]{{1,20}})[^<]{{0,80}}(?:<\|constrain\|>[^<]{{0,40}})?<\|message\|>)
        |(?P<end><\|(?:end|return|call)\|>(?:[ ]?<\|start\|>[^<]{{0,80}})?|<\|start\|>[^<]{{0,80}}(?=<\|channel\|>))
        |(?P<answer><\|(?:START|END)_RESPONSE\|>|<\|(?:begin|end)_of_solution\|>)
    )""",
    re.VERBOSE | re.IGNORECASE,
)
"""Tags of thinking; and the channels of the harmony format, of which `final` is the answer."""
_BARE_HARMONY: Final = ("analysis", "assistantfinal")
"""What is left of a harmony answer whose special tokens were removed: `analysis...assistantfinal...`."""
_SIGNS: Final = ("<", "[", "◁")
"""A text without them has no tag."""
_FINAL: Final = "final"


def without_thoughts(text: str) -> str:
    """The answer in a text: without thinking, closed or cut off, and without blanks around it.

    A closing tag whose opening one was in the prompt ends thinking that began with the text. Tags in quotes or
    backticks are part of the answer.
    """
    bare, cut = _BARE_HARMONY
    if text.startswith(bare) and cut in text:
        return text.rpartition(cut)[2].strip()
    if not any(sign in text for sign in _SIGNS):
        return text.strip()
    kept: list[str] = []
    position, thinking = 0, False
    for mark in _MARK.finditer(text):
        if not thinking:
            kept.append(text[position : mark.start()])
        position = mark.end()
        match mark.lastgroup:
            case "open":
                thinking = True
            case "close":
                if not thinking:
                    kept.clear()
                thinking = False
            case "channel" | "name":
                thinking = mark["name"].lower() != _FINAL
            case "end":
                thinking = False
    if not thinking:
        kept.append(text[position:])
    return "".join(kept).strip()
