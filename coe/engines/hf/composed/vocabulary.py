"""Whether experts have the same token ids, so that their scores of the next token can be combined."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from coe.engines.hf.members import HFMember
from coe.errors import Unsupported

_DIGESTS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def check_vocabularies(name: str, members: Sequence[HFMember]) -> None:
    """Compare the token ids of all members with those of the first. Takes 0.1 s for the first request to a model.

    Args:
        name: of the composed expert.

    Raises:
        Unsupported: they differ; with the names of the members.
    """
    first, *others = members
    own = vocabulary_digest(first.expert.loaded.tokenizer)
    strange = [each for each in others if vocabulary_digest(each.expert.loaded.tokenizer) != own]
    if strange:
        sizes = ", ".join(f"{m.name!r} ({len(m.expert.loaded.tokenizer):,} tokens)" for m in strange)
        raise Unsupported(
            f"{name!r} combines the scores of tokens, so its members need one vocabulary: that of {first.name!r} "
            f"({len(first.expert.loaded.tokenizer):,} tokens) is not that of {sizes}. Combine these by text "
            "(`aggregate`) or by notes"
        )


def vocabulary_digest(tokenizer: Any) -> str:
    """A digest of the pairs of token and id; equal for tokenizers whose ids mean the same."""
    if (digest := _DIGESTS.get(tokenizer)) is None:
        pairs = json.dumps(sorted(tokenizer.get_vocab().items()), separators=(",", ":"))
        digest = _DIGESTS[tokenizer] = hashlib.sha256(pairs.encode()).hexdigest()
    return digest
