"""Tool calls of an answer, from the pieces that endpoints send.

OpenAI sends a call in pieces with an `index`; id and name are in the first one, the arguments are text. Other servers
send no index, index 0 for every call, an id in each piece (the same, or a fresh one), names that are null or repeated,
whole calls, arguments as an object, or arguments again at the end. A piece starts a new call if it has a name, and an
index or an id that is not that of the last call, or if the last call is already complete.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import uuid4

from coe.engines.remote.events import MalformedStream
from coe.engines.remote.surrogates import Surrogates
from coe.types import ToolCallDelta

MOST_CALLS: Final = 128
"""Most tool calls of one answer; OpenAI allows as many tools."""
_MOST_NAME: Final = 256
"""Most characters of a call's id, and of its name."""


@dataclass(eq=False, slots=True)
class _Call:
    """A call as far as it is read. stated: the endpoint's index. shown: id and name have been passed on."""

    position: int
    stated: int | None
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)
    n_characters: int = 0
    surrogates: Surrogates = field(default_factory=Surrogates)
    shown: bool = False

    def repeats(self, arguments: str) -> bool:
        """Whether these arguments are those that it has, which are complete."""
        same = len(arguments) == self.n_characters and arguments == "".join(self.arguments)
        return same and self.is_complete

    @property
    def is_complete(self) -> bool:
        """Whether its arguments are a JSON object."""
        try:
            return isinstance(json.loads("".join(self.arguments)), dict)
        except (ValueError, RecursionError):
            return False


class Calls:
    """The tool calls of one answer.

    Args:
        offered: names of the tools that the request offers.
        most_characters: of the arguments of all calls.
    """

    def __init__(self, offered: Collection[str], most_characters: int) -> None:
        self._offered = frozenset(offered)
        self._room = most_characters
        self._calls: list[_Call] = []
        self._ready: list[ToolCallDelta] = []

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, pieces: list[Any]) -> bool:
        """Add the pieces of an event; returns False if the arguments have reached their limit, and are cut.

        Raises:
            MalformedStream: a piece is no call, there are too many calls, or one is of a tool that is not offered.
        """
        seen: list[_Call] = []  # by this event: it has no two pieces of one call
        return all(self._add(piece, seen) for piece in pieces if piece is not None)

    def take(self) -> tuple[ToolCallDelta, ...]:
        """The pieces that are complete enough to be passed on."""
        ready, self._ready = self._ready, []
        return tuple(ready)

    @property
    def has_pieces(self) -> bool:
        """Whether there is something to take."""
        return bool(self._ready)

    @property
    def text(self) -> str:
        """The names and arguments of all calls, of which their tokens are estimated."""
        return " ".join(part for call in self._calls for part in (call.name, "".join(call.arguments)))

    def end(self, *, cut: bool) -> None:
        """No pieces follow.

        Args:
            cut: a limit of tokens has ended the answer: a call without its arguments is left out.

        Raises:
            MalformedStream: a call has no name, or that of a tool that is not offered.
        """
        if cut and self._calls and not self._calls[-1].shown:
            self._calls.pop()
        for call in self._calls:
            self._show(call)
            self._pass_on(call, call.surrogates.end())

    def _add(self, piece: Any, seen: list[_Call]) -> bool:
        if not isinstance(piece, dict):
            raise MalformedStream(f"a tool call is a {type(piece).__name__}")
        function = piece.get("function")
        if not isinstance(function, dict):
            function = piece
        name, call_id, arguments = _text(function.get("name")), _text(piece.get("id")), _json(function.get("arguments"))
        call = self._call_of(piece.get("index"), call_id)
        if call is None or (name and (call in seen or self._starts(call, call_id, name, arguments))):
            call = self._new(piece.get("index"))
        seen.append(call)
        call.id = call.id or call_id
        if not call.shown and name != call.name:
            call.name += name
        return self._add_arguments(call, arguments)

    def _call_of(self, index: Any, call_id: str) -> _Call | None:
        """The call that a piece seems to belong to."""
        with_index = [call for call in self._calls if type(index) is int and call.stated == index]
        with_id = [call for call in self._calls if call_id and call.id == call_id]
        if found := with_id or with_index:
            return found[-1]
        last = self._calls[-1] if self._calls else None
        return None if last is None or (type(index) is int and last.stated is not None) else last

    def _starts(self, call: _Call, call_id: str, name: str, arguments: str) -> bool:
        """Whether a piece with a name starts a call beside the one that it seems to belong to."""
        other_id = bool(call_id and call.id and call_id != call.id)
        if not call.name or (call_id and not other_id and call.id):
            return False
        if name != call.name:
            return bool(call.arguments) or other_id or not self._may_continue(call.name + name)
        return call.is_complete and (other_id or bool(arguments and not call.repeats(arguments)))

    def _may_continue(self, name: str) -> bool:
        return any(each.startswith(name) for each in self._offered)

    def _new(self, index: Any) -> _Call:
        if self._calls:
            self._show(self._calls[-1])
        if len(self._calls) == MOST_CALLS:
            raise MalformedStream(f"it has more than {MOST_CALLS} tool calls")
        self._calls.append(_Call(len(self._calls), index if type(index) is int else None))
        return self._calls[-1]

    def _add_arguments(self, call: _Call, text: str) -> bool:
        if not text or call.repeats(text):
            return True
        self._show(call)
        text, cut = text[: self._room], len(text) > self._room
        self._room -= len(text)
        call.arguments.append(text)
        call.n_characters += len(text)
        self._pass_on(call, call.surrogates.joined(text))
        return not cut

    def _show(self, call: _Call) -> None:
        """Pass on the id and the name of a call, once."""
        if call.shown:
            return
        if not call.name:
            raise MalformedStream("a tool call has no name")
        if call.name not in self._offered:
            raise MalformedStream(f"it calls the tool {call.name!r:.80}, which the request does not offer")
        call.shown = True
        call.id = call.id or f"call_{uuid4().hex[:24]}"
        self._ready.append(ToolCallDelta(call.position, call.id, call.name))

    def _pass_on(self, call: _Call, arguments: str) -> None:
        if arguments:
            self._ready.append(ToolCallDelta(call.position, arguments=arguments))


def _text(value: Any) -> str:
    """An id or a name: text, at times a number, or null."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int) or len(text := str(value)) > _MOST_NAME:
        raise MalformedStream("the id or the name of a tool call is none")
    return text.encode("utf-8", "replace").decode()


def _json(arguments: Any) -> str:
    """Arguments as text: some servers send the object."""
    if arguments is None or isinstance(arguments, str):
        return arguments or ""
    try:
        return json.dumps(arguments, ensure_ascii=False)
    except RecursionError:
        raise MalformedStream("the arguments of a tool call are nested too deeply") from None
