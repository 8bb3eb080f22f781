"""The requests of `vllm bench serve` (backends `openai` and `openai-chat`), and how it reads the streams.

Bodies and reading are those of vllm/benchmarks/lib/endpoint_request_func.py of vLLM 0.32: the package itself is 2.7 GB.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from feature import CAPITAL, Endpoint, feature, main

TOKENS: Final = 8


@dataclass
class Measured:
    """What the benchmark takes from one stream."""

    text: str = ""
    output_tokens: int = 0
    prompt_tokens: int = 0
    ttft_s: float = 0.0
    n_chunks: int = 0


async def _measure(url: str, body: dict[str, Any]) -> Measured:
    measured, started, buffer = Measured(), time.perf_counter(), ""
    async with aiohttp.ClientSession(trust_env=False) as session, session.post(url, json=body) as response:
        if response.status != 200:
            raise Refused(response.status, await response.text())
        async for data in response.content.iter_any():
            buffer += data.decode()
            while "\n\n" in buffer:
                message, buffer = buffer.split("\n\n", 1)
                _take(measured, message.strip().removeprefix("data: "), started)
    return measured


def _take(measured: Measured, message: str, started: float) -> None:
    if not message or message.startswith(":") or message == "[DONE]":
        return
    data = json.loads(message)
    if choices := data.get("choices"):
        measured.ttft_s = measured.ttft_s or time.perf_counter() - started
        measured.n_chunks += 1
        measured.text += (choices[0]["delta"].get("content") if "delta" in choices[0] else choices[0].get("text")) or ""
    elif usage := data.get("usage"):
        measured.output_tokens, measured.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]


class Refused(Exception):
    """The endpoint answered with another status than 200."""

    def __init__(self, status_code: int, text: str) -> None:
        super().__init__(text)
        self.status_code = status_code


def _chat(at: Endpoint, **fields: Any) -> Measured:
    body = {
        "model": at.expert,
        "messages": [{"role": "user", "content": [{"type": "text", "text": CAPITAL}]}],
        "max_completion_tokens": TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    return asyncio.run(_measure(f"{at.url}/chat/completions", body))


def _completion(at: Endpoint, prompt: Any, **fields: Any) -> Measured:
    body = {
        "model": at.expert,
        "prompt": prompt,
        "repetition_penalty": 1.0,
        "max_tokens": TOKENS,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    return asyncio.run(_measure(f"{at.url}/completions", body))


def _is_whole(measured: Measured) -> None:
    assert measured.n_chunks > 1 and measured.ttft_s > 0 and measured.text
    assert 0 < measured.output_tokens <= TOKENS and measured.prompt_tokens > 0


@feature("stream")
def chat(at: Endpoint) -> None:
    _is_whole(_chat(at))


@feature("completions")
def completions(at: Endpoint) -> None:
    _is_whole(_completion(at, "The capital of France is"))


@feature("fixed length")
def fixed_length(at: Endpoint) -> None:
    """With `--ignore-eos` every answer has the length that the benchmark asks for."""
    chat, completion = _chat(at, ignore_eos=True), _completion(at, "The capital of France is", ignore_eos=True)
    _is_whole(chat), _is_whole(completion)
    assert at.scripted or chat.output_tokens == completion.output_tokens == TOKENS


@feature("sampling options")
def sampling(at: Endpoint) -> None:
    """`--temperature 0 --top-p 1 --top-k -1 --min-p 0 --frequency-penalty 0 ...`, all as given."""
    neutral = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
    penalties = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}
    _is_whole(_chat(at, **neutral, **penalties))


@feature("logprobs")
def logprobs(at: Endpoint) -> None:
    _is_whole(_completion(at, "The capital of France is", logprobs=1))


@feature("token arrays")
def token_arrays(at: Endpoint) -> None:
    """Random prompts of exact length are sent as token ids."""
    measured = _completion(at, [504, 3575, 282, 4649, 314])
    _is_whole(measured)
    assert measured.prompt_tokens == 5


if __name__ == "__main__":
    main("vllm", "0.32")
