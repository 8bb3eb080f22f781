"""The zoo as its users meet it: `coe serve` behind the official OpenAI client, and `coe batch` over a file."""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from examples.zoo.report import Question, Result

if TYPE_CHECKING:
    from openai import AsyncOpenAI

COE: Final = Path(sys.executable).with_name("coe")
CLIENTS: Final = 8
"""Questions in flight at once: what a small team asks."""


@contextmanager
def serving(config: Path) -> Iterator[str]:
    """`coe serve` on a free port while the block lasts; gives the base URL for clients.

    Raises:
        RuntimeError: it ended before it was ready; its own words are on stderr.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([COE, "serve", "--config", config, "--port", str(port)], start_new_session=True)
    try:
        while not _listening(port):
            if server.poll() is not None:
                raise RuntimeError(f"coe serve ended with status {server.returncode}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()  # not SIGINT, which whoever started us in the background may have switched off
        server.wait(60)


def _listening(port: int) -> bool:
    """Whether the service says that it is well."""
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


@dataclass(frozen=True, slots=True)
class Served:
    """Answers that came over HTTP.

    Attributes:
        seconds: of each request, from sending it to its end.
        wall_s: of all of them.
    """

    results: Sequence[Result]
    seconds: Sequence[float]
    wall_s: float

    @property
    def p50_s(self) -> float:
        """Median time of a request."""
        return statistics.median(self.seconds)


async def ask_service(
    url: str, questions: Sequence[Question], model: str, advance: Callable[[int], None], clients: int = CLIENTS
) -> Served:
    """Ask every question of `model` through the official client, the odd ones streamed.

    Args:
        advance: told how many are answered so far.
        clients: questions in flight at once.
    """
    from openai import AsyncOpenAI

    places = asyncio.Semaphore(clients)
    done = 0

    async def one(client: AsyncOpenAI, question: Question) -> tuple[Result, float]:
        nonlocal done
        async with places:
            started = time.perf_counter()
            result = await (_streamed if question.id % 2 else _plain)(client, question, model)
            seconds = time.perf_counter() - started
        done += 1
        advance(done)
        return result, seconds

    started = time.perf_counter()
    async with AsyncOpenAI(base_url=url, api_key="none", timeout=600) as client:
        answers = await asyncio.gather(*(one(client, question) for question in questions))
    results, seconds = zip(*answers, strict=True) if answers else ((), ())
    return Served(results, seconds, time.perf_counter() - started)


def body(question: Question, model: str) -> dict[str, Any]:
    """The question as a chat request."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": question.row.prompt}],
        "max_tokens": question.family.max_tokens,
    }


async def _plain(client: AsyncOpenAI, question: Question, model: str) -> Result:
    answer = await client.chat.completions.create(**body(question, model))
    text = answer.choices[0].message.content or ""
    assert answer.usage is not None  # the service always counts
    return Result(answer.model, text, question.grade(text), answer.usage.completion_tokens)


async def _streamed(client: AsyncOpenAI, question: Question, model: str) -> Result:
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    text, expert, tokens = "", "", 0
    async for chunk in await client.chat.completions.create(**body(question, model), **options):
        expert = chunk.model
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return Result(expert, text, question.grade(text), tokens)


@dataclass(frozen=True, slots=True)
class Batched:
    """Answers of `coe batch`, in the order of the questions; how many came a second, loading the experts included."""

    results: Sequence[Result]
    rows_per_s: float


def run_batch(config: Path, questions: Sequence[Question], folder: Path) -> Batched:
    """Write the questions as OpenAI batch lines, run `coe batch` over them, and read the answers back.

    Raises:
        subprocess.CalledProcessError: it failed; its own words are on stderr.
    """
    lines = [
        {"custom_id": f"{q.id:06}", "method": "POST", "url": "/v1/chat/completions", "body": body(q, "auto")}
        for q in questions
    ]
    source, output = folder / "questions.jsonl", folder / "answers"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    command = [COE, "batch", "--config", config, "--input", source, "--output", output, "--json", folder / "run.json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    answered = {line["custom_id"]: line for line in map(json.loads, (output / "results.jsonl").open(encoding="utf-8"))}
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    seconds = sum(session["seconds"] for session in run["sessions"])
    return Batched([_batched(answered[f"{q.id:06}"], q) for q in questions], len(questions) / seconds)


def _batched(line: dict[str, Any], question: Question) -> Result:
    answer = line["response"]["body"]
    text = answer["choices"][0]["message"]["content"]
    return Result(answer["model"], text, question.grade(text), answer["usage"]["completion_tokens"])
