"""Where the parts of a model are, and how keys move to other positions, of every supported architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latent_models import MODELS, tiny_model

from coe.engines.latent.cache_channel import moved
from coe.engines.latent.decoders import LAYOUTS, Decoder
from coe.errors import Unsupported

IDS = torch.arange(5, 20)[None]


def test_every_supported_architecture_is_tested() -> None:
    assert LAYOUTS.keys() == MODELS.keys()


@pytest.mark.parametrize("architecture", MODELS)
def test_the_outputs_of_the_layers_are_the_hidden_states_of_transformers(architecture: str) -> None:
    model = tiny_model(architecture)
    decoder = Decoder.of(model)
    seen: dict[int, torch.Tensor] = {}
    for layer in range(decoder.n_layers + 1):
        decoder.at(layer).register_forward_hook(lambda _m, _i, output, layer=layer: seen.update({layer: output}))
    with torch.inference_mode():
        output = model(IDS, output_hidden_states=True)
        last = decoder.head(seen[0])
    assert decoder.width == seen[0].shape[-1] == 32
    for layer in range(1, decoder.n_layers):
        assert torch.equal(seen[layer], output.hidden_states[layer])
    # What transformers lists last is what the head reads, after the final norm.
    assert torch.equal(seen[0], output.hidden_states[-1])
    assert torch.equal(last, output.logits)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("distance", [7, -3])
def test_moved_keys_are_those_of_the_same_states_at_other_positions(architecture: str, distance: int) -> None:
    """In the first layer, states do not depend on the positions, so its keys show the rotation alone."""
    model = tiny_model(architecture, num_hidden_layers=2, **_full(architecture))
    decoder, start = Decoder.of(model), 10
    keys, there = (_keys(model, position) for position in (start, start + distance))
    shown = moved(decoder, keys, distance)
    assert not torch.allclose(keys[0], there[0], atol=1e-3)
    torch.testing.assert_close(shown[0], there[0], atol=1e-5, rtol=1e-5)
    assert moved(decoder, keys, 0) is keys


def test_both_rotary_embeddings_of_gemma_are_used() -> None:
    """Layers with a window and without have other frequencies."""
    decoder = Decoder.of(tiny_model("Gemma3ForCausalLM", rope_parameters=_two_embeddings()))
    local, everywhere = decoder.rotation(0, 5), decoder.rotation(1, 5)
    assert decoder.config.layer_types[:2] == ["sliding_attention", "full_attention"]
    assert not torch.allclose(local[0], everywhere[0], atol=1e-3)
    for first in ("sliding_attention", "full_attention"):
        types = [first, "full_attention", "sliding_attention", "full_attention"]
        model = tiny_model("Gemma3ForCausalLM", rope_parameters=_two_embeddings(), layer_types=types)
        keys, there = (_keys(model, position) for position in (10, 15))
        torch.testing.assert_close(moved(Decoder.of(model), keys, 5)[0], there[0], atol=1e-5, rtol=1e-5)


def test_a_scaled_embedding_rotates_without_scaling_again() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
    model = tiny_model("LlamaForCausalLM", rope_parameters=yarn)
    decoder = Decoder.of(model)
    assert model.model.rotary_emb.attention_scaling != 1.0
    keys, there = _keys(model, 10), _keys(model, 17)
    torch.testing.assert_close(moved(decoder, keys, 7)[0], there[0], atol=1e-5, rtol=1e-5)


def test_keys_whose_frequencies_depend_on_the_length_are_not_moved() -> None:
    model = tiny_model("LlamaForCausalLM", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(Unsupported, match="rotary embedding 'dynamic', whose frequencies depend on the length"):
        Decoder.of(model).rotation(0, 1)


def test_an_unsupported_architecture_is_refused_with_the_list() -> None:
    import transformers

    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10)
    with pytest.raises(Unsupported, match=r"'old' is a GPT2LMHeadModel.*supported are LlamaForCausalLM, Gemma3For"):
        Decoder.of(transformers.GPT2LMHeadModel(config), expert="old")


def _keys(model: Any, position: int) -> torch.Tensor:
    """Keys (L, H, n, D) of some tokens that stand from this position on."""
    ids = IDS[:, :4]
    with torch.inference_mode():
        output = model(ids, position_ids=torch.arange(4)[None] + position, use_cache=True)
    return torch.stack([layer.keys[0] for layer in output.past_key_values.layers])


def _full(architecture: str) -> dict[str, Any]:
    return {"layer_types": ["sliding_attention", "full_attention"]} if architecture.startswith("Gemma3") else {}


def _two_embeddings() -> dict[str, Any]:
    return {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
