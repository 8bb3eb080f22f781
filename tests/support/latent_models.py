"""Tiny random models of the architectures whose states can be exchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # wide, so that logits lie far apart and answers depend on the prompt
}
GEMMA = {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", {}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", GEMMA),
    "Qwen2ForCausalLM": ("Qwen2Config", {}),
    "Qwen3ForCausalLM": ("Qwen3Config", {"head_dim": 8}),
    "MistralForCausalLM": ("MistralConfig", {"head_dim": 8, "sliding_window": 8}),
}
"""Class -> its config's class and settings. Gemma mixes layers with and without a window; Mistral has windows only."""


def tiny_model(architecture: str, n_tokens: int = 64, *, seed: int = 0, **settings: Any) -> Any:
    """A model of this class, in evaluation mode."""
    import torch
    import transformers

    config, own = MODELS[architecture]
    torch.manual_seed(seed)
    made = getattr(transformers, config)(vocab_size=n_tokens, **SIZES | own | settings)
    return getattr(transformers, architecture)(made).eval().requires_grad_(False)


def save_tiny(folder: Path, architecture: str, tokenizer: Any, *, seed: int = 0, **settings: Any) -> Path:
    """The folder of such a model with this tokenizer, which never writes the end token by itself."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = tiny_model(architecture, len(tokenizer), seed=seed, tie_word_embeddings=False, **ids, **settings)
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
