"""How models write tool calls and reasoning, where their checkpoint has no response template of its own.

To add a format, add it to CALLS or REASONING: its fields are those of a response template of transformers
(https://huggingface.co/docs/transformers/chat_response_parsing), its marks are texts of the chat templates that use it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

CONTENT: Final = "content"
THINKING: Final = "thinking"
TOOL_CALLS: Final = "tool_calls"


@dataclass(frozen=True, slots=True)
class CallText:
    """The text around the arguments of a call; `{name}` stands for the tool.

    separator: text between two calls; `None` if an answer has only one.
    """

    before: str
    after: str = ""
    separator: str | None = None

    def of(self, name: str) -> tuple[str, str]:
        """The text before and after the arguments of a call of this tool."""
        return self.before.replace("{name}", name), self.after


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write tool calls or reasoning.

    Attributes:
        marks: texts that a chat template of this format contains, all of them.
        fields: of a response template, named by what they hold: `content`, `thinking`, `tool_calls`, or one of these
            with a suffix.
        call: how to begin and end a call that the request demands; `None` if its arguments are no JSON.
    """

    name: str
    marks: tuple[str, ...]
    fields: Mapping[str, Mapping[str, Any]]
    call: CallText | None = None


def _tagged(opening: str, closing: str) -> Format:
    """Reasoning between two tags. A tag in quotes or backticks is part of the answer."""
    pattern = rf"""(?<![`"']){re.escape(opening)}"""
    return Format(opening, (closing,), {THINKING: {"open_pattern": pattern, "close": closing}})


_MISTRAL: Final = {
    TOOL_CALLS: {
        "open": "[TOOL_CALLS]",
        "close_pattern": r"(?=\[TOOL_CALLS\])",
        "repeats": True,
        "content": "json",
    },
    f"{TOOL_CALLS}_by_name": {
        "open_pattern": r"\[TOOL_CALLS\](?P<name>[\w.-]{1,256})(?:\[CALL_ID\]\w{1,64})?\[ARGS\]",
        "close_pattern": r"(?=\[TOOL_CALLS\])",
        "repeats": True,
        "content": "json",
        "transform": {"name": "{name}", "arguments": "{content}"},
    },
}
_JSON: Final = {TOOL_CALLS: {"open_pattern": r"\A\s{0,8}(?:<\|python_tag\|>\s{0,8})?(?=\{)", "content": "json"}}

CALLS: Final = (
    # gpt-oss: text is in the channel "final"; reasoning and calls are in others.
    Format(
        "harmony",
        ("<|channel|>", "<|message|>", "analysis"),
        {
            THINKING: {
                "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>",
                "close": "<|end|>",
                "repeats": True,
            },
            TOOL_CALLS: {
                "open_pattern": r"(?:<\|start\|>assistant)?(?: to=functions\.(?P<name>[\w.-]{1,256}))?"
                r"<\|channel\|>(?:analysis|commentary)(?: to=functions\.(?P<name>[\w.-]{1,256}))? {0,2}"
                r"(?:<\|constrain\|>\w{1,40})?<\|message\|>",
                "close": "<|call|>",
                "repeats": True,
                "content": "json",
                "transform": {"name": "{name}", "arguments": "{content}"},
            },
            CONTENT: {
                "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary) {0,2}"
                r"(?:<\|constrain\|>\w{1,40})?<\|message\|>",
                "close": ["<|return|>", "<|end|>"],
                "repeats": True,
            },
            f"{CONTENT}_bare": {},
        },
        CallText("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"),
    ),
    # Qwen3-Coder, Qwen3.5: <tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>
    Format(
        "qwen-xml",
        ("<tool_call>", "<function=", "<parameter="),
        {
            TOOL_CALLS: {
                "open_pattern": r"<tool_call>\s{0,8}<function=(?P<name>[^>\n]{1,256})>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]{1,256})>\n?(?P<value>.*?)\n?</parameter>"},
                "transform": {"name": "{name}", "arguments": "{content}"},
            }
        },
    ),
    # Hermes, Qwen2.5, Qwen3, SmolLM3: <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    Format(
        "hermes",
        ("<tool_call>",),
        {TOOL_CALLS: {"open": "<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json"}},
        CallText('<tool_call>\n{"name": "{name}", "arguments": ', "}\n</tool_call>", "\n"),
    ),
    # Mistral since v11: [TOOL_CALLS]NAME[ARGS]{...}
    Format("mistral", ("[TOOL_CALLS]", "[ARGS]"), _MISTRAL, CallText("[TOOL_CALLS]{name}[ARGS]", "", "")),
    # Mistral before: [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]
    Format(
        "mistral", ("[TOOL_CALLS]",), _MISTRAL, CallText('[TOOL_CALLS] [{"name": "{name}", "arguments": ', "}]", "")
    ),
    # Llama 3.1 to 3.3: the whole answer is {"name": ..., "parameters": {...}}
    Format(
        "llama3",
        ("<|start_header_id|>", '"parameters"'),
        _JSON,
        CallText('{"name": "{name}", "parameters": ', "}", "; "),
    ),
)
"""Formats of tool calls; the first whose marks a chat template contains is used."""

PLAIN_CALL: Final = Format("json", (), _JSON, CallText('{"name": "{name}", "arguments": ', "}"))
"""A call that the request demands of a model without a format of its own, or with one that cannot be demanded."""

REASONING: Final = (
    _tagged("<think>", "</think>"),
    _tagged("[THINK]", "[/THINK]"),
    _tagged("<seed:think>", "</seed:think>"),
    _tagged("<|START_THINKING|>", "<|END_THINKING|>"),
    _tagged("◁think▷", "◁/think▷"),
)
"""Formats of reasoning."""


def calls_of(chat_template: str) -> Format | None:
    """The format in which a model with this chat template calls tools."""
    return next((each for each in CALLS if all(mark in chat_template for mark in each.marks)), None)


def detected(chat_template: str) -> dict[str, Any] | None:
    """The response template of a model with this chat template; None if it neither reasons nor calls tools."""
    calls = calls_of(chat_template)
    fields = dict(calls.fields) if calls else {}
    if THINKING not in fields:
        found = next((each for each in REASONING if all(mark in chat_template for mark in each.marks)), None)
        fields |= found.fields if found else {}
    if not fields:
        return None
    return response_template(fields)


def response_template(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A response template with these fields, and one of text."""
    return {"start_anchor_pattern": r"\A", "fields": {CONTENT: {}, **fields}}
