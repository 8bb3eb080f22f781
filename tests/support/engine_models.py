"""What the tests of the engines share: a tiny tokenizer, specs, and whole answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coe.engines.base import Adapter
from coe.engines.hf.expert import HFExpert
from coe.types import Chunk, GenerateRequest, Usage
from registry.spec import ExpertSpec, Kind

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = 512
N_ADAPTERS = 4


@dataclass(frozen=True)
class Said:
    text: str
    reason: str | None
    usage: Usage | None
    chunks: tuple[Chunk, ...]


async def say(expert: HFExpert, request: GenerateRequest, adapter: Adapter | None = None) -> Said:
    chunks = [chunk async for chunk in expert.generate(request, adapter)]
    assert all(c.finish_reason is None and c.usage is None for c in chunks[:-1])
    return Said("".join(c.text for c in chunks), chunks[-1].finish_reason, chunks[-1].usage, tuple(chunks))


def make_tokenizer(text: str = "the capital of france is paris, the end of the answer", size: int = 300) -> Any:
    """Byte-level BPE with a few merges, of this text: characters outside ASCII, and most words, take several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([text] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def adapter_spec(folder: Path, **fields: Any) -> ExpertSpec:
    return ExpertSpec(name=folder.name, kind=Kind.ADAPTER, source=str(folder), base="tiny", **fields)


def model_spec(folder: Path, **fields: Any) -> ExpertSpec:
    return ExpertSpec(name="tiny", kind=Kind.MODEL, source=str(folder), **fields)


def save_tiny_model(folder: Path, tokenizer: Any, **settings: Any) -> Path:
    """A tiny random Llama, as `save_pretrained` writes it; `settings` are those of its config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,  # wide, so that logits lie far apart and answers depend on the prompt
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    LlamaForCausalLM(LlamaConfig(**config | settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, saving: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A LoRA adapter with random weights, as peft writes it; `settings` are those of its LoraConfig."""
    import warnings

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(len(folder.name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about ties and about what it saves
        config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings)
        peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
        peft.save_pretrained(folder, **saving or {})
    return folder


def wrapped_with(model: Any, adapters: dict[str, Any], folder: Path) -> Any:
    """A model wrapped by peft with random adapters, for reference; `low_rank` has the same ones, read from files.

    Args:
        adapters: name -> LoraConfig.
        folder: where their files are written.
    """
    import warnings

    from peft import get_peft_model

    from coe.engines.base import Adapter
    from coe.engines.hf.lora.adapter_files import read_adapter
    from coe.engines.hf.lora.base_parameters import BaseParameters
    from coe.engines.hf.lora.low_rank import LowRankAdapters

    low_rank, parameters = LowRankAdapters(model), BaseParameters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about ties
        first, *others = adapters
        peft: Any = get_peft_model(model, adapters[first], adapter_name=first)
        for name in others:
            peft.add_adapter(name, adapters[name])
        peft.save_pretrained(folder)
    for name in adapters:
        files = read_adapter(Adapter(adapter_spec(folder / name), folder / name), "base", parameters)
        assert low_rank.why_not(files.plan) is None
        low_rank.add(name, files)
    peft.low_rank = low_rank
    return peft.eval().requires_grad_(False)


def save_other_weights(model: Path, folder: Path) -> Path:
    """A copy of a model with other weights of the same shapes."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: each.flip(0).contiguous() for name, each in tensors.items()}, folder / "model.safetensors")
    return folder


def save_tiny_embedder(
    folder: Path, *, pooling: str = "mean", normalize: bool = True, most: int = 24, tensors_of: int = 0
) -> Path:
    """A tiny random BERT as sentence-transformers saves it; `tensors_of` seeds its weights."""
    import json

    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "capital", "of", "france", "is", "paris", "end"]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(tensors_of)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    BertModel(config).eval().save_pretrained(folder)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": most, "do_lower_case": False}))
    (folder / "1_Pooling").mkdir()
    way = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}[pooling]
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps(
            {
                "word_embedding_dimension": 64,
                f"pooling_mode_{way}": True,
                "pooling_mode_mean_tokens": way == "mean_tokens",
            }
        )
    )
    return folder
