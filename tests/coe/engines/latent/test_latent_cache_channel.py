"""Entries of a peer among those of the reader: the layout, the cache before the suffix, sliding windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from latent_models import MODELS, tiny_model

from coe.engines.latent.cache_channel import Columns, last_entries, lay_out, put
from coe.engines.latent.decoders import Decoder
from coe.engines.latent.notes import Notes
from coe.errors import Rejected

PROMPT, SUFFIX = [5, 9, 2, 7, 7, 3], [11, 4]
LIKE = torch.zeros(1)
TWO = ["LlamaForCausalLM", "Gemma3ForCausalLM"]


def answered(model: Any, prompt: list[int], answer: list[int], peer: str = "peer") -> tuple[Notes, Any]:
    """The notes of a peer that has read this answer token by token, and its cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([prompt]), past_key_values=cache)
        for token in answer:
            model(torch.tensor([[token]]), past_key_values=cache)
    keys, values = last_entries(cache, 0, len(answer))
    return Notes(
        peer,
        keys=keys.numpy(),
        values=values.numpy(),
        first=len(prompt),
        tokens=np.array(answer, np.int32),
        n_prompt=len(prompt),
    ), cache


def read(model: Any, columns: Columns, padding: int = 0) -> tuple[torch.Tensor, Any]:
    """Logits after the suffix, and the cache; the row has padding on its left, as in a batch."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = torch.tensor([[0] * padding + columns.ids])
    mask = torch.tensor([[0] * padding + [1] * len(columns.ids)])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    n_read = padding + columns.n_read
    with torch.inference_mode():
        for part in (slice(0, n_read), slice(n_read, None)):
            if part.start == n_read:
                for entries in columns.entries:
                    put(cache, 0, entries, padding=padding)
            if ids[:, part].shape[1]:
                output = model(
                    ids[:, part],
                    attention_mask=mask[:, : part.stop],
                    position_ids=positions[:, part],
                    past_key_values=cache,
                )
    return output.logits[0, -1], cache


@pytest.mark.parametrize("architecture", MODELS)
def test_entries_of_the_model_itself_are_those_of_its_own_reading(architecture: str) -> None:
    """A model that reads its own answer's entries is as if it had read the answer."""
    model = tiny_model(architecture)
    answer = [3, 8, 8, 20, 21, 22, 1, 2, 6, 12, 13]
    notes, cache = answered(model, PROMPT, answer)
    columns = lay_out(Decoder.of(model), PROMPT, [notes], SUFFIX, like=LIKE)
    assert columns.ids == [*PROMPT, *answer, *SUFFIX]
    assert (columns.n_prompt, columns.n_suffix, columns.n_read) == (6, 2, 17)
    logits, mine = read(model, columns)
    with torch.inference_mode():
        for token in SUFFIX:
            expected = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    n = len(answer)
    for own, theirs in zip(mine.layers, cache.layers, strict=True):
        kept = own.keys.shape[2] - len(SUFFIX)
        n_kept = min(n, kept)
        assert torch.equal(own.keys[0, :, kept - n_kept : kept], theirs.keys[0, :, kept - n_kept : kept])
        assert torch.equal(own.values[0, :, kept - n_kept : kept], theirs.values[0, :, kept - n_kept : kept])


@pytest.mark.parametrize("architecture", TWO)
@pytest.mark.parametrize("n_answer", [2, 11])
def test_what_was_read_in_the_places_of_entries_leaves_no_trace(architecture: str, n_answer: int) -> None:
    model, other = tiny_model(architecture), tiny_model(architecture, seed=1)
    notes, _ = answered(other, PROMPT, list(range(20, 20 + n_answer)))
    columns = lay_out(Decoder.of(model), PROMPT, [notes], SUFFIX, like=LIKE)
    dummies = Columns([*PROMPT, *[0] * n_answer, *SUFFIX], 6, 2, columns.entries)
    logits, _ = read(model, columns)
    again, _ = read(model, dummies)
    assert torch.equal(logits, again)
    without, _ = read(model, Columns(columns.ids, 6, 2, ()))
    assert not torch.allclose(logits, without, atol=1e-3)


@pytest.mark.parametrize("architecture", TWO)
def test_padding_changes_nothing(architecture: str) -> None:
    model, other = tiny_model(architecture), tiny_model(architecture, seed=1)
    peers = [answered(other, PROMPT, [20, 21, 22], "a")[0], answered(other, PROMPT[:4], [9, 10], "b")[0]]
    columns = lay_out(Decoder.of(model), PROMPT, peers, SUFFIX, like=LIKE)
    logits, _ = read(model, columns)
    padded, _ = read(model, columns, padding=5)
    torch.testing.assert_close(padded, logits, atol=1e-4, rtol=1e-4)


def test_entries_stand_one_after_the_other_and_only_those_elsewhere_are_moved() -> None:
    model = tiny_model("LlamaForCausalLM")
    decoder = Decoder.of(model)
    (first, _), (second, _) = answered(model, PROMPT, [20, 21], "a"), answered(model, PROMPT, [30], "b")
    columns = lay_out(decoder, PROMPT, [first, second], SUFFIX, like=LIKE)
    assert columns.ids == [*PROMPT, 20, 21, 30, *SUFFIX]
    assert [each.first for each in columns.entries] == [6, 8]
    assert first.keys is not None
    assert torch.equal(columns.entries[0].keys, torch.from_numpy(first.keys))
    assert not torch.equal(columns.entries[1].keys, torch.from_numpy(second.keys))
    # Where it stands does not change what an entry is: moved back, it is the same.
    there = lay_out(decoder, [*PROMPT, 1, 1], [second], SUFFIX, like=LIKE).entries[0]
    torch.testing.assert_close(columns.entries[1].keys, there.keys)


@pytest.mark.parametrize("peers", [(), (0,)])
def test_a_row_without_entries_has_its_prompt_alone(peers: tuple[int, ...]) -> None:
    model = tiny_model("LlamaForCausalLM")
    empty = [answered(model, PROMPT, [20, 21])[0].last(n) for n in peers]
    columns = lay_out(Decoder.of(model), PROMPT, empty, SUFFIX, like=LIKE)
    assert (columns.ids, columns.n_suffix, columns.entries) == (PROMPT, 0, ())


def test_what_does_not_fit_is_refused_with_what_was_expected() -> None:
    decoder = Decoder.of(tiny_model("LlamaForCausalLM"))
    notes, _ = answered(tiny_model("LlamaForCausalLM", num_hidden_layers=2), PROMPT, [20], "small")
    with pytest.raises(Rejected, match=r"of 'small' have \(layers, heads, width\) \(2, 2, 8\); expected \(4, 2, 8\)"):
        lay_out(decoder, PROMPT, [notes], SUFFIX, like=LIKE)
    states = Notes("other", states=np.zeros((1, 2, 32), np.float16), spans=np.full((2, 2), -1, np.int32))
    with pytest.raises(Rejected, match=r"'other' hold hidden states; expected key-value entries"):
        lay_out(decoder, PROMPT, [states], SUFFIX, like=LIKE)


def test_entries_beyond_the_range_of_the_cache_are_refused() -> None:
    model = tiny_model("LlamaForCausalLM")
    notes, _ = answered(model, PROMPT, [1, 2], peer="sql")
    assert notes.values is not None
    large = replace(notes, values=np.full_like(notes.values, 7e4))
    assert lay_out(Decoder.of(model), PROMPT, [large], SUFFIX, like=LIKE.bfloat16()).n_suffix == len(SUFFIX)
    with pytest.raises(Rejected, match=r"the key-value entries of 'sql' exceed the range of torch.float16"):
        lay_out(Decoder.of(model), PROMPT, [large], SUFFIX, like=LIKE.half())


def test_a_gradient_reaches_what_reads_the_entries_and_not_what_they_replace() -> None:
    from transformers import DynamicCache

    model = tiny_model("LlamaForCausalLM")
    notes, _ = answered(tiny_model("LlamaForCausalLM", seed=1), PROMPT, [20, 21])
    columns = lay_out(Decoder.of(model), PROMPT, [notes], SUFFIX, like=LIKE)
    embeddings = model.get_input_embeddings()(torch.tensor([columns.ids])).requires_grad_()
    cache = DynamicCache(config=model.config)
    model(inputs_embeds=embeddings[:, : columns.n_read], past_key_values=cache)
    for entries in columns.entries:
        put(cache, 0, entries)
    output = model(
        inputs_embeds=embeddings[:, columns.n_read :],
        past_key_values=cache,
        position_ids=torch.arange(columns.n_read, len(columns.ids))[None],
    )
    [gradient] = torch.autograd.grad(output.logits[0, -1].sum(), [embeddings])
    sizes = gradient[0].abs().sum(-1)
    assert bool((sizes[:6] > 0).all())
    assert bool((sizes[6:8] == 0).all())
    assert bool((sizes[8:] > 0).all())
