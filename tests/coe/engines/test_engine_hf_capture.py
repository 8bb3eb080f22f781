"""Notes that rows leave: states of their tokens and entries of their answers, alone, in batches, read in parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import adapter_spec, make_tokenizer, save_adapter, say
from latent_experts import BOTH, LAYERS, asked, loaded, noted, said
from latent_models import save_tiny

from coe.engines.base import Adapter
from coe.engines.chat import encode_text
from coe.engines.hf.expert import HFExpert
from coe.engines.hf.notes import capture
from coe.engines.latent.notes import Notes
from coe.errors import ContextLengthExceeded, Rejected, Unsupported
from coe.types import GenerateRequest, NotesWanted

FP16 = {"atol": 5e-3, "rtol": 5e-3}
LONG = "the capital of france is paris, the end of the answer"


@pytest.fixture(scope="module", params=BOTH)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("capture") / request.param, request.param, make_tokenizer())


@pytest.fixture
async def model(folder: Path) -> AsyncIterator[HFExpert]:
    async with loaded(folder) as expert:
        yield expert


def _ids(model: HFExpert, request: GenerateRequest) -> list[int]:
    """The tokens of a prompt."""
    loaded = model.loaded
    assert loaded is not None
    text = request.prompt
    if text is None:
        text = f"<|im_start|>user\n{request.messages[-1].content}<|im_end|>\n<|im_start|>assistant\n"
    return encode_text(loaded.tokenizer, text)


def _whole(model: HFExpert, ids: list[int]) -> Any:
    """One forward of all tokens, without a cache."""
    loaded = model.loaded
    assert loaded is not None
    with torch.inference_mode():
        return loaded.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)


@pytest.mark.parametrize("places", ["speaking", "all"])
@pytest.mark.parametrize("layers", [(), (4, 2)])
async def test_states_are_those_of_one_forward_of_prompt_and_answer(
    model: HFExpert, places: str, layers: tuple[int, ...]
) -> None:
    request = asked(LONG)
    answer, notes = await noted(model, request, layers=layers, places=places)
    plain = await say(model, request)
    assert (answer.text, answer.reason, answer.usage) == (plain.text, plain.reason, plain.usage)
    prompt = _ids(model, request)
    assert (notes.peer, notes.n_prompt, notes.layers) == ("tiny", len(prompt), layers)
    assert notes.digest
    assert len(notes.tokens) == 8
    whole = _whole(model, [*prompt, *notes.tokens.tolist()])
    first = 0 if places == "all" else len(prompt) - 1
    assert notes.states is not None
    assert notes.states.dtype == np.float16
    assert notes.states.shape == (max(1, len(layers)), len(prompt) + 8 - first, 32)
    for place, layer in enumerate(layers or (0,)):
        expected = whole.hidden_states[-1] if layer == 0 else _after(model, [*prompt, *notes.tokens.tolist()], layer)
        torch.testing.assert_close(torch.from_numpy(notes.states[place]).float(), expected[0, first:], **FP16)


def _after(model: HFExpert, ids: list[int], layer: int) -> torch.Tensor:
    """The output of a layer, before the final norm."""
    loaded = model.loaded
    assert loaded is not None
    kept: list[torch.Tensor] = []
    hook = loaded.model.model.layers[layer - 1].register_forward_hook(lambda _m, _i, output: kept.append(output))
    _whole(model, ids)
    hook.remove()
    return kept[0]


async def test_only_the_prompt_is_read_if_no_answer_is_wanted(model: HFExpert) -> None:
    request = asked("the end")
    answer, notes = await noted(model, request, answer=False, places="all")
    prompt = _ids(model, request)
    assert (answer.text, answer.reason) == ("", "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 0)
    assert (len(notes), len(notes.tokens)) == (len(prompt), 0)
    _, speaking = await noted(model, request, answer=False)
    assert notes.states is not None
    assert speaking.states is not None
    np.testing.assert_array_equal(speaking.states, notes.states[:, -1:])


async def test_a_prompt_that_is_only_read_may_take_the_context(model: HFExpert) -> None:
    request = asked("the end " * 10, 500)
    n_prompt = len(_ids(model, request))
    with pytest.raises(ContextLengthExceeded, match="max_tokens is 500, but 'tiny' has a context of 512 tokens"):
        await noted(model, request)
    _, notes = await noted(model, request, answer=False, places="all")
    assert len(notes) == n_prompt
    with pytest.raises(ContextLengthExceeded, match="'tiny' has a context of 512 tokens"):
        await noted(model, asked("the end " * 400, 1), answer=False)


async def test_spans_are_of_the_user_text(model: HFExpert) -> None:
    text = "café 🇫🇷\r\nthe end"
    _, notes = await noted(model, asked(text), places="all")
    assert notes.spans is not None
    n_answer = len(notes.tokens)
    assert (notes.spans[-n_answer:] == -1).all()
    real = notes.spans[notes.spans[:, 0] >= 0]
    assert {place for start, end in real.tolist() for place in range(start, end)} == set(range(len(text)))
    # The template in front and behind has none.
    assert (notes.spans[:3] == -1).all()
    assert (notes.spans[notes.n_prompt - 3 : notes.n_prompt] == -1).all()
    _, raw = await noted(model, GenerateRequest(prompt=text, max_tokens=2), places="all")
    assert raw.spans is not None
    assert raw.spans[: raw.n_prompt].min() == 0
    _, ids = await noted(model, GenerateRequest(prompt="", prompt_ids=(5, 9, 9), max_tokens=2), places="all")
    assert ids.spans is not None
    assert (ids.spans == -1).all()


async def test_entries_are_those_of_a_forced_decode_of_the_answer(model: HFExpert) -> None:
    from transformers import DynamicCache

    request = asked(LONG, 20)
    answer, notes = await noted(model, request, channel="cache")
    plain = await say(model, request)
    assert (answer.text, answer.usage) == (plain.text, plain.usage)
    prompt = _ids(model, request)
    assert (notes.first, notes.n_prompt, len(notes)) == (len(prompt), len(prompt), 20)
    own = model.loaded
    assert own is not None
    cache = DynamicCache(config=own.model.config)
    with torch.inference_mode():
        own.model(torch.tensor([prompt]), past_key_values=cache)
        for token in notes.tokens.tolist():
            own.model(torch.tensor([[token]]), past_key_values=cache)
    for layer, kept in enumerate(cache.layers):
        n = min(20, kept.keys.shape[2])
        for name in ("keys", "values"):
            left = torch.from_numpy(getattr(notes, name)[layer])
            assert torch.equal(left[:, 20 - n :], getattr(kept, name)[0, :, -n:].half())
            assert not left[:, : 20 - n].any()  # beyond a sliding window


@pytest.mark.parametrize("channel", ["states", "cache"])
async def test_an_answer_that_ends_early_is_whole(model: HFExpert, channel: str) -> None:
    """Whatever ends an answer, its last token has a place; an end token has none."""
    request = asked("the capital", 7)  # within the window of Gemma
    whole, notes = await noted(model, request, channel=channel)
    stop = whole.text[1:3]
    cut, of_cut = await noted(model, replace(request, stop=(stop,)), channel=channel)
    plain = await say(model, replace(request, stop=(stop,)))
    assert (cut.text, cut.reason, cut.usage) == (plain.text, "stop", plain.usage)
    n = len(of_cut.tokens)
    assert cut.usage is not None
    assert 0 < n == cut.usage.completion_tokens < len(notes.tokens)
    assert of_cut.tokens.tolist() == notes.tokens[:n].tolist()
    places = n + 1 if channel == "states" else n
    assert len(of_cut) == places
    before = (notes.states if channel == "states" else notes.keys)[..., :places, :]  # type: ignore[index]
    now = of_cut.states if channel == "states" else of_cut.keys
    np.testing.assert_allclose(before, now, **FP16)


async def test_an_end_token_is_no_place(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    folder = save_tiny(tmp_path / "ends", "LlamaForCausalLM", tokenizer)
    async with loaded(folder) as model:
        _, notes = await noted(model, asked("the capital", 12))
        own = model.loaded
        assert own is not None
        # From here on the fourth token ends an answer.
        model._preparation._loaded = replace(own, eos=own.eos | {int(notes.tokens[3])})
        first = notes.tokens.tolist().index(int(notes.tokens[3]))
        answer, short = await noted(model, asked("the capital", 12))
        _, entries = await noted(model, asked("the capital", 12), channel="cache")
        assert answer.reason == "stop"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == first + 1
        assert short.tokens.tolist() == entries.tokens.tolist() == notes.tokens[:first].tolist()
        assert (len(short), len(entries)) == (first + 1, first)
        # An answer of an end token alone leaves the place where the expert was about to speak, and no entry.
        model._preparation._loaded = replace(own, eos=own.eos | {int(notes.tokens[0])})
        _, none = await noted(model, asked("the capital", 12))
        _, no_entries = await noted(model, asked("the capital", 12), channel="cache")
        assert (len(none), len(no_entries)) == (1, 0)


async def test_notes_in_a_changing_batch_are_those_of_one_row(folder: Path, tmp_path: Path) -> None:
    """Rows of several lengths with adapters and without join and leave; prompts are read in parts of 16 tokens."""
    saved = save_adapter(tmp_path / "a1", folder)
    adapter = Adapter(adapter_spec(saved), saved)
    wants: list[tuple[GenerateRequest, Adapter | None, dict[str, Any]]] = [
        (asked("the end", 30), None, {}),
        (asked(LONG * 3, 5), adapter, {"places": "all", "layers": (1, 3)}),
        (asked("of france", 12), None, {"channel": "cache"}),
        (asked(LONG, 9), adapter, {"channel": "cache"}),
        (asked(LONG * 2, 4), None, {"answer": False, "places": "all"}),
        (asked("paris", 17), None, {"places": "all"}),
    ]
    async with loaded(folder, prefill_tokens=16) as model:
        alone = [await noted(model, request, own, **wanted) for request, own, wanted in wants]
        ordinary = await say(model, asked("the answer is", 25))
        running = asyncio.create_task(say(model, asked("the answer is", 25)))
        others = []
        for request, own, wanted in wants:
            others.append(asyncio.create_task(noted(model, request, own, **wanted)))
            await asyncio.sleep(0.01)
        batched = await asyncio.gather(*others)
        assert (await running).text == ordinary.text
    for (answer, notes), (other, again) in zip(alone, batched, strict=True):
        assert (answer.text, answer.usage, answer.reason) == (other.text, other.usage, other.reason)
        _same(notes, again)


def _same(notes: Notes, again: Notes) -> None:
    assert (notes.channel, notes.layers, notes.n_prompt, notes.first) == (
        again.channel,
        again.layers,
        again.n_prompt,
        again.first,
    )
    assert notes.digest == again.digest
    for name in ("states", "keys", "values", "spans", "tokens"):
        one, two = getattr(notes, name), getattr(again, name)
        assert (one is None) == (two is None)
        if one is not None:
            np.testing.assert_allclose(one.astype(np.float32), two.astype(np.float32), **FP16)


async def test_an_adapter_has_an_identity_of_its_own(folder: Path, tmp_path: Path) -> None:
    saved = save_adapter(tmp_path / "a1", folder)
    async with loaded(folder) as model:
        _, base = await noted(model, asked("the end"))
        _, tuned = await noted(model, asked("the end"), Adapter(adapter_spec(saved), saved))
    assert (base.peer, tuned.peer) == ("tiny", "a1")
    assert base.digest
    assert tuned.digest
    assert tuned.digest.endswith(f" on {base.digest}")


async def test_sampled_answers_leave_notes_of_what_was_drawn(model: HFExpert) -> None:
    request = asked(LONG, 10, temperature=1.0, seed=3)
    answer, notes = await noted(model, request)
    plain = await say(model, request)
    assert answer.text == plain.text
    own = model.loaded
    assert own is not None
    assert own.tokenizer.decode(notes.tokens) == answer.text


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (NotesWanted(layers=(2, 5)), f"has {LAYERS} layers; notes are wanted of layer 5"),
        (NotesWanted(layers=(1, 2), places="all"), r"the notes of 'tiny' may take [\d,]+ bytes, and the most is 2,000"),
        (NotesWanted("cache"), r"the notes of 'tiny' may take [\d,]+ bytes, and the most is 2,000"),
    ],
)
async def test_what_cannot_be_noted_is_refused(
    model: HFExpert, wanted: NotesWanted, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "MOST_BYTES", 2000)
    with pytest.raises(Rejected, match=reason):
        await said(model.generate(replace(asked(LONG, 8), wants="latent", notes_wanted=wanted)))
    # The limit itself is allowed: 8 tokens and one of the prompt, 32 wide, 2 bytes each.
    monkeypatch.setattr(capture, "MOST_BYTES", 9 * 32 * 2)
    _, notes = await noted(model, asked(LONG, 8))
    assert len(notes) == 9


async def test_an_unsupported_architecture_leaves_no_notes(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = make_tokenizer()
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=len(tokenizer), n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "old")
    tokenizer.save_pretrained(tmp_path / "old")
    async with loaded(tmp_path / "old") as model:
        with pytest.raises(Unsupported, match="'tiny' is a GPT2LMHeadModel.*supported are LlamaForCausalLM"):
            await noted(model, asked("the end"))
        assert (await say(model, asked("the end"))).reason == "length"
