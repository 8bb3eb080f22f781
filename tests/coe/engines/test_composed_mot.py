"""A Mixture of Thoughts that is served: peers read the answer of the primary while it is written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import say
from mot_serving import N_TOKENS, PROMPTS, ask, expert_of, folders, members, mot, ordered, spec, write
from test_engine_hf_admission import joins, running

from coe.chunks import Joined
from coe.engines.base import Adapter, Member
from coe.engines.fake import FakeEngine
from coe.engines.hf.composed.mot import Mot
from coe.engines.hf.decoding import Decoding
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.in_step import together
from coe.engines.hf.in_step.reading_peer import ReadingPeer
from coe.engines.latent.mot_router import MotRouter, encoder_facts
from coe.errors import ConfigError, ContextLengthExceeded, EngineError, InvalidRequest, Unsupported, WeightsError
from coe.host import Host
from coe.sampling import SamplingOptions
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.encoders.build import build_encoder

__all__ = ["folders", "joins", "members"]

# Without an effect


@pytest.mark.parametrize("order", [("first", "second", "third"), ("third", "first"), ("second", "third")])
async def test_with_zero_output_matrices_it_is_the_bare_primary(
    members: dict[str, Member], tmp_path: Path, order: tuple[str, ...]
) -> None:
    """Whatever the request: text, log-probabilities, stop strings, seeds, formats, raw prompts."""
    chosen = ordered(members, *order)
    both, bare = mot(chosen, write(tmp_path / "mot", chosen, scale=0.0)), chosen[order[0]]
    for request in (
        ask(logprobs=2),
        ask(PROMPTS[1], stop=("e",)),
        ask(temperature=1.0, seed=3, logprobs=0),
        ask(max_tokens=1),
        ask(PROMPTS[2] * 30, max_tokens=40),
        GenerateRequest(prompt="the end", max_tokens=9, echo=True),
        GenerateRequest(prompt="the end", max_tokens=0, echo=True),
    ):
        alone, said = await say(expert_of(bare), request, bare.adapter), await say(both, request)
        assert said.reason == alone.reason
        if not request.temperature:  # what is drawn has wrong bytes, whose text depends on where the stream is cut
            assert said.text == alone.text
        ours, theirs = ([entry for c in each.chunks for entry in c.logprobs] for each in (said, alone))
        assert [entry.token for entry in ours] == [entry.token for entry in theirs]
        torch.testing.assert_close([e.logprob for e in ours], [e.logprob for e in theirs], rtol=1e-4, atol=1e-5)


async def test_scores_are_bit_for_bit_those_of_the_bare_primary(
    members: dict[str, Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ordered(members, "first", "third")
    both = mot(chosen, write(tmp_path / "mot", chosen, scale=0.0))
    scores: list[torch.Tensor] = []
    advance = Decoding.advance

    def seen(self: Any) -> None:
        scores.append(self.scores.clone())
        advance(self)

    monkeypatch.setattr("coe.engines.hf.decoding.Decoding.advance", seen)
    await say(both, ask())
    ours = scores.copy()
    scores.clear()
    await say(expert_of(chosen["first"]), ask())
    assert len(ours) == len(scores) == N_TOKENS
    assert all(torch.equal(a, b) for a, b in zip(ours, scores, strict=True))


# Side by side


async def test_requests_side_by_side_answer_as_each_alone(
    members: dict[str, Member], tmp_path: Path, joins: list[int]
) -> None:
    served, first = mot(members, write(tmp_path / "mot", members)), expert_of(members["first"])
    alone = [(await say(served, ask(prompt))).text for prompt in PROMPTS]
    plain = (await say(first, ask(max_tokens=60))).text
    async with running(first) as task:
        *said, beside = await asyncio.gather(
            *(say(served, ask(prompt)) for prompt in PROMPTS), say(first, ask(max_tokens=60))
        )
        assert not task.done()
    assert [each.text for each in said] == alone
    assert beside.text == plain
    assert len(set(alone)) == len(PROMPTS)


async def test_closing_the_answer_ends_its_steps(members: dict[str, Member], tmp_path: Path) -> None:
    chunks = mot(members, write(tmp_path / "mot", members)).generate(ask(max_tokens=200))
    await anext(chunks)
    await chunks.aclose()
    for name in ("first", "third"):
        assert not expert_of(members[name])._waiting._jobs
        assert (await say(expert_of(members[name]), ask())).text


# Peers that are missing


def failing(monkeypatch: pytest.MonkeyPatch, name: str, after: int, error: Exception) -> None:
    read = ReadingPeer._follow

    def follow(self: ReadingPeer, model: Any, *, text: str) -> None:
        if self.name == name and len(text) > after:
            raise error
        read(self, model, text=text)

    monkeypatch.setattr(ReadingPeer, "_follow", follow)


async def test_a_peer_that_fails_is_left_out_and_named(
    members: dict[str, Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "mot", members)
    whole = await say(mot(members, path), ask())
    assert whole.chunks[-1].notes == ("first answers, and reads second, third",)
    failing(monkeypatch, "third", -1, WeightsError("the secret path"))
    said = await say(mot(members, path), ask())
    assert said.chunks[-1].notes == ("first answers, and reads second, third", "third was left out: it failed")
    assert said.usage is not None and said.usage.completion_tokens < whole.usage.completion_tokens  # type: ignore[union-attr]
    failing(monkeypatch, "second", 5, EngineError("later"))
    later = await say(mot(members, path), ask())
    assert [note for note in later.chunks[-1].notes if note.startswith("second")] == ["second was left out: later"]
    assert whole.text != said.text


async def test_without_any_peer_the_bare_primary_answers(
    members: dict[str, Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(self: ReadingPeer) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(ReadingPeer, "begin", refuse)
    said = await say(mot(members, write(tmp_path / "mot", members)), ask())
    assert said.text == (await say(expert_of(members["first"]), ask())).text
    assert [note.split()[0] for note in said.chunks[-1].notes] == ["first", "second", "third"]


async def test_a_peer_whose_context_is_too_short_is_left_out(
    members: dict[str, Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ordered(members, "first", "third")
    served, peer = mot(chosen, write(tmp_path / "mot", chosen)), expert_of(members["third"])
    for part in (peer, peer._preparation):
        monkeypatch.setattr(part, "context_length", 30)
    notes = (await say(served, ask())).chunks[-1].notes
    assert notes[0] == "first answers alone" and "third was left out" in notes[1] and "30" in notes[1]
    n_prompt = len((await peer.prepare(ask(max_tokens=1))).prompt_ids)
    for part in (peer, peer._preparation):
        # Its answer has more tokens than the primary's.
        monkeypatch.setattr(part, "context_length", n_prompt + N_TOKENS)
    notes = (await say(served, ask())).chunks[-1].notes
    assert notes[0] == "first answers, and reads third" and "third was left out" in notes[1]


async def test_a_peer_of_a_smaller_vocabulary_reads_an_answer_with_a_bias_beyond_it(
    members: dict[str, Member], tmp_path: Path
) -> None:
    """The token ids of `logit_bias` are those of the primary, which chooses."""
    chosen = ordered(members, "third", "first")
    sizes = [expert_of(members[name]).loaded.model.config.vocab_size for name in chosen]
    assert sizes[0] > sizes[1]
    biased = ask(sampling=SamplingOptions(logit_bias={sizes[0] - 1: 100.0}))
    said = await say(mot(chosen, write(tmp_path / "mot", chosen)), biased)
    assert said.chunks[-1].notes == ("third answers, and reads first",)


async def test_a_slow_peer_is_left_out(
    members: dict[str, Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ordered(members, "first", "third")
    served = mot(chosen, write(tmp_path / "mot", chosen))
    init: Callable[..., None] = together.Together.__init__

    def hasty(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs, deadline_s=0.2)

    async def wait(self: ReadingPeer, text: str) -> None:
        await asyncio.sleep(30)

    monkeypatch.setattr(together.Together, "__init__", hasty)
    monkeypatch.setattr(ReadingPeer, "read", wait)
    async with asyncio.timeout(20):
        notes = (await say(served, ask())).chunks[-1].notes
    assert notes[1] == "third was left out: 'third' took longer than 0.2 s for a step"


# Refusals


async def test_what_does_not_fit_the_members_is_refused(
    members: dict[str, Member], tmp_path: Path, engine: HFEngine
) -> None:
    path = write(tmp_path / "mot", members)
    with pytest.raises(WeightsError, match="trained with the members first, second, third, in this order"):
        await say(mot(ordered(members, "second", "first", "third"), path), ask())
    with pytest.raises(WeightsError, match="needs `source`"):
        Mot(spec(members, path), members, None)
    with pytest.raises(ConfigError, match="k, the number of active members, is 4; it is 1 to 3"):
        await say(mot(members, write(tmp_path / "k", members, k=4)), ask())
    for layers in ([1, 9], [1], ["a", "b"], None):
        wrong = write(tmp_path / "layers", members, layers={"first": [1, 2], "second": [1, 2], "third": layers})
        with pytest.raises(WeightsError, match=r"states for 'third' `layers`.*numbers from 1 to 4 are needed"):
            await say(mot(members, wrong), ask())
    fake = await FakeEngine().load(ExpertSpec(name="f", kind=Kind.MODEL, source="fake://echo"), tmp_path)
    with pytest.raises(Unsupported, match="'third' is served by FakeExpert"):
        mot({**members, "third": Member(fake)}, path)


async def test_members_of_other_contents_are_refused_by_name(members: dict[str, Member], tmp_path: Path) -> None:
    path = write(tmp_path / "mot", members)
    second = members["second"].adapter
    assert second is not None
    changed = Adapter(second.spec.model_copy(update={"digest": "sha256:other"}), second.path)
    with pytest.raises(WeightsError, match="'second' was trained with as .* and is now sha256:other on"):
        await say(mot({**members, "second": Member(members["second"].expert, changed)}, path), ask())


async def test_requests_that_it_cannot_answer_are_refused(members: dict[str, Member], tmp_path: Path) -> None:
    served = mot(members, write(tmp_path / "mot", members))
    with pytest.raises(Unsupported, match="no log-probabilities of prompts"):
        await say(served, ask(prompt_logprobs=0))
    with pytest.raises(InvalidRequest, match="token ids are of one tokenizer"):
        await say(served, GenerateRequest(prompt="", prompt_ids=(5, 6), max_tokens=2))
    with pytest.raises(ContextLengthExceeded):
        await say(served, ask(max_tokens=5000))


async def test_k_members_are_active(members: dict[str, Member], tmp_path: Path) -> None:
    said = await say(mot(members, write(tmp_path / "mot", members, k=2)), ask())
    assert said.chunks[-1].notes == ("first answers, and reads second",)
    said = await say(mot(members, write(tmp_path / "one", members, k=1)), ask())
    assert said.chunks[-1].notes == ("first answers alone",)
    assert said.text == (await say(expert_of(members["first"]), ask())).text


async def test_the_router_of_the_artifact_chooses_primary_and_peers(members: dict[str, Member], tmp_path: Path) -> None:
    encoder, router = build_encoder("hashing:64"), MotRouter(3, 2, 64)
    towards = torch.from_numpy(encoder.encode(["paris paris"])[0])
    with torch.no_grad():  # "paris" asks for the third member, all else for the second; the first is next in both
        for parameter in router.parameters():
            parameter.zero_()
        router.layers[0].weight[0] = towards  # type: ignore[index,union-attr]
        router.layers[2].weight[2, 0] = 9.0  # type: ignore[index,union-attr]
        router.layers[2].bias.copy_(torch.tensor([0.5, 1.0, 0.0]))  # type: ignore[union-attr,operator]
    settings = {"encoder": encoder_facts(encoder), "k": 2}
    served = mot(members, write(tmp_path / "mot", members, router=router, **settings))
    said = {prompt: (await say(served, ask(prompt))).chunks[-1].notes for prompt in ("paris paris", "the end of it")}
    assert said == {
        "paris paris": ("third answers, and reads second",),
        "the end of it": ("second answers, and reads first",),
    }


async def test_a_host_leases_all_members(
    members: dict[str, Member], folders: dict[str, Path], engine: HFEngine, tmp_path: Path
) -> None:
    path = write(tmp_path / "mot", members)
    expected = await say(mot(members, path), ask())
    specs = [expert_of(members[name]).spec.model_copy(update={"size_bytes": 2**20}) for name in ("first", "third")]
    second = members["second"].adapter
    assert second is not None
    snapshot = Snapshot(1, {each.name: each for each in (*specs, second.spec, spec(members, path))})
    host = Host(snapshot, {"hf": engine}, budget_bytes=2**30, locate=lambda each: Path(each.source))
    joined = Joined()
    async for chunk in host.ask("mot", ask()):
        joined.add(chunk)
    answer = joined.answer("mot", chunk)
    assert (answer.text, answer.notes) == (expected.text, expected.chunks[-1].notes)
    assert host.resident == {"first", "third"}
    await host.aclose()
