"""The conversation before a question: read from a file, and shown with what a decision took from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from coe.cli.output import stdout_console

if TYPE_CHECKING:
    from routers.base import Message

MOST_BYTES = 4 * 2**20
"""Most bytes of the file."""
SHOWN_CHARACTERS = 60
"""Most characters of a turn that are printed."""


def history(path: Path | None) -> tuple[Message, ...]:
    """The messages of a JSON file, a list of objects with `role` and `content`; none without a file.

    Raises:
        typer.BadParameter: the file is missing, larger than `serve.max_body_bytes` allows, or holds something else.
    """
    from routers.outcomes.conversations import MOST_MESSAGES, ROLES, conversation_of

    if path is None:
        return ()
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        found = conversation_of(data.decode("utf-8-sig")) if len(data) <= MOST_BYTES else None
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}", param_hint="--history") from error
    if found is None:
        raise typer.BadParameter(
            f"{path} must be a JSON list of 1 to {MOST_MESSAGES} messages with `role` ({', '.join(ROLES)}) and "
            f"`content`, both text, of at most {MOST_BYTES // 2**20} MiB; {_problem(data)}",
            param_hint="--history",
        )
    return found


def _problem(data: bytes) -> str:
    """What is wrong with the bytes of a file that holds no conversation."""
    from routers.outcomes.conversations import conversation_of

    if len(data) > MOST_BYTES:
        return "it is larger"
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return f"it is not valid JSON: {error}"
    except (ValueError, RecursionError):
        return "it is not valid JSON"
    if not isinstance(found, list):
        return "it is not a list"
    bad = (i for i, message in enumerate(found) if conversation_of([message]) is None)
    position = next(bad, None)
    return f"it has {len(found)} messages" if position is None else f"message {position} (from 0) is not one"


def print_conversation(read: Mapping[str, Any], messages: Sequence[Message]) -> None:
    """Print the user turns that were read with their weights, and the price of leaving the previous expert."""
    out = stdout_console()
    for turn in read["turns"]:
        text = " ".join(messages[turn["message"]].content[: 4 * SHOWN_CHARACTERS].split())
        shown = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
        alone = f"stands alone {turn['alone']:.0%}"
        out.print(f"{'turn weight':>19}: {turn['weight']:.3f}, {alone}: {shown}", markup=False, highlight=False)
    if read["previous"] is not None:
        out.print(f"{'previous expert':>19}: {read['previous']}; {switch_text(read)}", markup=False, highlight=False)


def switch_text(read: Mapping[str, Any]) -> str:
    """What another expert than that of the previous turns loses: tokens to prefill, and utility."""
    most = max((price for name, price in read["switch_price"].items() if name != read["previous"]), default=0.0)
    return f"{read['prefill_tokens']:,} tokens to prefill elsewhere, which costs up to {most:.4f} of utility"
