"""Sampling options beyond temperature and top_p, as OpenAI, vLLM and TGI name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """Options of decoding; the defaults change nothing.

    Attributes:
        top_k: sample from the k most likely tokens; 0 is all of them.
        min_p: sample from the tokens with at least this share of the probability of the most likely one.
        frequency_penalty, presence_penalty: subtracted from the logit of a generated token, per occurrence and once.
        repetition_penalty: divides positive logits of tokens of prompt and answer, and multiplies negative ones; 1 is
            none.
        logit_bias: token id -> value added to its logit.
        min_tokens: no end of the answer before so many tokens. ignore_eos: no end before the limit of tokens.
    """

    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    ignore_eos: bool = False


NO_OPTIONS: Final = SamplingOptions()
"""The default of every option."""
