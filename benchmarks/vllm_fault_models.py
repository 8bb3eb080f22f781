"""The experts of `vllm_faults.py`: a base, weights of the same shape, adapters, and ones that vLLM cannot serve."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

TEXT = "the capital of france is paris, the end of the answer"
TORN_BYTES = 100
"""What is cut off at the end of a torn file."""


def write_experts(folder: Path, model: Path | None) -> list[dict[str, Any]]:
    """Write the models and adapters into `folder`; the entries of an experts file.

    Args:
        model: the base; None makes a tiny random Llama.
    """
    base = _copy(model, folder / "base") if model else tiny_llama(folder / "base")
    torn = _copy(base, folder / "torn-model")
    refused = _copy(base, folder / "refused-model")
    _without_a_tensor(refused / "model.safetensors")
    for name, rank in {"good": 4, "torn": 4, "high": 64}.items():
        _adapter(base, folder / name, rank)
    models = [{"name": each.name, "kind": "model", "source": str(each)} for each in (base, torn, refused)]
    adapters = [
        {"name": name, "kind": "adapter", "base": "base", "source": str(folder / name)}
        for name in ("good", "torn", "high")
    ]
    return [*({**each, "engine": "vllm"} for each in models), *adapters]


def tear(folder: Path) -> None:
    """Cut the end of the weights off, after they have been registered."""
    [file] = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-TORN_BYTES])


def tiny_llama(folder: Path) -> Path:
    """A random Llama with a tokenizer of 300 tokens; its heads are as wide as vLLM's kernels need."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([TEXT] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        initializer_range=0.3,  # wide, so that answers depend on prompts
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _copy(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    return folder


def _without_a_tensor(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    del tensors[max(name for name in tensors if "up_proj" in name)]
    save_file(tensors, file)


def _adapter(base: Path, folder: Path, rank: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about what it saves
        config = LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=["q_proj", "v_proj"])
        peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
        peft.save_pretrained(folder)
