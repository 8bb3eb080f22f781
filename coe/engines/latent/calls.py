"""The calls of a staged composed expert: its peers for notes, then its first member with them. Pure functions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import regex  # type: ignore[import-untyped]

from coe.engines.latent.settings import MATCH, QUESTION, CallSettings, PeerQuestion
from coe.errors import EngineError, InvalidRequest
from coe.sampling import NO_OPTIONS
from coe.types import GenerateRequest, NotesWanted, PeerNotes
from registry.spec import ExpertSpec

MOST_NOTE_BYTES: Final = 64 * 2**20
"""Most bytes of the notes of one request; what a peer leaves beyond is left out."""
_SEARCH_S: Final = 0.2
"""Seconds that a pattern may search a message, which is text of a client."""


@dataclass(frozen=True, slots=True)
class PeerCall:
    """One call to a peer. span: characters [start, end) of the last user message that it is about; `None` is all."""

    peer: str
    request: GenerateRequest
    span: tuple[int, int] | None = None


def peer_calls(spec: ExpertSpec, request: GenerateRequest, peers: Collection[str] | None = None) -> list[PeerCall]:
    """The calls to the peers of a staged composed expert; they may run side by side, or one after the other.

    Args:
        peers: names of those to call; `None` calls all.

    Raises:
        InvalidRequest: the prompt is token ids, which only one tokenizer reads.
        ConfigError: the expert's settings are wrong.
        EngineError: a pattern of its `asks` takes too long on this message.
    """
    if request.prompt_ids:
        raise InvalidRequest(f"{spec.name!r} combines experts: token ids are of one expert's tokenizer; send text")
    settings = CallSettings.of(spec.settings, spec.name)
    asked = _peer_request(spec, request, settings)
    calls = []
    for peer in (name for name in spec.members[1:] if peers is None or name in peers):
        wanted = _wanted(spec, settings, peer)
        for text, span in _questions(spec, request, settings.asks.get(peer)):
            of_peer = asked if text is None else _with_question(asked, text)
            calls.append(PeerCall(peer, replace(of_peer, wants="latent", notes_wanted=wanted), span))
    return calls


def left_notes(calls: Sequence[PeerCall], values: Sequence[bytes | None]) -> tuple[PeerNotes, ...]:
    """The notes for the first member, in the order of the calls; peers that left none, or too many, are missing."""
    notes, n_bytes = [], 0
    for call, value in zip(calls, values, strict=True):
        if value is not None and n_bytes + len(value) <= MOST_NOTE_BYTES:
            n_bytes += len(value)
            notes.append(PeerNotes(call.peer, value, call.span))
    return tuple(notes)


def notes_digest(data: bytes) -> str:
    """A short digest of packed notes, for logs."""
    return f"sha256:{hashlib.sha256(data).hexdigest()[:12]}"


def _peer_request(spec: ExpertSpec, request: GenerateRequest, settings: CallSettings) -> GenerateRequest:
    """What every peer is asked: a plain, greedy answer. Formats, tools and scores are of the last answer alone."""
    return replace(
        request,
        max_tokens=settings.max_answer_tokens or (request.max_tokens if request.max_tokens != 0 else 1),  # 0: an echo
        temperature=0.0,
        top_p=1.0,
        seed=None,
        stop=(),
        stream=False,
        format="text",
        json_schema=None,
        tools=(),
        tool_choice="auto",
        tool_name=None,
        sampling=NO_OPTIONS,
        logprobs=None,
        prompt_logprobs=None,
        echo=False,
        notes=None,
        deadline_s=settings.peer_deadline_s or request.deadline_s,
    )


def _wanted(spec: ExpertSpec, settings: CallSettings, peer: str) -> NotesWanted:
    if spec.architecture == "cache":
        return NotesWanted("cache")
    return NotesWanted("states", settings.layers.get(peer, ()), settings.places, answer=settings.reads == "answer")


def _questions(
    spec: ExpertSpec, request: GenerateRequest, asked: PeerQuestion | None
) -> Iterator[tuple[str | None, tuple[int, int] | None]]:
    """The questions to a peer, each with the span that it is about; `None` is the request's own."""
    if asked is None:
        yield None, None
        return
    question = _question(request)
    if asked.pattern is None:
        yield _filled(asked.template, {QUESTION: question}), None
        return
    for text, span in _matches(spec, asked, question):
        yield _filled(asked.template, {QUESTION: question, MATCH: text}), span


def _filled(template: str, values: Mapping[str, str]) -> str:
    """The template with its placeholders replaced once: what is inserted may contain them, too."""
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found.group()], template)


def _matches(spec: ExpertSpec, asked: PeerQuestion, question: str) -> list[tuple[str, tuple[int, int]]]:
    assert asked.pattern is not None
    found: dict[str, tuple[int, int]] = {}
    try:
        for match in _compiled(asked.pattern).finditer(question, timeout=_SEARCH_S):
            if match.group():
                found.setdefault(match.group(), match.span())
            if len(found) >= asked.limit:
                break
    except TimeoutError:
        raise EngineError(
            f"a pattern in the settings of {spec.name!r} takes longer than {_SEARCH_S:g} s on this message: shorten "
            "the message, or the pattern"
        ) from None
    return list(found.items())


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern)


def _question(request: GenerateRequest) -> str:
    """The last user message, or the raw prompt."""
    if request.prompt is not None:
        return request.prompt
    return next((turn.content for turn in reversed(request.messages) if turn.role == "user"), "")


def _with_question(request: GenerateRequest, text: str) -> GenerateRequest:
    """The request with this text as its last user message."""
    if request.prompt is not None:
        return replace(request, prompt=text)
    turns = list(request.messages)
    last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=None)
    if last is None:
        return request
    turns[last] = replace(turns[last], content=text, parts=())
    return replace(request, messages=tuple(turns))
