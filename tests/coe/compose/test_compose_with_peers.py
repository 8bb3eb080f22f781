"""Composed experts whose peers leave notes first: which calls are made in which round, and what is known afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
from recorded_experts import REQUEST, answer, decision, run

from coe.batch.records import dump_outcome, dump_request, load_outcome, load_request
from coe.compose import (
    Chain,
    Composition,
    ExpertCalls,
    Final,
    Latent,
    Single,
    Vote,
    WithFallback,
    build_composition,
    named_experts,
)
from coe.compose.with_peers import WithPeers, with_peers
from coe.config import CompositionConfig, PolicyConfig
from coe.errors import ConfigError, EngineError, InvalidRequest
from coe.local import build_policies
from coe.types import Answer, GenerateRequest, NotesWanted, PeerNotes, Usage
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import RoutingDecision

NAMES = ("a", "b", "c")
PLAIN = {name: ExpertSpec(name=name, kind=Kind.MODEL, source="fake://echo") for name in NAMES}
TRIO = ExpertSpec(name="trio", kind=Kind.COMPOSED, members=NAMES, architecture="notes", source="artifact")
EXPERTS = {**PLAIN, "trio": TRIO}
DOWN = EngineError("it is down")


def left(peer: str, value: bytes | None) -> Answer:
    return replace(answer(peer, f"{peer} thinks"), value=value)


def told(request: GenerateRequest) -> str:
    """An expert that says whose notes it read."""
    assert request.notes is not None and request.wants == "text"
    return "+".join(f"{note.peer}:{note.data.decode()}" for note in request.notes) or "alone"


SAYS = {"trio": told, "a": "A", "b": left("b", b"B!"), "c": left("c", b"C!")}


def test_peers_are_called_first_and_the_answer_streams_with_their_notes() -> None:
    final, rounds = run(with_peers(Single(), EXPERTS), decision(trio=0.9), SAYS)
    assert rounds == [["b", "c"], ["trio"]] and final.text == "b:B!+c:C!"
    assert (final.expert, final.usage, final.cost_usd) == ("trio", Usage(30, 6), 3.0), "peers are paid for, too"
    assert [note.partition(" (")[0] for note in final.notes] == ["b left notes", "c left notes"]
    assert "sha256:" in final.notes[0] and "2 bytes" in final.notes[0]
    first = with_peers(Single(), EXPERTS).step(REQUEST, decision(trio=0.9), {})
    assert isinstance(first, ExpertCalls) and not first.last
    assert {call.wants for call in first.calls} == {"latent"}
    assert first.calls[0].request.notes_wanted == NotesWanted("states", (), "speaking", answer=True)


def test_a_peer_that_fails_or_leaves_nothing_is_left_out_and_named() -> None:
    final, _ = run(with_peers(Single(), EXPERTS), decision(trio=0.9), {**SAYS, "b": DOWN, "c": left("c", None)})
    assert final.text == "alone" and final.usage == Usage(20, 4)
    assert final.notes[:2] == (
        "b left no notes: EngineError: it is down", "c left no notes: its engine returned none",
    )  # fmt: skip
    stream = with_peers(Single(), EXPERTS)
    done = {"0.peer.0": left("b", b"B!"), "0.peer.1": load_outcome(dump_outcome(0, "x", left("c", b"\xff\x00")))}
    last = stream.step(REQUEST, decision(trio=0.9), done)
    assert isinstance(last, ExpertCalls) and last.last and last.notes[1].startswith("c left notes")
    assert last.calls[0].request.notes == (PeerNotes("b", b"B!"), PeerNotes("c", b"\xff\x00"))
    assert load_request(dump_request(last.calls[0].request)) == last.calls[0].request, "a batch stores it"


@pytest.mark.parametrize(
    ("composition", "rounds", "text"),
    [
        (Vote(), [["b", "c", "a", "b"], ["trio"]], "b:B!+c:C!"),
        (Chain(order="falling"), [["b", "c"], ["trio"], ["a"], ["b"]], "b thinks"),
        (WithFallback(Single(), "a"), [["b", "c"], ["trio"]], "b:B!+c:C!"),
    ],
)
def test_any_composition_may_call_a_composed_expert(
    composition: Composition, rounds: list[list[str]], text: str
) -> None:
    of = decision(trio=0.9, a=0.8, b=0.7)
    says = {**SAYS, "a": "A"}
    final, called = run(WithPeers(composition, EXPERTS), of, says)
    assert called == rounds and final.text == text


def test_a_failed_composed_expert_is_followed_as_any_other() -> None:
    final, rounds = run(WithPeers(WithFallback(Single(), "a"), EXPERTS), decision(trio=0.9), {**SAYS, "trio": DOWN})
    assert rounds == [["b", "c"], ["trio"], ["a"]] and final.text == "A"
    assert "trio failed: EngineError: it is down" in final.notes


def test_without_staged_experts_a_composition_is_as_it_was() -> None:
    single = Single()
    assert with_peers(single, PLAIN) is single
    final, rounds = run(WithPeers(single, EXPERTS), decision(a=1.0), {"a": "A"})
    assert rounds == [["a"]] and (final.text, final.notes, final.usage) == ("A", (), Usage(10, 2))


def test_token_ids_and_given_notes() -> None:
    ids = GenerateRequest(prompt="", prompt_ids=(1, 2))
    with pytest.raises(InvalidRequest, match="token ids are of one expert's tokenizer"):
        run(WithPeers(Single(), EXPERTS), decision(trio=0.9), SAYS, ids)
    given = replace(REQUEST, notes=(PeerNotes("b", b"mine"),))
    final, rounds = run(WithPeers(Single(), EXPERTS), decision(trio=0.9), SAYS, given)
    assert rounds == [["trio"]] and final.text == "b:mine"


def test_replaying_recorded_outcomes_makes_the_same_calls() -> None:
    composition, of = with_peers(Single(), EXPERTS), decision(trio=0.9)
    done: dict[str, Answer] = {}
    calls = []
    while isinstance(step := composition.step(REQUEST, of, done), ExpertCalls):
        calls.append(step)
        for call in step.calls:
            said = SAYS[call.expert]
            done[call.id] = answer(call.expert, told(call.request)) if callable(said) else said  # type: ignore[assignment]
    again: dict[str, Answer] = {}
    for step in calls:
        assert composition.step(REQUEST, of, again) == step
        again |= {call.id: done[call.id] for call in step.calls}
    assert isinstance(composition.step(REQUEST, of, again), Final)


def test_the_decision_chooses_the_peers() -> None:
    composition = with_peers(Latent("trio"), EXPERTS)
    final, rounds = run(composition, decision(c=0.9, a=0.8), SAYS)
    assert rounds == [["c"], ["trio"]] and (final.text, final.expert) == ("c:C!", "trio"), "a answers: it is no peer"
    final, rounds = run(composition, decision(a=0.9), SAYS)
    assert rounds == [["trio"]] and final.text == "alone"
    final, rounds = run(composition, decision(b=0.9, a=0.8), {**SAYS, "b": DOWN, "trio": DOWN})
    assert rounds == [["b"], ["trio"], ["b"], ["a"]] and final.text == "A"
    assert "trio failed: EngineError: it is down" in final.notes
    final, rounds = run(composition, decision(trio=0.9, c=0.8), SAYS)
    assert rounds == [["c"], ["trio"]] and named_experts(Latent("trio")) == ("trio",)
    with pytest.raises(InvalidRequest, match="no expert can take"):
        Latent("trio").step(REQUEST, RoutingDecision((), (), (), 0.0), {})


def test_its_settings() -> None:
    with pytest.raises(ConfigError, match="expert"):
        build_composition("latent", {"expert": ""})
    policy = PolicyConfig(expert="a", composition=CompositionConfig(kind="latent", expert="b"))  # type: ignore[call-arg]
    with pytest.raises(
        ConfigError, match="'b' reads no notes: name a composed expert of the architecture cache or notes"
    ):
        build_policies({"p": policy}, Snapshot(1, EXPERTS))
    noted = policy.model_copy(update={"composition": CompositionConfig(kind="latent", expert="trio")})  # type: ignore[call-arg]
    assert build_policies({"p": noted}, Snapshot(1, EXPERTS))["p"].composition == Latent("trio")
