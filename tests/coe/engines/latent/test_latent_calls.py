"""Which peers of a staged composed expert are asked what."""

from __future__ import annotations

from typing import Any

import pytest

from coe.engines.latent import calls
from coe.engines.latent.calls import PeerCall, left_notes, peer_calls
from coe.errors import ConfigError, EngineError
from coe.types import GenerateRequest, NotesWanted, PeerNotes
from registry.spec import ExpertSpec, Kind
from routers.base import Message


def composed(architecture: str = "notes", **settings: Any) -> ExpertSpec:
    return ExpertSpec(
        name="pair", kind=Kind.COMPOSED, members=("p", "q"), architecture=architecture, source="x", settings=settings
    )


def ask(text: str, spec: ExpertSpec, **fields: Any) -> list[PeerCall]:
    return peer_calls(spec, GenerateRequest(messages=(Message("system", "s"), Message("user", text)), **fields))


def test_a_peer_is_asked_the_request_itself_for_a_plain_greedy_answer() -> None:
    tools = ({"type": "function", "function": {"name": "f"}},)
    [call] = ask(
        "hello", composed(), temperature=1.5, tools=tools, logprobs=2, stop=("x",), max_tokens=9, deadline_s=7.0
    )
    asked = call.request
    assert call.peer == "q" and call.span is None and asked.messages[-1].content == "hello"
    assert (asked.temperature, asked.tools, asked.logprobs, asked.stop, asked.stream) == (0.0, (), None, (), False)
    assert (asked.max_tokens, asked.deadline_s, asked.wants) == (9, 7.0, "latent")


def test_settings_say_what_notes_are_of() -> None:
    [call] = ask(
        "x", composed(reads="prompt", places="all", layers={"q": [20, 30]}, peer_deadline_s=2, channel="ignored")
    )
    assert call.request.notes_wanted == NotesWanted("states", (20, 30), "all", answer=False)
    assert call.request.deadline_s == 2
    assert ask("x", composed("cache"))[0].request.notes_wanted == NotesWanted("cache")
    assert ask("x", composed(max_answer_tokens=4))[0].request.max_tokens == 4
    [echoed] = ask("x", composed(), max_tokens=0, echo=True)
    assert echoed.request.max_tokens == 1, "an echo of no tokens must not let peers write as many as fit"


def test_a_template_is_filled_once() -> None:
    [call] = ask("{match} {question}", composed(asks={"q": {"template": "Gloss: {question}"}}))
    assert call.request.messages[-1].content == "Gloss: {match} {question}"
    assert call.request.messages[0].content == "s"
    raw = peer_calls(composed(asks={"q": {"template": "<{question}>"}}), GenerateRequest(prompt="hm"))
    assert raw[0].request.prompt == "<hm>"


def test_a_pattern_makes_one_call_for_each_thing_to_look_up() -> None:
    asks = {"q": {"template": "{match} =", "pattern": r"\bn\w+", "limit": 2}}
    found = ask("is nabox more than nolem, nabox or nix?", composed(asks=asks))
    assert [(c.request.messages[-1].content, c.span) for c in found] == [("nabox =", (3, 8)), ("nolem =", (19, 24))]
    assert ask("nothing? no", composed(asks={"q": {"pattern": "zz"}})) == []


def test_a_pattern_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_SEARCH_S", 0.01)
    with pytest.raises(EngineError, match="takes longer than 0.01 s on this message"):
        ask("a" * 5_000 + "!", composed(asks={"q": {"pattern": r"(a|aa)+$"}}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reads": "mind"}, "reads: input should be 'answer' or 'prompt'"),
        ({"asks": {"q": {"pattern": "("}}}, r"asks.q.pattern: '\(' is not a regular expression"),
        ({"asks": {"q": {"limit": 65}}}, "asks.q.limit: input should be less than or equal to 64"),
        ({"layers": {"q": [0]}}, r"layers.q\[0\]: input should be greater than or equal to 1"),
        ({"layers": {"q": list(range(1, 18))}}, "layers.q: "),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"settings of 'pair': {message}"):
        ask("x", composed(**settings))


def test_notes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [PeerCall(name, GenerateRequest(prompt="x")) for name in "abc"]
    assert left_notes(made, [b"1", None, b"3"]) == (PeerNotes("a", b"1"), PeerNotes("c", b"3"))
    monkeypatch.setattr(calls, "MOST_NOTE_BYTES", 5)
    assert [note.peer for note in left_notes(made, [b"123", b"456", b"78"])] == ["a", "c"]
