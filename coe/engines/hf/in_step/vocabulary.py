"""Whether experts have the same token ids, so that their scores of the next token can be combined."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from coe.errors import Unsupported

_DIGESTS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def check_same_vocabulary(name: str, tokenizers: Mapping[str, Any]) -> None:
    """Compare the token ids of all members with those of the first. Takes 0.1 s for the first request to a model.

    Args:
        name: of the composed expert.
        tokenizers: of transformers, by the names of the members.

    Raises:
        Unsupported: they differ; with the names of the members.
    """
    first, *others = tokenizers
    own = vocabulary_digest(tokenizers[first])
    strange = [each for each in others if vocabulary_digest(tokenizers[each]) != own]
    if strange:
        sizes = ", ".join(f"{each!r} ({len(tokenizers[each]):,} tokens)" for each in strange)
        raise Unsupported(
            f"{name!r} combines the scores of tokens, so its members need one vocabulary: that of {first!r} "
            f"({len(tokenizers[first]):,} tokens) is not that of {sizes}. Combine these by text (`aggregate`) or notes"
        )


def vocabulary_digest(tokenizer: Any) -> str:
    """A digest of the pairs of token and id; equal for tokenizers whose ids mean the same."""
    if (digest := _DIGESTS.get(tokenizer)) is None:
        pairs = json.dumps(sorted(tokenizer.get_vocab().items()), separators=(",", ":"))
        digest = _DIGESTS[tokenizer] = hashlib.sha256(pairs.encode()).hexdigest()
    return digest
