"""`coe chat`: piped lines, a terminal, and a running service."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server import gateway
from batch_runs import save_router, service
from terminal import CTRL_C, CTRL_D, terminal
from typer.testing import CliRunner

from coe.cli.app import app


@pytest.fixture
def config(tmp_path: Path) -> Path:
    save_router(tmp_path / "router")
    return service(tmp_path, "{default: {router: router}, loud: {expert: loud}}")


@pytest.fixture
def url() -> Iterator[str]:
    """A running service, in its own thread."""
    found: list[str] = []
    ready, loop = threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with gateway() as running:
            found.append(running.url)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(30)
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()


def talk(lines: str, *words: object, ok: bool = True) -> Any:
    result = CliRunner().invoke(app, ["chat", *map(str, words)], input=lines)
    assert (result.exit_code == 0) is ok, result.output
    return result


def test_piped_lines_are_answered_in_turn(config: Path) -> None:
    result = talk("say one\nsay two\n", "--config", config)
    assert result.stdout == "say one\nsay two\n"
    assert result.stderr.count("base:") == 2


def test_the_conversation_is_kept_and_can_be_forgotten(config: Path) -> None:
    lines = "one\ntwo\n/reset\nthree\n"
    document = json.loads(talk(lines, "-c", config, "--system", "be brief", "--json", "-").stdout)
    assert [(one["role"], one["content"]) for one in document["messages"]] == [
        ("system", "be brief"),
        ("user", "three"),
        ("assistant", "three"),
    ]
    document = json.loads(talk("one\ntwo\n", "-c", config, "--json", "-").stdout)
    assert [one["content"] for one in document["messages"]] == ["one", "one", "two", "two"]


def test_why_shows_the_decision_and_the_estimates(config: Path) -> None:
    result = talk("/why\nhello\n/why\n/model coe/loud\nhello\n/why\n/model tuned\nhello\n/why\n", "-c", config)
    parts = ["there is no answer yet", "base answered: policy default, confidence", "expected score"]
    parts += ["coe/loud answers", "loud answered: policy loud, confidence 1.00: the policy names this expert"]
    places = [result.stderr.index(part) for part in [*parts, "tuned answered: you named it"]]
    assert places == sorted(places)
    assert result.stdout == "hello\nHELLO\n[tuned] HELLO\n"


def test_why_shows_the_price_of_leaving_the_previous_expert(tmp_path: Path) -> None:
    save_router(tmp_path / "router")
    config = service(tmp_path, "{default: {router: router, switch_weight: 1}}")
    first, second = (talk(lines, "-c", config).stderr for lines in ("hello\n/why\n", "hello\nagain\n/why\n"))
    assert "previous expert" not in first
    assert "previous expert: base; " in second and "to prefill elsewhere, which costs up to 0.0" in second


def test_models_are_listed_checked_and_changed(config: Path) -> None:
    lines = "/model\n/model loud\n/model\nhello\n/model luod\n/modle\n/help\n/quit\nnever\n"
    result = talk(lines, "-c", config, ok=False)
    assert "* auto\n  coe/default\n  coe/loud\n  base\n" in result.stderr and "* loud" in result.stderr
    assert "did you mean 'loud'?" in result.stderr and "there is no command /modle" in result.stderr
    assert "/why            why this expert answered" in result.stderr
    assert result.stdout == "HELLO\n"


def test_an_expert_that_fails_does_not_end_the_conversation(config: Path) -> None:
    result = talk("hello\n/model base\nhello\n", "-c", config, "--model", "broken", ok=False)
    assert "error: " in result.stderr and result.stdout == "hello\n"


def test_it_needs_to_know_where_the_answers_come_from(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config.parent)
    missing = " ".join(talk("", ok=False).output.replace("│", " ").split())
    assert "no coe.yaml here: `coe init` writes one" in missing and "or a running service with --url" in missing
    assert "give either" in talk("", "-c", config, "--url", "http://x", ok=False).output
    error = talk("", "-c", config, "--model", "nope", ok=False).exception
    assert "'nope' is not in" in str(error)


def test_a_running_service(url: str) -> None:
    lines = "hello\n/why\n/model upper\nhello\n/why\n/model\n/model broken\nhello\n"
    result = talk(lines, "--url", url, ok=False)
    assert result.stdout.startswith("hello\nHELLO\n")
    assert "echo answered: policy default" in result.stderr and "expected score" in result.stderr
    assert "upper answered: you named it" in result.stderr
    assert "  coe/safe" in result.stderr and "* upper" in result.stderr
    assert "error: " in result.stderr


def test_a_service_that_does_not_run(url: str) -> None:
    error = talk("hello\n", "--url", "http://127.0.0.1:1", ok=False).exception
    assert "cannot be reached" in str(error) and "is the service running?" in str(error)
    error = talk("hello\n", "--url", "nowhere", ok=False).exception
    assert "is not a URL like http://" in str(error)


def test_on_a_terminal_ctrl_c_stops_an_answer_and_twice_leaves(tmp_path: Path) -> None:
    slow = service(tmp_path, "{default: {expert: base}}", "engines: {fake: {token_delay_s: 0.2}}\n")
    with terminal("chat", "-c", str(slow), cwd=tmp_path) as screen:
        at = screen.wait_for("auto answers. /help lists the commands, Ctrl-D leaves.")
        at = screen.wait_for("> ", at)
        screen.press("one two three four five six seven eight nine ten\r")
        at = screen.wait_for("base:\n", at)
        at = screen.wait_for("one two", at)
        screen.press(CTRL_C)
        at = screen.wait_for("stopped: Ctrl-C again leaves", at)
        assert "ten" not in screen.screen[at - 60 : at]
        at = screen.wait_for("> ", at)
        screen.press("go on\r")
        at = screen.wait_for("go on\n", screen.wait_for("base:", at))
        at = screen.wait_for("> ", at)
        at = screen.press_until(CTRL_C, "Ctrl-C again leaves", at)
        screen.press_until(CTRL_C, "interrupted", at)
        assert screen.end() == 130
        assert "Traceback" not in screen.screen


def test_on_a_terminal_lines_can_go_on_and_names_are_completed(tmp_path: Path) -> None:
    with terminal("chat", "-c", str(service(tmp_path, "{default: {expert: base}}")), cwd=tmp_path) as screen:
        at = screen.wait_for("> ")
        screen.press("first\\\r")
        at = screen.wait_for("… ", at)
        screen.press("second\r")
        at = screen.wait_for("first\nsecond\n", screen.wait_for("base:", at))
        at = screen.wait_for("> ", at)
        screen.press("/model lou\t\r")
        at = screen.wait_for("loud answers from now on", at)
        at = screen.wait_for("> ", at)
        screen.press(CTRL_D)
        assert screen.end() == 0
