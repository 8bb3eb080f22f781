"""A tiny Llama that knows the class of each letter: at the letter in all layers, at the last token from layer 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = "ABCDEFGHIJKLMNOPQRSTUVWX"
"""Letters that are tokens of their own; those at even places have the class `x`, the others `y`."""
COPIED_AT = 3
"""The layer that copies the state of all tokens to the last one."""
N_LAYERS = 4


def class_of(word: str) -> str:
    return "xy"[WORDS.index(word) % 2]


def save_planted(folder: Path, tokenizer: Any) -> Path:
    """Layers change nothing, but COPIED_AT adds the mean over all tokens. The head answers the class, and ends."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    d = 32
    config = LlamaConfig(
        hidden_size=d,
        intermediate_size=32,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    half = torch.arange(d) < d // 2
    what, said = half.float(), (~half).float()  # directions: of the class, and of "the class was answered"
    for number, layer in enumerate(model.model.layers, 1):
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
        if number == COPIED_AT:
            layer.self_attn.q_proj.weight.data.zero_()  # the same weight for every token
            layer.self_attn.v_proj.weight.data = torch.eye(d)
            layer.self_attn.o_proj.weight.data = torch.eye(d)
    token = tokenizer.convert_tokens_to_ids
    embeddings, head = torch.randn(len(tokenizer), d) * 0.3, torch.zeros(len(tokenizer), d)
    for word in WORDS:
        embeddings[token(word)] += what * (1.0 if class_of(word) == "x" else -1.0)
    for answer, sign in (("x", 1.0), ("y", -1.0)):
        embeddings[token(answer)] += said * 50.0
        head[token(answer)] = what * sign
    head[tokenizer.eos_token_id] = said
    model.model.embed_tokens.weight.data, model.lm_head.weight.data = embeddings, head
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
