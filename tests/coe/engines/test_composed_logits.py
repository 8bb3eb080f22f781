"""Composed experts whose members' scores of every token are combined: figures, answers, other requests, refusals."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import Said, adapter_spec, model_spec, save_adapter, save_other_weights, save_tiny_model, say
from other_tokenizer import make_piece_tokenizer
from test_engine_hf_admission import joins, running

from coe.engines.base import Adapter, Member
from coe.engines.fake import FakeEngine
from coe.engines.hf.composed.logits import Logits
from coe.engines.hf.composed.token_scores import OnlyWhereItPays, contrast, mean, proxy
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.engines.hf.members import hf_members
from coe.errors import ConfigError, ContextLengthExceeded, OutOfMemory, Rejected, Unsupported
from coe.host import Host
from coe.orchestrator import Orchestrator
from coe.policy import Always, Policy
from coe.sampling import SamplingOptions
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

__all__ = ["joins"]
PROMPTS = ("the capital of france", "paris is the end", "of the answer")


def ask(text: str = PROMPTS[0], **fields: Any) -> GenerateRequest:
    return GenerateRequest(messages=(Message("user", text),), **{"max_tokens": 16, **fields})


def spec(*members: str, **settings: Any) -> ExpertSpec:
    return ExpertSpec(name="both", kind=Kind.COMPOSED, architecture="logits", members=members, settings=settings)


def composed(members: Mapping[str, Member], **settings: Any) -> Any:
    return Logits(spec(*members, **settings), members, None)


@pytest.fixture
async def other(engine: HFEngine, tiny: Path, tmp_path: Path) -> AsyncIterator[HFExpert]:
    """A model of the same tokenizer with other weights, whose vocabulary is padded to another size."""
    folder = save_other_weights(tiny, tmp_path / "other")
    expert = await engine.load(model_spec(folder).model_copy(update={"name": "other"}), folder)
    assert isinstance(expert, HFExpert)
    yield expert
    await engine.unload(expert)


@pytest.fixture
def three(expert: HFExpert, adapters: list[Adapter]) -> dict[str, Member]:
    return {"tiny": Member(expert), "a0": Member(expert, adapters[0]), "a1": Member(expert, adapters[1])}


def facts(said: Said) -> tuple[str, str | None, int]:
    assert said.usage is not None
    return said.text, said.reason, said.usage.completion_tokens


# Figures


def test_the_mean_is_that_of_log_probabilities() -> None:
    logits = torch.randn(3, 9)
    p = logits.log_softmax(-1)
    torch.testing.assert_close(mean(logits, [1, 1, 1]), p.mean(0))
    torch.testing.assert_close(mean(logits, [3, 1, 0]), (3 * p[0] + p[1]) / 4)
    logits[2] = -torch.inf  # an expert of no weight excludes nothing
    assert mean(logits, [3, 1, 0]).isfinite().all()


def test_contrast_subtracts_the_amateur_among_plausible_tokens() -> None:
    logits = torch.tensor([[3.0, 2.5, 0.0, -4.0], [3.0, 0.0, 0.0, -9.0]])
    scores = contrast(logits, 0.5, 0.1)
    expert, amateur = logits.log_softmax(-1)
    torch.testing.assert_close(scores[:2], (1.5 * expert - 0.5 * amateur)[:2])
    assert scores[2:].tolist() == [-torch.inf] * 2  # below 0.1 of the largest probability
    assert contrast(logits, 0.5, 0.0).isfinite().all()
    assert int(scores.argmax()) == 1 and int(logits[0].argmax()) == 0
    assert torch.equal(contrast(logits, 0.0, 0.1), logits[0])
    same = contrast(logits[[0, 0]], 2.0, 0.1)
    torch.testing.assert_close(same[:2], expert[:2])


def test_proxy_adds_what_training_has_changed() -> None:
    logits = torch.randn(3, 7)
    torch.testing.assert_close(proxy(logits, 0.5), logits[0] + 0.5 * (logits[1] - logits[2]))
    assert torch.equal(proxy(logits, 0.0), logits[0])
    torch.testing.assert_close(proxy(logits[[0, 1, 1]], 1.0), logits[0])
    logits[1:, 3] = -torch.inf  # a token that these vocabularies lack
    assert proxy(logits, 1.0)[3] == -torch.inf and proxy(logits, 1.0)[:3].isfinite().all()


def test_scores_are_combined_only_where_experts_differ_and_none_is_certain() -> None:
    used = OnlyWhereItPays(lambda logits: logits.sum(0), 0.95)
    agree = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.5, 0.0]])
    certain = torch.tensor([[0.0, 9.0, 0.0], [1.0, 0.5, 0.0]])
    differ = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.5, 0.0]])
    assert torch.equal(used(agree), agree[0])
    assert torch.equal(used(certain), certain[0])
    assert torch.equal(used(differ), differ.sum(0))
    assert (used.n_tokens, used.n_combined) == (3, 1)


# Answers


@pytest.mark.parametrize(
    "settings",
    [{"mode": "contrast", "beta": 0.0}, {"mode": "proxy", "alpha": 0.0}, {"mode": "mean", "weights": {"b": 0.0}}],
)
async def test_a_factor_of_zero_is_the_first_member(
    expert: HFExpert, other: HFExpert, adapters: list[Adapter], settings: dict[str, Any]
) -> None:
    """On one model and on two, whatever the request asks for."""
    first = Member(expert, adapters[0])
    settings = {"certain": 1.0, **settings} if settings["mode"] == "mean" else settings
    for second in (Member(expert, adapters[1]), Member(other, None)):
        if settings["mode"] == "proxy" and second.adapter is None:
            continue
        both = composed({"a": first, "b": second}, **settings)
        for request in (
            ask(),
            ask(stop=("e",)),
            ask(sampling=SamplingOptions(repetition_penalty=1.3)),
            ask(PROMPTS[1], max_tokens=1),
            GenerateRequest(prompt="the end", max_tokens=9, echo=True),
            GenerateRequest(prompt="the end", max_tokens=0, echo=True),
        ):
            alone = await say(expert, request, adapters[0])
            said = await say(both, request)
            assert said.text == alone.text and said.reason == alone.reason
            assert said.usage is not None and alone.usage is not None
            assert said.usage.completion_tokens % max(1, alone.usage.completion_tokens) == 0


async def test_equal_members_are_one(expert: HFExpert, adapters: list[Adapter]) -> None:
    alone = await say(expert, ask(), adapters[0])
    for settings in ({"mode": "mean"}, {"mode": "mean", "certain": 1.0}, {"mode": "contrast", "beta": 3.0}):
        both = composed({"a": Member(expert, adapters[0]), "b": Member(expert, adapters[0])}, **settings)
        assert (await say(both, ask())).text == alone.text


async def brute(members: Mapping[str, Member], request: GenerateRequest, combine: Any, n_tokens: int) -> list[int]:
    """The tokens of an answer, from a whole forward of each member for each token."""
    rows = [await member.expert.prepare(request, member.adapter) for member in members.values()]  # type: ignore[attr-defined]
    answer: list[int] = []
    while len(answer) < n_tokens:
        logits = []
        for row, member in zip(rows, members.values(), strict=True):
            ids = torch.tensor([[*row.prompt_ids, *answer]])
            call = member.expert.run(lambda model, ids=ids: model(input_ids=ids).logits[0, -1], [member.adapter])  # type: ignore[attr-defined]
            logits.append(await asyncio.wrap_future(call))
        answer.append(int(combine(torch.stack(logits)).argmax()))
    return answer


@pytest.mark.parametrize(
    ("settings", "combine"),
    [
        ({"mode": "mean", "certain": 1.0}, lambda logits: mean(logits, [1, 1, 1])),
        ({"mode": "proxy", "alpha": 0.8}, lambda logits: proxy(logits, 0.8)),
    ],
)
async def test_each_token_is_that_of_the_combined_scores(
    expert: HFExpert, other: HFExpert, adapters: list[Adapter], tokenizer: Any, settings: dict[str, Any], combine: Any
) -> None:
    """Members on two models, one of them with two adapters of another prompt format."""
    members = {"a": Member(expert, adapters[0]), "o": Member(other), "b": Member(expert, adapters[1])}
    both = composed(members, **settings)
    tokens = await brute(members, ask(), combine, 16)
    said = await say(both, ask())
    assert said.text == tokenizer.decode(tokens, skip_special_tokens=True)
    texts = {(await say(m.expert, ask(), m.adapter)).text for m in members.values()}  # type: ignore[arg-type]
    assert said.text not in texts


async def test_the_base_of_an_adapter_need_not_be_a_member(three: dict[str, Member], tokenizer: Any) -> None:
    stated = {"a0": three["a0"], "a1": three["a1"], "tiny": three["tiny"]}
    short = {"a0": three["a0"], "a1": three["a1"]}
    texts = [(await say(composed(members, mode="proxy"), ask())).text for members in (stated, short)]
    assert texts[0] == texts[1]
    assert texts[0] != (await say(three["a0"].expert, ask(), three["a0"].adapter)).text  # type: ignore[arg-type]


async def test_streams_logprobs_seeds_and_usage_of_all_members(three: dict[str, Member]) -> None:
    both = composed(three, mode="mean", certain=1.0)
    said = await say(both, ask(max_tokens=40, logprobs=2))
    assert len(said.chunks) > 1
    entries = [entry for chunk in said.chunks for entry in chunk.logprobs]
    assert len(entries) == 40 and all(len(entry.top) == 2 for entry in entries)
    assert all(entry.logprob == entry.top[0][1] <= 0 for entry in entries if entry.logprob is not None)
    alone = [await say(m.expert, ask(max_tokens=1), m.adapter) for m in three.values()]  # type: ignore[arg-type]
    assert said.usage is not None
    assert said.usage.prompt_tokens == sum(each.usage.prompt_tokens for each in alone if each.usage)
    assert said.usage.completion_tokens == 3 * 40
    sampled = [await say(both, ask(temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert sampled[0].text == sampled[1].text != sampled[2].text


async def test_a_required_format_holds(three: dict[str, Member]) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": ["Rome", "Oslo"]}}, "required": ["n"]}
    schema |= {"additionalProperties": False}
    said = await say(composed(three, mode="mean"), ask(max_tokens=60, format="json", json_schema={"schema": schema}))
    assert json.loads(said.text) in ({"n": "Rome"}, {"n": "Oslo"})


async def test_the_share_of_combined_tokens_is_reported(three: dict[str, Member]) -> None:
    counts = []
    for certain in (1.0, 0.3, 0.2, 0.15, 0.0):
        said = await say(composed(three, mode="mean", certain=certain), ask(max_tokens=20))
        assert all(not chunk.notes for chunk in said.chunks[:-1])
        [note] = said.chunks[-1].notes
        found = re.match(r"scores were combined for (\d+) of 20 tokens", note)
        assert found is not None
        counts.append(int(found[1]))
    assert counts[-1] == 0 < min(counts[:-1])
    assert len(set(counts)) > 2
    assert not (await say(composed(three, mode="proxy"), ask())).chunks[-1].notes


# Side by side


async def test_requests_side_by_side_answer_as_each_alone(
    three: dict[str, Member], expert: HFExpert, joins: list[int]
) -> None:
    both = composed(three, mode="mean", certain=1.0)
    alone = [(await say(both, ask(prompt))).text for prompt in PROMPTS]
    plain = await say(expert, ask(PROMPTS[0], max_tokens=100))
    async with running(expert) as task:
        *said, beside = await asyncio.gather(
            *(say(both, ask(prompt)) for prompt in PROMPTS), say(expert, ask(PROMPTS[0], max_tokens=100))
        )
        assert not task.done()
        assert [each.text for each in said] == alone
        assert beside.text == plain.text
    assert len(set(alone)) == len(PROMPTS)


async def test_closing_the_answer_ends_its_steps(three: dict[str, Member], expert: HFExpert) -> None:
    chunks = composed(three, mode="mean").generate(ask(max_tokens=300))
    await anext(chunks)
    await chunks.aclose()
    assert not expert._waiting._jobs
    assert (await say(expert, ask())).text  # the worker goes on


async def test_adapters_that_cannot_be_mixed_have_forwards_of_their_own(
    expert: HFExpert, adapters: list[Adapter], tiny: Path, tmp_path: Path, tokenizer: Any
) -> None:
    folder = save_adapter(tmp_path / "dora", tiny, use_dora=True)
    members = {"a": Member(expert, adapters[0]), "d": Member(expert, Adapter(adapter_spec(folder), folder))}
    tokens = await brute(members, ask(), lambda logits: mean(logits, [1, 1]), 16)
    said = await say(composed(members, mode="mean", certain=1.0), ask())
    assert said.text == tokenizer.decode(tokens, skip_special_tokens=True)


async def test_a_host_serves_it_as_any_expert(engine: HFEngine, tiny: Path, adapters: list[Adapter]) -> None:
    """Registered, leased, answered through a policy; what it states of the answer reaches the caller."""
    specs = [model_spec(tiny, size_bytes=2**20, context_length=320), *(adapter.spec for adapter in adapters[:2])]
    specs.append(spec("a0", "a1", mode="mean"))
    snapshot = Snapshot(1, {each.name: each for each in specs})
    host = Host(snapshot, {"hf": engine}, budget_bytes=2**30, locate=lambda each: Path(each.source))
    policy = Policy("default", Always("both"))
    reply = Orchestrator(snapshot, {"default": policy}, ask=host.ask).answer(ask())
    text = await reply.text()
    assert reply.answer is not None and reply.answer.expert == "both" and reply.answer.text == text != ""
    assert [note for note in reply.answer.notes if note.startswith("scores were combined for ")]
    assert host.resident == {"tiny"}
    await host.aclose()


# Refusals


async def test_other_vocabularies_are_refused_by_name(expert: HFExpert, engine: HFEngine, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "pieces", make_piece_tokenizer())
    pieces = await engine.load(model_spec(folder), folder)
    with pytest.raises(Unsupported, match=r"that of 'tiny' \(\d+ tokens\) is not that of 'pieces' \(\d+ tokens\)"):
        await say(composed({"tiny": Member(expert), "pieces": Member(pieces)}, mode="mean"), ask())
    await engine.unload(pieces)


async def test_members_on_other_engines_are_refused_by_name(expert: HFExpert, tmp_path: Path) -> None:
    fake = await FakeEngine().load(ExpertSpec(name="f", kind=Kind.MODEL, source="fake://echo"), tmp_path)
    with pytest.raises(Unsupported, match="'f' is served by FakeExpert.*engine: hf"):
        composed({"tiny": Member(expert), "f": Member(fake)}, mode="mean")
    many = {f"m{i}": Member(expert) for i in range(17)}
    with pytest.raises(Unsupported, match="has 17 members in step; the most is 16"):
        hf_members(spec(*many, mode="mean"), many)


async def test_requests_that_it_cannot_answer_are_refused(three: dict[str, Member]) -> None:
    both = composed(three, mode="mean")
    with pytest.raises(Unsupported, match="no log-probabilities of prompts"):
        await say(both, ask(prompt_logprobs=0))
    with pytest.raises(Unsupported, match="return text, not 'latent'"):
        await say(both, ask(wants="latent"))
    with pytest.raises(ContextLengthExceeded):
        await say(both, ask(max_tokens=5000))
    with pytest.raises(Rejected):
        await say(both, GenerateRequest(prompt="", prompt_ids=(10**6,), max_tokens=2))


async def test_a_cache_that_does_not_fit_is_refused(
    three: dict[str, Member], expert: HFExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert, "_cache_bytes", lambda n_held: 60 * expert.loaded.cache_bytes_per_token)
    with pytest.raises(OutOfMemory, match="the free memory, which holds 60: lower max_tokens"):
        await say(composed(three, mode="mean"), ask(max_tokens=40))


@pytest.mark.parametrize(
    ("members", "settings", "message"),
    [
        (("a", "b"), {}, "mode: is required"),
        (("a", "b"), {"mode": "median"}, "mode: .*'mean', 'contrast', 'proxy' or 'gate'"),
        (("a", "b"), {"mode": "mean", "alpha": 1.0}, "`alpha` is of mode proxy, not of 'mean'"),
        (("a", "b"), {"mode": "mean", "weights": {"c": 1}}, "weights.c is not one of its members"),
        (("a", "b"), {"mode": "mean", "weights": {"a": 0, "b": 0}}, "all weights are 0"),
        (("a", "b"), {"mode": "mean", "weights": {"a": -1}}, "weights.a: .*greater than or equal to 0"),
        (("a", "b", "c"), {"mode": "contrast"}, "mode 'contrast' has 2 members, not 3"),
        (("a", "b", "c", "d"), {"mode": "proxy"}, "mode 'proxy' has 2 to 3 members, not 4"),
        (("a", "b"), {"mode": "proxy", "alpha": 101}, "alpha: .*less than or equal to 100"),
        (("a", "b"), {"mode": "gate", "speed": 1}, "speed"),
    ],
)
async def test_wrong_settings_are_refused_with_their_place(
    expert: HFExpert, members: tuple[str, ...], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"settings of 'both'.*{message}"):
        composed({name: Member(expert) for name in members}, **settings)


async def test_proxy_without_a_base_and_gate_without_an_artifact_are_refused(expert: HFExpert, other: HFExpert) -> None:
    members = {"a": Member(expert), "b": Member(other)}
    with pytest.raises(ConfigError, match="'b' is not an adapter, so the third member must be the model"):
        await say(composed(members, mode="proxy"), ask())
    with pytest.raises(ConfigError, match="mode 'gate' needs `source`"):
        await say(composed(members, mode="gate"), ask())
