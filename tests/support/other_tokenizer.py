"""A tiny tokenizer of another kind than that of `engine_models`: pieces with a mark for spaces, and single bytes."""

from __future__ import annotations

from typing import Any

TEMPLATE = "{% for m in messages %}Q: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"


def make_piece_tokenizer() -> Any:
    """BPE over characters as Gemma has it: a mark for spaces, unknown characters as bytes, no words beforehand."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("e", "n"), ("en", "d"), ("i", "s"), ("▁", "is"), ("a", "n")]
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    letters = [chr(c) for c in range(33, 127)] + ["▁", "\n"]
    vocabulary = special + [f"<0x{byte:02X}>" for byte in range(256)] + letters + ["".join(pair) for pair in merges]
    ids = {piece: i for i, piece in enumerate(dict.fromkeys(vocabulary))}
    raw = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
