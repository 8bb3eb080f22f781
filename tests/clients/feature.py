"""What every client's file shares: the questions, and a runner that prints one JSON line a feature.

It needs the standard library only, so it runs in the environment of any client:

    python tests/clients/client_openai.py --url http://127.0.0.1:8000/v1 --expert scripted

Outcomes: `works` (the assertions hold), `refused` (the client raised an error with a 4xx status and the server's
message), `fails` (anything else). A feature that a client's file does not have is one that the client lacks. Some
features need an expert that does what the script says, others one with real probabilities; they are left out elsewhere.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from typing import Final

CAPITAL: Final = "What is the capital of France?"
WEATHER: Final = "What is the weather in Paris?"
TWO_CITIES: Final = "What is the weather in Paris and in Rome?"
PERSON: Final = "Ada Lovelace is 36 years old. Extract the person as JSON."
OBJECT: Final = 'Ada Lovelace is 36 years old. Extract the person as JSON: {"name": "...", "age": ...}'
"""For a JSON object without a schema: the question states its form, as small models need it."""
REPORT: Final = "18 degrees and sunny"
"""What the weather tool returns."""
LONG: Final = "word " * 20_000
"""A prompt longer than any expert's context."""
PIXEL: Final = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@dataclass(frozen=True)
class Endpoint:
    """Where a client sends its requests. expert: the `model` of a request; scripted: it answers from the script."""

    url: str
    expert: str

    @property
    def scripted(self) -> bool:
        return self.expert == "scripted"


@dataclass(frozen=True)
class Outcome:
    """What happened to one feature; see the module."""

    feature: str
    outcome: str
    detail: str
    seconds: float


Run = Callable[[Endpoint], None]


@dataclass(frozen=True)
class Feature:
    """The function that shows a feature. scripted: it needs the scripted expert (true), a real one (false), or any."""

    run: Run
    scripted: bool | None


FEATURES: Final[dict[str, Feature]] = {}
"""The features of the client, by name."""


def feature(name: str, *, scripted: bool | None = None) -> Callable[[Run], Run]:
    """Register the function that shows a feature."""

    def register(run: Run) -> Run:
        assert name not in FEATURES, name
        FEATURES[name] = Feature(run, scripted)
        return run

    return register


@contextmanager
def raises(*kinds: type[BaseException]) -> Iterator[list[BaseException]]:
    """The block must raise one of the kinds; the error is the list's element."""
    caught: list[BaseException] = []
    try:
        yield caught
    except kinds as error:
        caught.append(error)
    else:
        raise AssertionError(f"no {' or '.join(kind.__name__ for kind in kinds)} was raised")


def outcome_of(name: str, endpoint: Endpoint) -> Outcome:
    """Run one feature."""
    started = time.perf_counter()
    result, detail = "works", ""
    try:
        FEATURES[name].run(endpoint)
    except Exception as error:
        refusal = _refusal(error)
        result, detail = (
            ("fails", "".join(traceback.format_exception(error))) if refusal is None else ("refused", refusal)
        )
    return Outcome(name, result, detail, round(time.perf_counter() - started, 3))


def _refusal(error: BaseException | None) -> str | None:
    """The message of a 4xx answer among an error and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen and not isinstance(error, AssertionError):
        seen.add(id(error))
        status = getattr(error, "status_code", None)
        if isinstance(status, int) and 400 <= status < 500:
            return _message(error)
        error = error.__cause__ or error.__context__
    return None


def _message(error: BaseException) -> str:
    """The server's message, whatever the client wraps around it."""
    body = getattr(error, "body", None)
    if isinstance(body, dict):
        body = body.get("error", body)
    return str(body["message"] if isinstance(body, dict) and "message" in body else error)


def main(package: str, version: str | None = None) -> None:
    """Run the features of the calling file, and print a line each. version: default that of the installed package."""
    parser = argparse.ArgumentParser(description=f"Run the features of {package} against an endpoint.")
    parser.add_argument("--url", required=True, help="base URL, with /v1")
    parser.add_argument("--expert", default="scripted", help="`model` of the requests")
    parser.add_argument("--only", action="append", help="run this feature only; may be repeated")
    options = parser.parse_args()
    os.environ.setdefault("OPENAI_API_KEY", "none")
    lines, at = sys.stdout, Endpoint(options.url, options.expert)
    print(
        json.dumps({"client": package, "version": version or importlib.metadata.version(package)}),
        file=lines,
        flush=True,
    )
    with redirect_stdout(sys.stderr):  # clients print too
        for name, shown in FEATURES.items():
            if shown.scripted in (None, at.scripted) and (not options.only or name in options.only):
                print(json.dumps(asdict(outcome_of(name, at))), file=lines, flush=True)
