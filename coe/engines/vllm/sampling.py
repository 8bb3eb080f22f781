"""A request as arguments of vLLM's SamplingParams. Pure: vLLM is not imported."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from coe.types import GenerateRequest

_SEEDS: Final = 2**63
"""vLLM takes seeds below this, and reads -1 as none."""


def sampling_arguments(request: GenerateRequest, *, max_tokens: int, ends: Collection[int]) -> dict[str, Any]:
    """Arguments of `SamplingParams`, without output kind and structured output.

    Args:
        max_tokens: most new tokens; 0, which vLLM does not take, asks for one that the caller drops.
        ends: tokens that end an answer.
    """
    options = request.sampling
    return {
        "max_tokens": max(1, max_tokens),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": options.top_k,
        "min_p": options.min_p,
        "seed": None if request.seed is None else request.seed % _SEEDS,
        "stop": list(request.stop),
        "stop_token_ids": [] if options.ignore_eos else sorted(ends),
        "ignore_eos": options.ignore_eos,
        "min_tokens": min(options.min_tokens, max(1, max_tokens)),
        "frequency_penalty": options.frequency_penalty,
        "presence_penalty": options.presence_penalty,
        "repetition_penalty": options.repetition_penalty,
        "logit_bias": dict(options.logit_bias) or None,
        "logprobs": request.logprobs,
        "prompt_logprobs": _prompt_logprobs(request),
        "spaces_between_special_tokens": False,
    }


def _prompt_logprobs(request: GenerateRequest) -> int | None:
    return 0 if request.prompt_logprobs is None and request.wants == "scores" else request.prompt_logprobs
