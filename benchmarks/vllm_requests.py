"""One request of the benchmarks of the vLLM engine: over HTTP, to a Host, and to vLLM's AsyncLLM."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import aiohttp
from vllm_rivals import MODEL, Setup

from coe.engines.base import Adapter
from coe.host import Host
from coe.sampling import SamplingOptions
from coe.types import GenerateRequest
from routers.base import Message


@dataclass(frozen=True, slots=True)
class Served:
    """One answer: seconds to its first text and to its end, and its tokens."""

    first_s: float
    total_s: float
    prompt_tokens: int
    tokens: int


Ask = Callable[[str, str, int], Awaitable[Served]]
"""`(expert, prompt, tokens)`: sends a request, and reads the whole answer of so many tokens."""


async def over_http(session: aiohttp.ClientSession, url: str, expert: str, prompt: str, n_tokens: int) -> Served:
    return await stream(session, url, chat_body(expert, prompt, n_tokens))


async def in_host(host: Host, ending: str, expert: str, prompt: str, n_tokens: int) -> Served:
    request = GenerateRequest(
        messages=(Message("user", prompt),), max_tokens=n_tokens, sampling=SamplingOptions(ignore_eos=True)
    )
    start, first, usage = time.perf_counter(), 0.0, None
    async for chunk in host.ask(expert + ending, request):
        if not first and chunk.text:
            first = time.perf_counter() - start
        usage = chunk.usage
    assert usage is not None  # by the contract of the last chunk
    total = time.perf_counter() - start
    return Served(first or total, total, usage.prompt_tokens, usage.completion_tokens)


async def alone(host: Host, setup: Setup, stack: AsyncExitStack) -> Ask:
    """The AsyncLLM that the host has started, called as a program without the Host would."""
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    await in_host(host, "", MODEL, "Start.", 1)  # loads the model
    spec = host.snapshot.get(MODEL)
    expert: Any = host.cache.peek(spec.ref)
    running = await expert.core.live()
    loras: dict[str, Any] = {MODEL: None}
    for name, path in setup.adapters.items():
        lease = running.adapters.lease(Adapter(host.snapshot.get(name), path))
        loras[name] = await stack.enter_async_context(lease)
    ids = itertools.count()

    async def ask(expert: str, prompt: str, n_tokens: int) -> Served:
        start, first, n = time.perf_counter(), 0.0, 0
        chat = [{"role": "user", "content": prompt}]
        prompt_ids = running.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        params = SamplingParams(
            temperature=0.0, max_tokens=n_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        outputs = running.llm.generate(
            tokens_input(prompt_ids), params, f"alone-{next(ids)}", lora_request=loras[expert]
        )
        async for output in outputs:
            [completion] = output.outputs
            if not first and completion.text:
                first = time.perf_counter() - start
            n += len(completion.token_ids)
        total = time.perf_counter() - start
        return Served(first or total, total, len(prompt_ids), n)

    return ask


def chat_body(model: str, text: str, n_tokens: int) -> bytes:
    """A streamed, greedy chat request whose answer has exactly so many tokens."""
    return json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": n_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


async def stream(session: aiohttp.ClientSession, url: str, body: bytes) -> Served:
    """Send a chat request and read its events. Raises RuntimeError on anything but a whole answer."""
    start, first, usage = time.perf_counter(), 0.0, None
    async with session.post(f"{url}/v1/chat/completions", data=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{url} answered {response.status}: {(await response.read())[:300]!r}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if not first and any(choice["delta"].get("content") for choice in event.get("choices", ())):
                first = time.perf_counter() - start
            usage = event.get("usage") or usage
    if usage is None:
        raise RuntimeError(f"{url} sent no usage")
    total = time.perf_counter() - start
    return Served(first or total, total, usage["prompt_tokens"], usage["completion_tokens"])
