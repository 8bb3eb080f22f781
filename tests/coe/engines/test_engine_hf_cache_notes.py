"""Composed experts of architecture `cache`: entries of peers' answers in the cache of the first member."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import adapter_spec, make_tokenizer, save_adapter, say
from latent_experts import (
    BOTH,
    Composition,
    asked,
    composition,
    interactions,
    left,
    loaded,
    noted,
    row_of,
    said,
    scores_of,
)
from latent_models import save_tiny

from coe.engines.base import Adapter
from coe.engines.hf.batch import BatchRow
from coe.engines.hf.decoding import Decoding
from coe.engines.hf.expert import HFExpert
from coe.engines.hf.loop import padded, prepared
from coe.engines.latent.cache_channel import last_entries
from coe.engines.latent.notes import Notes
from coe.errors import ContextLengthExceeded, Rejected, Unsupported
from coe.sampling import SamplingOptions
from coe.types import GenerateRequest, PeerNotes

PEERS = ("sql", "law")
LONG = "the capital of france is paris, the end of the answer"
CLOSE = {"atol": 2e-4, "rtol": 2e-4}
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module", params=BOTH)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("cache") / request.param, request.param, make_tokenizer())


@pytest.fixture
async def model(folder: Path) -> AsyncIterator[HFExpert]:
    async with loaded(folder) as expert:
        yield expert


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Composition:
    return composition(tmp_path_factory.mktemp("own") / "artifact", PEERS, architecture="cache")


@pytest.fixture
def tuned(folder: Path, tmp_path: Path) -> list[Adapter]:
    """Two adapters on the model, as peers."""
    folders = [save_adapter(tmp_path / name, folder) for name in ("a1", "a22")]
    return [Adapter(adapter_spec(each), each) for each in folders]


def with_notes(request: GenerateRequest, *notes: PeerNotes) -> GenerateRequest:
    return replace(request, notes=notes)


def _forced(model: HFExpert, prompt: list[int], tokens: list[int]) -> Any:
    """The cache after the prompt and these tokens, one at a time."""
    from transformers import DynamicCache

    transformer = model.loaded.model
    cache = DynamicCache(config=transformer.config)
    with torch.inference_mode():
        transformer(torch.tensor([prompt]), past_key_values=cache)
        for token in tokens:
            transformer(torch.tensor([[token]]), past_key_values=cache)
    return cache


def _exact(model: HFExpert, prompt: list[int], tokens: list[int], peer: str = "sql") -> Notes:
    """The notes of the model itself, in float32."""
    keys, values = last_entries(_forced(model, prompt, tokens), 0, len(tokens))
    return Notes(peer, keys=keys.numpy(), values=values.numpy(), first=len(prompt), tokens=np.array(tokens, np.int32))


def _cached(model: HFExpert, row: BatchRow, n_prefill: int) -> Any:
    """The cache of a row before its suffix is read."""
    assert row.columns is not None
    ids, inputs = prepared(model.loaded.model, *padded([row], 0, "cpu"))
    decoding = Decoding(model.loaded.model, [row], ids, inputs)
    with torch.inference_mode():
        for begin in range(0, row.columns.n_read, n_prefill):
            assert not decoding.prefill(min(n_prefill, row.columns.n_read - begin))
    return decoding._inputs["past_key_values"]


@pytest.mark.parametrize("n_prefill", [1000, 5])
async def test_the_model_as_its_own_peer_has_the_entries_of_a_forced_decode(
    model: HFExpert, own: Composition, n_prefill: int
) -> None:
    """Its greedy answer comes back as entries: those in the cache are those of the decode, with difference 0."""
    request = asked(LONG, 11)
    _, left_notes = await noted(model, request, channel="cache")
    tokens = left_notes.tokens.tolist()
    prompt = (await model.prepare(request)).prompt_ids
    forced = _forced(model, prompt, tokens)
    rounded = replace(left_notes, peer="sql", digest=None)
    for notes in (_exact(model, prompt, tokens), rounded):
        row = await row_of(model, with_notes(request, left(notes)), own.on(model))
        suffix = model.loaded.tokenizer(SUFFIX, add_special_tokens=False)["input_ids"]
        assert row.prompt_ids == [*prompt, *tokens, *suffix]
        cache = _cached(model, row, n_prefill)
        for mine, theirs in zip(cache.layers, forced.layers, strict=True):
            for name in ("keys", "values"):
                kept, expected = getattr(mine, name)[0], getattr(theirs, name)[0]
                n = min(len(tokens), kept.shape[1])  # of a layer with a sliding window, its last columns
                exact = expected if notes is not rounded else expected.half().float()
                assert torch.equal(kept[:, -n:], exact[:, -n:])


@pytest.mark.parametrize("n_prefill", [None, 5])
async def test_scores_with_own_entries_are_those_of_reading_the_answer(
    model: HFExpert, own: Composition, n_prefill: int | None
) -> None:
    """Token for token, alone and in a padded batch with rows without entries."""
    request, tokens = asked(LONG, 6), [30, 41, 52, 63, 20, 21, 22, 23, 24, 25]
    prompt = (await model.prepare(request)).prompt_ids
    composed = own.on(model)
    row = await row_of(model, with_notes(request, left(_exact(model, prompt, tokens))), composed)
    same = await model.prepare(GenerateRequest(prompt="", prompt_ids=tuple(row.prompt_ids), max_tokens=6))
    expected = scores_of(model, [same])
    torch.testing.assert_close(scores_of(model, [row], n_prefill=n_prefill), expected, **CLOSE)
    rows = [
        await row_of(model, with_notes(request, left(_exact(model, prompt, tokens))), composed),
        await row_of(model, asked("the end of the answer " * 5, 6)),
        await row_of(model, with_notes(request), composed),
    ]
    raw = GenerateRequest(prompt="the end", max_tokens=6)
    own_ids = (await model.prepare(raw)).prompt_ids
    rows.append(await row_of(model, with_notes(raw, left(_exact(model, own_ids, tokens))), composed))
    assert rows[-1].prompt_ids == [*own_ids, *tokens, own_ids[-1]]
    batch = scores_of(model, rows, n_prefill=n_prefill)
    torch.testing.assert_close(batch[:, 0], expected[:, 0], **CLOSE)
    plain = await row_of(model, request)
    torch.testing.assert_close(batch[:, 2], scores_of(model, [plain])[:, 0], **CLOSE)
    again = await model.prepare(GenerateRequest(prompt="", prompt_ids=tuple(rows[-1].prompt_ids), max_tokens=6))
    torch.testing.assert_close(batch[:, 3], scores_of(model, [again])[:, 0], **CLOSE)


async def test_the_second_peer_stands_behind_the_first_in_the_order_of_the_members(
    model: HFExpert, own: Composition, tuned: list[Adapter]
) -> None:
    """The model as second peer, whose entries are moved on: the scores are close to those of reading its answer."""
    request, first, second = asked(LONG, 6), [30, 41, 52], [20, 21, 22, 23]
    prompt = (await model.prepare(request)).prompt_ids
    notes = [left(_exact(model, prompt, first, "sql")), left(_exact(model, prompt, second, "law"))]
    rows = [await row_of(model, with_notes(request, *order), own.on(model)) for order in (notes, notes[::-1])]
    assert rows[0].prompt_ids == rows[1].prompt_ids
    assert rows[0].prompt_ids[len(prompt) : len(prompt) + 7] == [*first, *second]
    assert torch.equal(scores_of(model, rows[:1]), scores_of(model, rows[1:]))
    assert rows[0].columns is not None
    assert [each.first - len(prompt) for each in rows[0].columns.entries] == [0, 3]


async def test_answers_of_adapters_are_read_and_change_the_answer(
    model: HFExpert, own: Composition, tuned: list[Adapter]
) -> None:
    request = asked(LONG, 10, logprobs=0)
    notes = []
    for name, adapter in zip(PEERS, tuned, strict=True):
        _, each = await noted(model, request, adapter, channel="cache")
        notes.append(left(replace(each, digest=None), name))
    answer = await said(own.on(model).generate(with_notes(request, *notes)))
    plain = await say(model, request)
    assert answer.usage is not None
    assert plain.usage is not None
    # Entries are counted where they were generated.
    n_suffix = len(model.loaded.tokenizer(SUFFIX, add_special_tokens=False)["input_ids"])
    assert answer.usage.prompt_tokens == plain.usage.prompt_tokens + n_suffix
    assert answer.usage.completion_tokens == plain.usage.completion_tokens
    assert answer.text != plain.text


async def test_without_entries_the_first_member_answers(model: HFExpert, own: Composition) -> None:
    request = asked(LONG, 10)
    plain = await say(model, request)
    prompt = (await model.prepare(request)).prompt_ids
    empty = left(replace(_exact(model, prompt, [7]), tokens=np.zeros(0, np.int32)).last(0))
    for notes in (None, (), (empty,)):
        answer = await said(own.on(model).generate(replace(request, notes=notes)))
        assert (answer.text, answer.usage) == (plain.text, plain.usage)


async def test_rows_of_every_kind_share_a_batch(folder: Path, own: Composition, tuned: list[Adapter]) -> None:
    async with loaded(folder, prefill_tokens=16) as model:
        texts = [LONG, "the end", LONG * 2]
        notes: list[PeerNotes] = []
        for number, (text, adapter) in enumerate(zip(texts, [*tuned, tuned[0]], strict=True)):
            _, each = await noted(model, asked(text, 6 + 5 * number), adapter, channel="cache")
            notes.append(left(replace(each, digest=None), PEERS[number % 2]))
        asks = [
            partial(own.on(model).generate, with_notes(asked(LONG, 30), *notes[:2])),
            partial(model.generate, asked("of the capital", 12)),
            partial(own.on(model).generate, with_notes(asked("the end", 9), notes[1])),
            partial(model.generate, asked(LONG, 20), tuned[0]),
            partial(own.on(model, tuned[1]).generate, with_notes(asked(LONG * 2, 14), notes[2])),
            partial(model.generate, replace(asked("paris", 6), wants="latent")),
            partial(own.on(model).generate, with_notes(GenerateRequest(prompt="the end", max_tokens=11), notes[0])),
        ]
        alone = [await said(ask()) for ask in asks]
        running = []
        for ask in asks:
            running.append(asyncio.create_task(said(ask())))
            await asyncio.sleep(0.01)
        mixed = await asyncio.gather(*running)
        at_once = await asyncio.gather(*(said(ask()) for ask in asks))
    for answers in (mixed, at_once):
        assert [(each.text, each.usage, each.reason) for each in answers] == [
            (each.text, each.usage, each.reason) for each in alone
        ]


async def test_the_context_holds_prompt_entries_and_answer(model: HFExpert, own: Composition) -> None:
    """512 tokens: a peer whose entries do not fit is left out and named; the next one may fit."""
    request = asked("the end", 400)
    prompt = (await model.prepare(request)).prompt_ids
    n_suffix = len(model.loaded.tokenizer(SUFFIX, add_special_tokens=False)["input_ids"])
    room = 512 - len(prompt) - n_suffix - 400
    fitting = left(_exact(model, prompt, [7] * room, "sql"))
    over = left(_exact(model, prompt, [7] * (room + 1), "sql"))
    small = left(_exact(model, prompt, [9, 9], "law"))
    row = await row_of(model, with_notes(request, fitting), own.on(model))
    assert (len(row.prompt_ids) + 400, row.remarks) == (512, ())
    row = await row_of(model, with_notes(request, over, small), own.on(model))
    assert row.prompt_ids[len(prompt) : len(prompt) + 2] == [9, 9]
    assert row.remarks == (
        f"sql was left out: its {room + 1} entries do not fit the context of 512 tokens beside the prompt and the "
        "answer",
    )
    # Without a stated limit the answer takes what is left, as for any request.
    row = await row_of(model, replace(with_notes(request, over, small), max_tokens=None), own.on(model))
    assert row.remarks == ()
    with pytest.raises(ContextLengthExceeded, match="max_tokens is 505, but 'tiny' has a context of 512 tokens"):
        await said(own.on(model).generate(with_notes(replace(request, max_tokens=505), small)))
    answer = await said(own.on(model).generate(with_notes(replace(request, max_tokens=400), over)))
    assert "sql was left out" in " ".join(answer.chunks[-1].notes)


async def test_scores_of_the_prompt_are_those_of_the_prompt_alone(model: HFExpert, own: Composition) -> None:
    request = replace(asked(LONG, 6), prompt_logprobs=2, logprobs=2)
    prompt = (await model.prepare(request)).prompt_ids
    notes = left(_exact(model, prompt, [30, 41, 52]))
    answer = await said(own.on(model).generate(with_notes(request, notes)))
    plain = await say(model, request)
    mine, theirs = answer.chunks[0].prompt_logprobs, plain.chunks[0].prompt_logprobs
    assert len(mine) == len(theirs) == len(prompt)
    for one, two in zip(mine[1:], theirs[1:], strict=True):
        assert (one.token, one.logprob) == (two.token, pytest.approx(two.logprob, abs=1e-4))


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ("e",)},
        {"temperature": 1.0, "seed": 5},
        {"sampling": SamplingOptions(min_tokens=3, presence_penalty=1.0)},
        {"format": "json", "max_tokens": 40},
    ],
    ids=["stop", "sampled", "penalty", "json"],
)
async def test_whatever_a_request_wants_is_done_with_entries(
    model: HFExpert, own: Composition, fields: dict[str, Any]
) -> None:
    """The model as its own peer answers as if it had read its answer in the prompt."""
    request = replace(asked(LONG, 12), **fields)
    prompt = (await model.prepare(asked(LONG, 12))).prompt_ids
    notes = left(_exact(model, prompt, [30, 41, 52]))
    answer = await said(own.on(model).generate(with_notes(request, notes)))
    row = await row_of(model, with_notes(asked(LONG, 12), notes), own.on(model))
    as_ids = replace(request, messages=(), prompt="", prompt_ids=tuple(row.prompt_ids))
    expected = await say(model, as_ids)
    assert (answer.text, answer.reason) == (expected.text, expected.reason)


async def test_the_trained_adapter_reads_the_entries(folder: Path, tuned: list[Adapter], tmp_path: Path) -> None:
    trained = composition(tmp_path / "artifact", PEERS, architecture="cache", adapter=tuned[0].path)
    request = asked(LONG, 10)
    async with loaded(folder) as model:
        answer = await said(trained.on(model, tuned[1]).generate(with_notes(request)))
        expected = await say(model, request, tuned[0])
        assert answer.text == expected.text
        prompt = (await model.prepare(request)).prompt_ids
        notes = left(_exact(model, prompt, [30, 41, 52]))
        read = await said(trained.on(model, tuned[1]).generate(with_notes(request, notes)))
        bare = composition(tmp_path / "bare", PEERS, architecture="cache")
        other = await said(bare.on(model).generate(with_notes(request, notes)))
    assert len({read.text, other.text, answer.text}) == 3


async def test_entries_that_do_not_fit_are_refused(model: HFExpert, own: Composition, tmp_path: Path) -> None:
    wide = Notes("sql", keys=np.zeros((4, 2, 1, 16), np.float16), values=np.zeros((4, 2, 1, 16), np.float16),
                 tokens=np.ones(1, np.int32))  # fmt: skip
    with pytest.raises(Rejected, match=r"of 'sql' have \(layers, heads, width\) \(4, 2, 16\); expected \(4, 2, 8\)"):
        await said(own.on(model).generate(with_notes(asked(LONG), left(wide))))
    states = Notes("law", states=np.zeros((1, 2, 32), np.float16), spans=np.full((2, 2), -1, np.int32))
    with pytest.raises(Rejected, match="are of the channel 'states'; expected 'cache'"):
        await said(own.on(model).generate(with_notes(asked(LONG), left(states))))
    foreign = replace(wide, keys=np.zeros((4, 2, 1, 8), np.float16), values=np.zeros((4, 2, 1, 8), np.float16),
                      tokens=np.full(1, 10_000, np.int32))  # fmt: skip
    with pytest.raises(Rejected, match=r"of 'sql' are of the token 10000; expected ids below 2\d\d"):
        await said(own.on(model).generate(with_notes(asked(LONG), left(foreign))))


async def test_entries_beyond_the_limit_lose_the_front_and_are_named(model: HFExpert, tmp_path: Path) -> None:
    own = composition(tmp_path / "artifact", PEERS, architecture="cache", settings={"max_notes": 3})
    prompt = (await model.prepare(asked(LONG, 6))).prompt_ids
    notes = left(_exact(model, prompt, [30, 41, 52, 20, 21]))
    row = await row_of(model, with_notes(asked(LONG, 6), notes), own.on(model))
    assert row.prompt_ids[len(prompt) : len(prompt) + 3] == [52, 20, 21]
    assert row.remarks == ("of 5 notes of sql the last 3 were read (max_notes)",)


async def test_an_alora_reads_no_entries_and_reads_notes(model: HFExpert, folder: Path, tmp_path: Path) -> None:
    """It acts from its invocation tokens on, which are found in a whole prompt: entries come in between."""
    tokens = model.loaded.tokenizer(" capital", add_special_tokens=False)["input_ids"]
    activated = save_adapter(tmp_path / "activated", folder, alora_invocation_tokens=tokens)
    adapter = Adapter(adapter_spec(activated), activated)
    request = asked("the end of the capital of france", 6)
    alone = await say(model, request, adapter)
    assert alone.text != (await say(model, request)).text
    _, entries = await noted(model, request, adapter, channel="cache")
    _, states = await noted(model, request, adapter)
    cached = composition(tmp_path / "cache", PEERS, architecture="cache")
    reading = with_notes(request, left(replace(entries, digest=None), "sql"))
    with pytest.raises(Unsupported, match=r"adapter 'activated' acts from .*\(aLoRA\): it cannot read the key-value"):
        await said(cached.on(model, adapter).generate(reading))
    assert (await said(cached.on(model, adapter).generate(with_notes(request)))).text == alone.text
    plain = composition(tmp_path / "plain", PEERS, architecture="cache", adapter=save_adapter(tmp_path / "own", folder))
    assert (await said(plain.on(model, adapter).generate(reading))).reason == "length"
    noting = composition(tmp_path / "notes", PEERS, interactions(PEERS, reads=False))
    reading = with_notes(request, left(replace(states, digest=None), "sql"))
    assert (await said(noting.on(model, adapter).generate(reading))).text == alone.text
