"""The zoo as its users run it: `coe serve` behind the official OpenAI client, and `coe batch` over a file."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from examples.zoo.report import Question, Result

if TYPE_CHECKING:
    from openai import AsyncOpenAI

COE: Final = Path(sys.executable).with_name("coe")
CLIENTS: Final = 32
"""Questions in flight at once."""
_STOP_S: Final = 60
_POLL_S: Final = 0.2

Say = Callable[[str], None]
"""Called with each line of progress."""


class Service:
    """`coe serve` in a separate process, on a free port.

    Args:
        say: called with what the service reports while it starts, line by line; by default it goes to stderr.
    """

    def __init__(self, config: Path, say: Say | None = None) -> None:
        self._port = _free_port()
        self._process = subprocess.Popen(
            [COE, "serve", "--config", config, "--port", str(self._port)],
            start_new_session=True,
            stderr=None if say is None else subprocess.PIPE,
            text=True,
        )
        if say is not None:
            _forward(self._process.stderr, say, without="Ctrl-C")  # the program around the service stops it

    def wait_ready(self) -> str:
        """The base URL for clients, once the service answers.

        Raises:
            RuntimeError: it ended before it was ready.
        """
        while not _is_healthy(self._port):
            if self._process.poll() is not None:
                raise RuntimeError(f"coe serve ended with status {self._process.returncode}")
            time.sleep(_POLL_S)
        return f"http://127.0.0.1:{self._port}/v1"

    def stop(self) -> None:
        """Ask the service to end; returns at once."""
        self._process.terminate()  # not SIGINT, which a shell may ignore for jobs in the background

    def wait_stopped(self) -> None:
        """Wait until all of its processes are gone."""
        self._process.wait(_STOP_S)


@contextmanager
def serving(config: Path) -> Iterator[str]:
    """`coe serve` on a free port while the block lasts; yields the base URL for clients.

    Raises:
        RuntimeError: it ended before it was ready; stderr has its error.
    """
    service = Service(config)
    try:
        yield service.wait_ready()
    finally:
        service.stop()
        service.wait_stopped()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_healthy(port: int) -> bool:
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def _forward(stream: IO[str] | None, say: Say, without: str | None = None) -> None:
    """Pass the lines of a child process on as they come."""
    assert stream is not None

    def pass_on() -> None:
        for line in stream:
            if line.strip() and not (without and line.strip().startswith(without)):
                say(line.rstrip())

    threading.Thread(target=pass_on, name="forward", daemon=True).start()


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
    url: str,
    questions: Sequence[Question],
    model: str,
    on_answer: Callable[[Question, Result], None],
    clients: int = CLIENTS,
) -> Served:
    """Send every question to `model` through the official client; every other answer is streamed.

    Args:
        on_answer: called with each answer as it comes.
        clients: questions in flight at once.
    """
    from openai import AsyncOpenAI

    places = asyncio.Semaphore(clients)

    async def one(client: AsyncOpenAI, question: Question) -> tuple[Result, float]:
        async with places:
            started = time.perf_counter()
            result = await (_streamed if question.id % 2 else _plain)(client, question, model)
            seconds = time.perf_counter() - started
        on_answer(question, result)
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
    """Answers of `coe batch`, in the order of the questions, and rows per second, loading the experts included."""

    results: Sequence[Result]
    rows_per_s: float


def run_batch(config: Path, questions: Sequence[Question], folder: Path, say: Say) -> Batched:
    """Write the questions as OpenAI batch lines, run `coe batch` over them, and read the answers back.

    Args:
        folder: holds the questions and the run afterwards; an earlier run in it is replaced.
        say: called with each line that the command reports.

    Raises:
        subprocess.CalledProcessError: it failed; its last lines went to `say`.
    """
    source, output, report = folder / "questions.jsonl", folder / "answers", folder / "run.json"
    shutil.rmtree(output, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"custom_id": f"{q.id:06}", "method": "POST", "url": "/v1/chat/completions", "body": body(q, "auto")}
        for q in questions
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    options = ["--config", config, "--input", source, "--out", output, "--json", report]
    _run([str(COE), "batch", *map(str, options)], say)
    answered = {line["custom_id"]: line for line in map(json.loads, (output / "results.jsonl").open(encoding="utf-8"))}
    run = json.loads(report.read_text(encoding="utf-8"))
    seconds = sum(session["seconds"] for session in run["sessions"])
    return Batched([_batched(answered[f"{q.id:06}"], q) for q in questions], len(questions) / seconds)


def _run(command: Sequence[str], say: Say) -> None:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line.strip():
                    say(line.rstrip())
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def _batched(line: dict[str, Any], question: Question) -> Result:
    answer = line["response"]["body"]
    text = answer["choices"][0]["message"]["content"]
    return Result(answer["model"], text, question.grade(text), answer["usage"]["completion_tokens"])
