"""Composed experts of architecture `notes`: what reading changes, and what it must not change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
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
from coe.engines.hf.expert import HFExpert
from coe.engines.latent.memory import Memories, PeerStates
from coe.engines.latent.notes import Notes
from coe.errors import ConfigError, ContextLengthExceeded, EngineError, Rejected, Unsupported, WeightsError
from coe.types import GenerateRequest, PeerNotes

PEERS = ("sql", "law", "med")
LONG = "the capital of france is paris, the end of the answer"
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


@pytest.fixture(scope="module", params=BOTH)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("notes") / request.param, request.param, make_tokenizer())


@pytest.fixture
async def model(folder: Path) -> AsyncIterator[HFExpert]:
    async with loaded(folder) as expert:
        yield expert


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Composition:
    return composition(tmp_path_factory.mktemp("reading") / "artifact", PEERS, interactions(PEERS))


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Composition:
    """As training starts: Wo is zero."""
    return composition(tmp_path_factory.mktemp("silent") / "artifact", PEERS, interactions(PEERS, reads=False))


def some(peer: str, n: int = 5, *, seed: int = 0, span: tuple[int, int] | None = None, **fields: Any) -> PeerNotes:
    """Random notes; some of their tokens are on the start of the user's text."""
    rng = np.random.default_rng([seed, *peer.encode()])
    spans = np.full((n, 2), -1, np.int32)
    for place in range(n // 2):
        spans[place] = (place, place + 3)
    states = rng.standard_normal((1, n, 32)).astype(np.float16)
    return left(Notes(**{"peer": peer, "states": states, "spans": spans} | fields), span=span)


def with_notes(request: GenerateRequest, *notes: PeerNotes) -> GenerateRequest:
    return replace(request, notes=notes)


async def _requests() -> list[GenerateRequest]:
    return [
        with_notes(asked("the end", 6)),
        with_notes(asked(LONG, 6), some("law", 7)),
        with_notes(asked("of the capital", 6), some("sql", 3), some("law", 11), some("med", 1)),
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_prefill", [None, 10])
async def test_without_output_weights_the_scores_are_those_of_the_first_member(
    folder: Path, silent: Composition, dtype: str, n_prefill: int | None
) -> None:
    """0, 1 and 3 peers in one padded batch, in prefill and cached decoding: equal, not close."""
    async with loaded(folder, dtype=dtype) as model:
        requests = await _requests()
        read = [await row_of(model, request, silent.on(model)) for request in requests]
        assert [row.notes is not None for row in read] == [False, True, True]
        bare = [await row_of(model, replace(request, notes=None)) for request in requests]
        assert torch.equal(scores_of(model, read, 5, n_prefill), scores_of(model, bare, 5, n_prefill))


async def test_reading_changes_the_rows_that_read_and_no_other(model: HFExpert, reading: Composition) -> None:
    requests = await _requests()
    rows = [await row_of(model, request, reading.on(model)) for request in requests]
    plain = [await row_of(model, replace(request, notes=None)) for request in requests]
    with_them, without = scores_of(model, rows, 1)[0], scores_of(model, plain, 1)[0]
    assert torch.equal(with_them[0], without[0])
    for row in (1, 2):
        assert not torch.allclose(with_them[row], without[row], atol=1e-2)


@pytest.mark.parametrize("n_prefill", [None, 7])
async def test_cached_decoding_is_one_forward_of_all_tokens(
    model: HFExpert, reading: Composition, n_prefill: int | None
) -> None:
    """Token for token, with padding, against forwards without cache, which read with hooks of their own."""
    requests = (await _requests())[1:]
    rows = [await row_of(model, request, reading.on(model)) for request in requests]
    scores = scores_of(model, rows, 5, n_prefill)
    module = interactions(PEERS)
    for place, (row, request) in enumerate(zip(rows, requests, strict=True)):
        tokens = scores[:, place].argmax(-1).tolist()
        for step in range(5):
            expected = _uncached(model, module, request, [*row.prompt_ids, *tokens[:step]], len(row.prompt_ids))
            torch.testing.assert_close(scores[step, place], expected, **CLOSE)


def _uncached(model: HFExpert, module: Any, request: GenerateRequest, ids: list[int], n_prompt: int) -> torch.Tensor:
    """The scores after these tokens, from one forward; spans are found with the tokenizer's offsets."""
    text = request.messages[-1].content
    prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    offsets = model.loaded.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert len(offsets) == n_prompt
    head = prompt.index("\n") + 1
    spans = torch.full((1, len(ids), 2), -1)
    for place, (start, end) in enumerate(offsets):
        first, last = max(start - head, 0), min(end - head, len(text))
        if first < last:
            spans[0, place] = torch.tensor((first, last))
    assert (spans[0, :, 0] >= 0).any()
    unpacked = {each.peer: Notes.unpack(each.data) for each in request.notes or ()}
    states = {
        peer: PeerStates(torch.tensor(notes.states).float(), torch.tensor(notes.spans))
        for peer, notes in unpacked.items()
    }
    memories = Memories.stacked([module.memory(states)])
    hooks = []
    for q, layer in enumerate(module.where()):

        def hook(_module: Any, _inputs: Any, output: torch.Tensor, q: int = q) -> torch.Tensor:
            return output + module.read(q, output, memories, spans=spans)

        hooks.append(model.loaded.model.model.layers[layer - 1].register_forward_hook(hook))
    with torch.inference_mode():
        logits: torch.Tensor = model.loaded.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    for each in hooks:
        each.remove()
    return logits


async def test_the_order_of_peers_does_not_matter(model: HFExpert, reading: Composition) -> None:
    notes = [some("sql", 3), some("law", 6), some("med", 2)]
    rows = [
        await row_of(model, with_notes(asked(LONG, 4), *order), reading.on(model)) for order in (notes, notes[::-1])
    ]
    assert torch.equal(scores_of(model, rows[:1]), scores_of(model, rows[1:]))


async def test_a_missing_peer_is_as_if_its_notes_were_masked(model: HFExpert, reading: Composition) -> None:
    """In a batch its row is padded to the longest one's notes; the padding is masked and changes nothing."""
    short, long = (
        with_notes(asked(LONG, 4), some("sql", 2)),
        with_notes(asked(LONG, 4), some("sql", 2), some("med", 40)),
    )
    alone = scores_of(model, [await row_of(model, short, reading.on(model))])
    rows = [await row_of(model, request, reading.on(model)) for request in (short, long)]
    together = scores_of(model, rows)
    torch.testing.assert_close(together[:, 0], alone[:, 0], **CLOSE)
    assert not torch.allclose(together[0, 1], together[0, 0], atol=1e-2)


@pytest.mark.parametrize("notes", [None, ()])
async def test_without_any_peer_the_first_member_answers(
    model: HFExpert, reading: Composition, notes: tuple[PeerNotes, ...] | None
) -> None:
    request = replace(asked(LONG, 12), logprobs=2)
    answer = await said(reading.on(model).generate(replace(request, notes=notes)))
    plain = await say(model, request)
    assert (answer.text, answer.usage) == (plain.text, plain.usage)
    assert _logprobs(answer.chunks) == _logprobs(plain.chunks)


def _logprobs(chunks: Sequence[Any]) -> list[Any]:
    return [each for chunk in chunks for each in (*chunk.prompt_logprobs, *chunk.logprobs)]


async def test_several_calls_of_a_peer_are_read_with_the_part_of_the_text_that_each_is_about(
    model: HFExpert, reading: Composition
) -> None:
    first, second = some("sql", 3, seed=1, span=(0, 3)), some("sql", 4, seed=2, span=(12, 18))
    elsewhere = replace(second, span=(4, 9))
    rows = [
        await row_of(model, with_notes(asked(LONG, 4), *notes), reading.on(model))
        for notes in ((first, second), (first,), (first, elsewhere))
    ]
    one, two, three = (scores_of(model, [row], 1)[0, 0] for row in rows)
    assert not torch.allclose(one, two, atol=1e-3)
    assert not torch.allclose(one, three, atol=1e-3)
    assert rows[0].notes is not None
    assert rows[0].notes.memory.spans.tolist() == [[0, 3]] * 3 + [[12, 18]] * 4


async def test_spans_of_a_question_in_other_words_are_not_read(model: HFExpert, tmp_path: Path) -> None:
    settings = {"asks": {"sql": {"template": "in other words: {question}"}}}
    own = composition(tmp_path / "artifact", PEERS, interactions(PEERS), settings=settings)
    row = await row_of(model, with_notes(asked(LONG, 4), some("sql", 4), some("law", 4)), own.on(model))
    assert row.notes is not None
    assert row.notes.memory.spans.tolist() == [[-1, -1]] * 4 + [[0, 3], [1, 4], [-1, -1], [-1, -1]]


async def test_float16_on_the_wire_gives_the_same_answer(model: HFExpert, tmp_path: Path) -> None:
    """Notes in float32 never leave the process; in float16 they give scores within 1e-2 and the same tokens."""
    module = interactions(("tiny2",), seed=3)
    own = composition(tmp_path / "artifact", ("tiny2",), module)
    _, notes = await noted(model, asked(LONG, 6))
    assert notes.states is not None
    assert notes.states.dtype == np.float16
    rng = np.random.default_rng(0)
    exact = notes.states.astype(np.float32) + rng.uniform(-1, 1, notes.states.shape) * 2.0**-12 * abs(notes.states)
    wide = replace(notes, digest=None, states=exact.astype(np.float32))
    narrow = replace(wide, states=wide.states.astype(np.float16))  # type: ignore[union-attr]
    rows = [
        await row_of(model, with_notes(asked(LONG, 8), left(each, "tiny2")), own.on(model)) for each in (wide, narrow)
    ]
    one, two = (scores_of(model, [row], 8)[:, 0] for row in rows)
    assert float((one - two).abs().max()) < 1e-2
    assert one.argmax(-1).tolist() == two.argmax(-1).tolist()


async def test_rows_of_every_kind_share_a_batch(folder: Path, reading: Composition, tmp_path: Path) -> None:
    """Two compositions, an ordinary request, an adapter, rows that leave notes; they join, leave, and are read in
    parts of 16 tokens: each answer is the one that it is alone."""
    saved = save_adapter(tmp_path / "a1", folder)
    adapter = Adapter(adapter_spec(saved), saved)
    other = composition(tmp_path / "other", ("sql",), interactions(("sql",), seed=9), name="other")
    async with loaded(folder, prefill_tokens=16) as model:
        asks = [
            partial(reading.on(model).generate, with_notes(asked(LONG, 30), some("sql"), some("med", 9))),
            partial(model.generate, asked("the end", 12)),
            partial(other.on(model).generate, with_notes(asked(LONG * 3, 9), some("sql", 20))),
            partial(model.generate, asked("of france", 20), adapter),
            partial(reading.on(model).generate, with_notes(asked("paris", 5), some("law", 2))),
            partial(other.on(model, adapter).generate, with_notes(asked(LONG, 14), some("sql", 2))),
            partial(model.generate, replace(asked(LONG * 2, 6), wants="latent")),
            partial(reading.on(model).generate, with_notes(asked("the answer", 25))),
        ]
        alone = [await said(ask()) for ask in asks]
        assert len({answer.text for answer in alone}) > 5
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


SCHEMA = {"schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
TOOLS = ({"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}},)


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": False},
        {"stop": ("e",)},
        {"format": "json", "json_schema": SCHEMA, "max_tokens": 40},
        {"tools": TOOLS, "tool_choice": "required", "max_tokens": 60},
        {"logprobs": 3, "prompt_logprobs": 2},
        {"temperature": 1.0, "seed": 5},
        {"echo": True},
        {"wants": "scores", "prompt_logprobs": 1},
    ],
    ids=["whole", "stop", "schema", "tools", "logprobs", "sampled", "echo", "scores"],
)
async def test_whatever_a_request_wants_is_done_with_notes(
    model: HFExpert, silent: Composition, fields: dict[str, Any]
) -> None:
    """With zero output weights the whole answer, chunk by chunk, is that of the first member."""
    request = asked("the capital", 16)
    if fields.get("echo"):
        request = GenerateRequest(prompt="the capital", max_tokens=16)
    request = replace(request, **fields)
    answer = await said(silent.on(model).generate(with_notes(request, some("sql"), some("law"))))
    plain = await said(model.generate(request))
    assert (answer.text, answer.reason, answer.usage) == (plain.text, plain.reason, plain.usage)
    assert [call for chunk in answer.chunks for call in chunk.tool_calls] == [
        replace(call, id=own.id)
        for call, own in zip(
            (call for chunk in plain.chunks for call in chunk.tool_calls),
            (call for chunk in answer.chunks for call in chunk.tool_calls),
            strict=True,
        )
    ]
    assert _logprobs(answer.chunks) == _logprobs(plain.chunks)
    assert answer.chunks[-1].value == plain.chunks[-1].value


async def test_the_adapter_of_the_artifact_takes_the_place_of_that_of_the_first_member(
    folder: Path, tmp_path: Path
) -> None:
    trained, before = (save_adapter(tmp_path / name, folder) for name in ("trained", "a1"))
    (before / "chat_template.jinja").write_text(
        "{{ messages[-1].content }} ->{% if add_generation_prompt %} {% endif %}"
    )
    own = composition(tmp_path / "artifact", PEERS, interactions(PEERS, reads=False), adapter=trained)
    without = composition(tmp_path / "without", PEERS, interactions(PEERS, reads=False))
    request = asked(LONG, 12)
    async with loaded(folder) as model:
        primary = Adapter(adapter_spec(before), before)
        answer = await said(own.on(model, primary).generate(with_notes(request, some("sql"))))
        untrained = await said(without.on(model, primary).generate(with_notes(request, some("sql"))))
        (trained / "chat_template.jinja").write_text((before / "chat_template.jinja").read_text())
        expected = await say(model, request, Adapter(adapter_spec(trained), trained))
        as_before = await say(model, request, primary)
    assert (answer.text, answer.usage) == (expected.text, expected.usage)  # its prompt is that of the first member
    assert untrained.text == as_before.text != answer.text


async def test_notes_beyond_the_limit_lose_the_front_and_are_named(model: HFExpert, tmp_path: Path) -> None:
    own = composition(tmp_path / "artifact", PEERS, interactions(PEERS), settings={"max_notes": 4})
    whole = some("sql", 9)
    last = left(Notes.unpack(whole.data).last(4))
    answers = [
        await said(own.on(model).generate(with_notes(asked(LONG, 6, logprobs=0), notes))) for notes in (whole, last)
    ]
    assert _logprobs(answers[0].chunks) == _logprobs(answers[1].chunks)
    assert answers[0].chunks[-1].notes == ("of 9 notes of sql the last 4 were read (max_notes)",)
    assert answers[1].chunks[-1].notes == ()


@pytest.mark.parametrize(
    ("notes", "reason"),
    [
        (some("chess"), r"'chess' is no peer of 'both'; its peers are sql, law, med"),
        (PeerNotes("sql", some("law").data), r"the notes of 'sql' for 'both' are those of 'law'"),
        (PeerNotes("sql", b"nothing"), r"the notes of 'sql' cannot be read: they are not safetensors"),
        (some("sql", digest="sha256:9"), r"another version of it: sha256:9; expected sha256:5"),
        (some("sql", layers=(3,)), r"are of the layers 3; expected that its head reads"),
        (
            some("sql", states=np.zeros((1, 5, 48), np.float16)),
            r"have \(layers, width\) \(1, 48\); expected \(1, 32\)",
        ),
        (
            left(Notes("sql", keys=np.zeros((4, 2, 0, 8), np.float16), values=np.zeros((4, 2, 0, 8), np.float16))),
            "are of the channel 'cache'; expected 'states'",
        ),
    ],
    ids=["no member", "another peer's", "damaged", "digest", "layers", "width", "channel"],
)
async def test_notes_that_do_not_fit_are_refused(
    model: HFExpert, reading: Composition, notes: PeerNotes, reason: str
) -> None:
    trained = reading.spec.model_copy(update={"trained_with": {"sql": "sha256:5"}})
    with pytest.raises(Rejected, match=reason):
        await said(Composition(trained, reading.folder).on(model).generate(with_notes(asked(LONG), notes)))
    assert (await say(model, asked(LONG))).reason == "length"  # the model answers others


async def test_huge_notes_are_refused_with_the_name_of_their_peer(model: HFExpert, reading: Composition) -> None:
    """float32 overflows where such states are normalised."""
    huge = some("sql", states=np.full((1, 5, 32), 3e38, np.float32))
    with pytest.raises(Rejected, match=r"the notes of 'sql' cannot be read: a state has the magnitude 3.0e\+38"):
        await said(reading.on(model).generate(with_notes(asked(LONG), some("law"), huge)))
    large = some("sql", states=np.full((1, 5, 32), -9e7, np.float32))
    assert (await said(reading.on(model).generate(with_notes(asked(LONG), large)))).reason == "length"


async def test_scores_that_are_not_finite_name_the_notes_that_were_read(model: HFExpert, tmp_path: Path) -> None:
    module = interactions(PEERS)
    with torch.no_grad():
        module.peer("sql").project.mul_(1e38)
    own = composition(tmp_path / "artifact", PEERS, module)
    with pytest.raises(EngineError, match=r"are not finite with the notes of sql: these notes, the composition that"):
        await said(own.on(model).generate(with_notes(asked(LONG), some("sql"))))
    assert (await said(own.on(model).generate(with_notes(asked(LONG), some("law"))))).reason == "length"


async def test_what_cannot_be_composed_is_refused(model: HFExpert, reading: Composition, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"'both' is composed of experts, and leaves no notes"):
        await said(reading.on(model).generate(replace(asked(LONG), wants="latent")))
    with pytest.raises(Unsupported, match=r"its member 'tiny' is served by str: serve it"):
        reading.on("a fake")  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match=r"'both' has no artifact"):
        Composition(reading.spec, None).on(model)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match=r"is not a trained composition"):
        await said(Composition(reading.spec, tmp_path).on(model).generate(asked(LONG)))
    wrong = composition(tmp_path / "wide", ("sql",), interactions(("sql",), interactions=1))
    narrow = tmp_path / "narrow"
    save_tiny(narrow, "LlamaForCausalLM", make_tokenizer(), hidden_size=16)
    async with loaded(narrow) as other:
        with pytest.raises(WeightsError, match=r"\(width, layers\) \(32, 4\); 'tiny' has \(16, 4\)"):
            await said(wrong.on(other).generate(asked(LONG)))
    limits = composition(tmp_path / "limits", PEERS, interactions(PEERS), settings={"max_notes": 0})
    with pytest.raises(ConfigError, match="max_notes must be an integer from 1 to 1,048,576, got 0"):
        await said(limits.on(model).generate(asked(LONG)))


async def test_notes_take_no_room_in_the_context(model: HFExpert, reading: Composition) -> None:
    """512 tokens: notes are no tokens of the first member."""
    request = with_notes(asked("the end " * 30, 300), some("sql", 600))
    assert (await said(reading.on(model).generate(replace(request, max_tokens=2)))).reason == "length"
    with pytest.raises(ContextLengthExceeded, match="'tiny' has a context of 512 tokens"):
        await said(reading.on(model).generate(replace(request, max_tokens=500)))


async def test_an_artifact_is_read_once(model: HFExpert, reading: Composition, monkeypatch: pytest.MonkeyPatch) -> None:
    from coe.engines.latent.artifact import Artifact

    reads: list[Path] = []
    original = Artifact.interactions
    monkeypatch.setattr(Artifact, "interactions", lambda self: reads.append(self.path) or original(self))
    await asyncio.gather(*(said(reading.on(model).generate(with_notes(asked(LONG), some("sql")))) for _ in range(4)))
    assert reads == [reading.folder]


async def test_cancelled_rows_that_read_leave_the_others_alone(model: HFExpert, reading: Composition) -> None:
    expected = await say(model, asked("the end", 30))
    running = asyncio.create_task(said(model.generate(asked("the end", 30))))
    chunks = reading.on(model).generate(with_notes(asked(LONG, 200), some("sql")))
    await anext(chunks)
    await chunks.aclose()
    assert (await running).text == expected.text
