"""An OpenAI endpoint that answers from a script: it calls tools, fills schemas, and streams both in fragments.

It stands for a capable remote model in the tests of the clients, where no small model would do. `scripted_replies` has
the script.

    python tests/support/scripted_endpoint.py --port 8100
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Final

from scripted_replies import CONTEXT, Reply, answer_to, limited, reply_to, text_of, tokens_of
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MODEL: Final = "scripted"


def _logprob(i: int) -> float:
    return -0.125 * (i + 1)


def _chat_logprobs(text: str, top: int) -> dict[str, Any]:
    """Scores of each token; the token is the most likely one."""
    content = []
    for i, token in enumerate(tokens_of(text)):
        entry = {"token": token, "logprob": _logprob(i), "bytes": list(token.encode())}
        others = [{"token": f"other{j}", "logprob": _logprob(i) - j, "bytes": None} for j in range(1, top)]
        content.append({**entry, "top_logprobs": [entry, *others][:top]})
    return {"content": content, "refusal": None}


def _message(reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None, "refusal": None}
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.calls:
        message["tool_calls"] = [
            {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for i, (name, arguments) in enumerate(reply.calls)
        ]
    return message


def _deltas(reply: Reply) -> Iterator[dict[str, Any]]:
    """The fragments of a streamed answer: arguments of tools come in pieces of five characters."""
    yield {"role": "assistant", "content": None if reply.calls else ""}
    for token in tokens_of(reply.reasoning or ""):
        yield {"reasoning_content": token}
    for token in tokens_of(reply.text):
        yield {"content": token}
    for i, (name, arguments) in enumerate(reply.calls):
        opening = {"index": i, "id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": ""}}
        yield {"tool_calls": [opening]}
        for piece in re.findall(r".{1,5}", json.dumps(arguments)):
            yield {"tool_calls": [{"index": i, "function": {"arguments": piece}}]}


def _prompt_words(body: dict[str, Any]) -> int:
    return sum(len(text_of(m.get("content")).split()) for m in body["messages"])


def _usage(prompt: int, reply_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": reply_tokens, "total_tokens": prompt + reply_tokens}


async def chat(request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    body = await _body(request)
    if body["model"] != MODEL:
        return _error(404, "model_not_found", f"The model `{body['model']}` does not exist.")
    prompt = _prompt_words(body)
    if prompt >= CONTEXT:
        text = f"This model's maximum context length is {CONTEXT} tokens. Your messages resulted in {prompt} tokens."
        return _error(400, "context_length_exceeded", text)
    reply, n = reply_to(body), body.get("n") or 1
    scores = _chat_logprobs(reply.text, body.get("top_logprobs") or 0) if body.get("logprobs") else None
    head = {"id": "chatcmpl-1", "created": int(time.time()), "model": body["model"]}
    usage = _usage(prompt, n * len(tokens_of(reply.text)))
    if not body.get("stream"):
        one = {"message": _message(reply), "finish_reason": reply.reason, "logprobs": scores}
        choices = [{"index": i, **one} for i in range(n)]
        return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": usage})
    return _events({**head, "object": "chat.completion.chunk"}, list(_chat_choices(reply, scores, n)), body, usage)


def _chat_choices(reply: Reply, scores: dict[str, Any] | None, n: int) -> Iterator[dict[str, Any]]:
    for i in range(n):
        left = list(scores["content"]) if scores else []
        for delta in _deltas(reply):
            scored = {"content": [left.pop(0)], "refusal": None} if left and delta.get("content") else None
            yield {"index": i, "delta": delta, "logprobs": scored, "finish_reason": None}
        yield {"index": i, "delta": {}, "logprobs": None, "finish_reason": reply.reason}


async def completion(request: Request) -> Response:
    """`POST /v1/completions`: text prompts, or arrays of token ids, which are read as words `t<id>`."""
    body = await _body(request)
    given = body["prompt"]
    several = given if isinstance(given, list) and given and isinstance(given[0], str | list) else [given]
    prompts = [p if isinstance(p, str) else " ".join(f"t{i}" for i in p) for p in several]
    choices, words = [], 0
    for prompt in prompts:
        reply = limited(Reply(" " + answer_to(prompt)), body)
        words += len(tokens_of(reply.text))
        choices += [_text_choice(body, prompt, reply, len(choices) + i) for i in range(body.get("n") or 1)]
    usage = _usage(sum(len(p.split()) for p in prompts), words)
    head = {"id": "cmpl-1", "object": "text_completion", "created": int(time.time()), "model": body["model"]}
    if not body.get("stream"):
        return JSONResponse({**head, "choices": choices, "usage": usage})
    pieces = [{**c, "text": t, "finish_reason": None} for c in choices for t in tokens_of(c["text"])]
    return _events(head, [*pieces, *({**c, "text": ""} for c in choices)], body, usage)


def _text_choice(body: dict[str, Any], prompt: str, reply: Reply, index: int) -> dict[str, Any]:
    text = (prompt if body.get("echo") else "") + reply.text
    logprobs = None
    if body.get("logprobs") is not None:
        tokens = tokens_of(text)
        values = [_logprob(i) for i in range(len(tokens))]
        offsets = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
        top: Sequence[dict[str, float] | None] = [{t: v} for t, v in zip(tokens, values, strict=True)]
        logprobs = {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reply.reason}


def _error(status: int, code: str, message: str) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status)


def _events(
    head: dict[str, Any], choices: list[dict[str, Any]], body: dict[str, Any], usage: dict[str, int]
) -> Response:
    counts = bool((body.get("stream_options") or {}).get("include_usage"))

    async def events() -> AsyncIterator[str]:
        for choice in choices:
            yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
        if counts:
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def _body(request: Request) -> dict[str, Any]:
    body: dict[str, Any] = await request.json()
    request.app.state.record(request.url.path, body)
    return body


async def models(request: Request) -> Response:
    """`GET /v1/models` and `/v1/models/scripted`."""
    model = {"id": MODEL, "object": "model", "created": 1, "owned_by": "test"}
    return JSONResponse(model if request.path_params else {"object": "list", "data": [model]})


async def health(request: Request) -> Response:
    """`GET /health`."""
    return JSONResponse({"status": "ok"})


def scripted_app(record: Callable[[str, dict[str, Any]], None] = lambda path, body: None) -> Starlette:
    """The endpoint as an ASGI application; `record` is called with the path and the body of each request."""
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completion, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{id:str}", models),
            Route("/health", health),
        ]
    )
    app.state.record = record
    return app


def main() -> None:
    """Serve until Ctrl-C."""
    import uvicorn

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=8100)
    uvicorn.run(scripted_app(), port=parser.parse_args().port, log_level="warning")


if __name__ == "__main__":
    main()
