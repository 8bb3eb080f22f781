"""Models with random weights of a real architecture, and adapters for them, made on this machine: no network is needed.

The tokenizer is made, too: bytes, and as many unused tokens as the architecture's vocabulary has, so that a prompt has
as many tokens as bytes, and any id that random weights generate has a text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

CHATML: Final = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES: Final[dict[str, dict[str, Any]]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    },
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "14b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
}
"""Dimensions of Qwen2.5, by size."""
CONTEXT: Final = 4096
RANK: Final = 16


def save_model(folder: Path, size: str, seed: int, device: str) -> Path:
    """A Qwen2 model in bfloat16, as `save_pretrained` writes it. Models of one size and other seeds have one shape."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer(SIZES[size]["vocab_size"])
    config = Qwen2Config(
        **SIZES[size],
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=size not in ("7b", "14b"),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model: Any = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer(n_tokens: int) -> Any:
    """Byte-level BPE without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    texts += [f"w{i}" for i in range(n_tokens - len(texts))]
    raw = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def save_adapter(folder: Path, model: Path, seed: int) -> Path:
    """A LoRA adapter with random weights on all linear layers of attention, as peft writes it."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    heads = config.hidden_size // config.num_attention_heads
    narrow = heads * config.num_key_value_heads
    outputs = {"q_proj": config.hidden_size, "k_proj": narrow, "v_proj": narrow, "o_proj": config.hidden_size}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, n_out in outputs.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("lora_A", (RANK, config.hidden_size)), ("lora_B", (n_out, RANK))):
                tensors[f"{prefix}.{part}.weight"] = 0.02 * torch.randn(shape, generator=generator)
    LoraConfig(r=RANK, lora_alpha=RANK, target_modules=sorted(outputs), task_type="CAUSAL_LM").save_pretrained(
        str(folder)
    )
    save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder
