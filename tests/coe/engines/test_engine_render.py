"""Chat templates render as transformers renders them, within limits that no template escapes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coe.engines.render import Renderer, RenderLimits
from coe.errors import EngineError, Rejected, TemplateError

HI = [{"role": "user", "content": "hi"}]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
QUADRATIC = "{% for a in messages %}{% for b in messages %}{% for c in messages %}{% endfor %}{% endfor %}{% endfor %}"


def variables(messages: list[dict[str, str]] | None = None, **more: Any) -> dict[str, Any]:
    base = {"messages": messages or HI, "tools": None, "documents": None, "add_generation_prompt": True}
    return base | more


@pytest.fixture
def strict() -> Iterator[Renderer]:
    """A renderer with a short CPU limit."""
    renderer = Renderer(RenderLimits(cpu_s=0.2, pause_s=0.5))
    yield renderer
    renderer.close()


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ 'é<&' | tojson }}",
        "  {% for m in messages %}\n  {{ m['role'] }}: {{ m.content | trim }}\n  {% endfor %}\nend",
        "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ bos_token }}{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ strftime_now('%Y')[:2] }}",
        "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[-1].content) }}{{ '%s-%d' | format('a', 3) }}",
    ],
)
def test_it_renders_like_transformers(renderer: Renderer, tokenizer: Any, template: str) -> None:
    turns = [{"role": "user", "content": " a < b & \ud83d naïve 日本 🙂 "}, {"role": "assistant", "content": "yes"}]
    expected = tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=True, tokenize=False)
    given = variables(turns, **tokenizer.special_tokens_map)
    assert renderer.submit(template, given, expert="e").result() == expected


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (LOOPS, "takes more than 0.2 s of CPU time"),
        ("{% macro m(n) %}{% for i in range(9) %}{{ m(n - 1) if n }}{% endfor %}{% endmacro %}{{ m(99) }}", "CPU time"),
        ("{{ 10 ** (10 ** 10) }}", "CPU time"),
        ("{{ lipsum(n=10000000) }}", "exceeds a limit|CPU time"),
        ("{{ 'a' * 10 ** 10 }}", "takes too much memory"),
        ("{{ [0] * 10 ** 10 }}", "takes too much memory"),
        ("{{ '%9999999999d' % 1 }}", "exceeds a limit|is broken"),
        ("{{ '{:9999999999}'.format(1) }}", "exceeds a limit|is broken"),
        ("{{ 'a'.ljust(10 ** 10) }}", "takes too much memory"),
        ("{% set s = namespace(x='ab') %}{% for i in range(99) %}{% set s.x = s.x ~ s.x %}{% endfor %}", "memory|CPU"),
        ("{% set x %}{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}{% endset %}", "exceeds a limit|CPU"),
        ("{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}", "longer than 131,588 characters"),
        ("{{ 'a' * 131589 }}", "longer than 131,588 characters"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{{ " + "(" * 100_000, "is broken|ends the process"),
        ("a" * (2**20 + 1), "is longer than 1,048,576 characters"),
    ],
)
def test_no_template_escapes_the_limits(strict: Renderer, template: str, why: str) -> None:
    began = time.monotonic()
    with pytest.raises(TemplateError, match=why) as caught:
        strict.submit(template, variables(), expert="e").result(timeout=60)
    assert "the chat template of 'e'" in str(caught.value) and len(str(caught.value)) < 700
    assert time.monotonic() - began < 20  # 0.2 s of CPU time each, on a machine that others use
    assert strict.submit("{{ messages[0].content }}", variables(), expert="f").result() == "hi"


def test_at_the_limits_a_template_renders(renderer: Renderer) -> None:
    assert len(renderer.submit("{{ 'a' * 131588 }}", variables(), expert="e").result()) == 2**17 + 512 + 2 * 2
    comment = "{#" + "a" * (2**20 - 5) + "#}b"
    assert len(comment) == 2**20 and renderer.submit(comment, variables(), expert="e").result() == "b"
    many = [{"role": "user", "content": "x"} for _ in range(4096)]
    chatml = "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}{% endfor %}"
    assert renderer.submit(chatml, variables(many), expert="e").result().count("x") == 4096
    long = [{"role": "user", "content": "語" * 4_000_000}]
    text = renderer.submit("{% for m in messages %}<{{ m.content }}>{% endfor %}", variables(long), expert="e").result()
    assert text == f"<{long[0]['content']}>"


async def test_a_slow_template_delays_neither_the_loop_nor_other_templates(strict: Renderer) -> None:
    slow = [asyncio.create_task(strict.render(LOOPS, variables(), expert="slow")) for _ in range(40)]
    await asyncio.sleep(0)
    waits = []
    while not all(task.done() for task in slow):
        began = time.monotonic()
        assert await strict.render("{{ messages[0].content }}", variables(), expert="quick") == "hi"
        await asyncio.to_thread(int)  # the loop's own threads are free
        waits.append(time.monotonic() - began)
        await asyncio.sleep(0.005)
    assert sorted(waits)[len(waits) // 2] < 0.2  # LOOPS alone takes hours
    errors = await asyncio.gather(*slow, return_exceptions=True)
    assert all(isinstance(error, TemplateError) for error in errors)
    assert sum("it is not rendered for" in str(error) for error in errors) >= 30  # no process starts for each


def test_after_the_pause_a_template_is_tried_again(strict: Renderer) -> None:
    for _ in range(2):
        with pytest.raises(TemplateError, match=r"CPU time$"):
            strict.submit(LOOPS, variables(), expert="e").result()
        with pytest.raises(TemplateError, match=r"CPU time; it is not rendered for \d s$"):
            strict.submit(LOOPS, variables(), expert="e").result()
        time.sleep(0.6)


def test_a_long_conversation_that_takes_too_long_fails_alone(strict: Renderer) -> None:
    """Whoever sends it must not take the expert from everyone else."""
    long = [{"role": "user", "content": "x" * 50} for _ in range(3000)]
    with pytest.raises(TemplateError, match=r"CPU time$"):
        strict.submit(QUADRATIC, variables(long), expert="e").result()
    assert strict.submit(QUADRATIC, variables(), expert="e").result() == ""


def test_a_process_that_something_else_ends_is_replaced(renderer: Renderer) -> None:
    give_pid = "{{ messages[0].content }}"
    assert renderer.submit(give_pid, variables(), expert="e").result() == "hi"
    for worker in list(renderer._queue._workers):
        assert worker._process is not None
        os.kill(worker._process.pid, signal.SIGKILL)
    assert renderer.submit(give_pid, variables(), expert="e").result() == "hi"


def test_a_process_that_stands_still_is_given_up() -> None:
    renderer = Renderer(RenderLimits(wall_s=3))
    assert renderer.submit("{{ messages[0].content }}", variables(), expert="e").result() == "hi"
    [worker] = renderer._queue._workers
    assert worker._process is not None
    os.kill(worker._process.pid, signal.SIGSTOP)
    with pytest.raises(EngineError, match=r"renders chat templates failed: it did not reply within 3 s"):
        renderer.submit("{{ messages[0].content }} ", variables(), expert="e").result(timeout=30)
    assert renderer.submit("{{ messages[0].content }}", variables(), expert="e").result(timeout=30) == "hi"
    renderer.close()


def test_a_process_that_cannot_start_is_no_fault_of_the_template(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "broken.py"
    script.write_text("import no_such_package")
    monkeypatch.setattr("coe.engines.render_process._SCRIPT", script)
    renderer = Renderer()
    for _ in range(2):
        with pytest.raises(EngineError, match="failed: it ended with exit code 1") as caught:
            renderer.submit("x", variables(), expert="e").result(timeout=30)
        assert not isinstance(caught.value, TemplateError)
    monkeypatch.setattr("sys.executable", str(tmp_path / "no-python"))
    with pytest.raises(EngineError, match="failed: .*No such file"):
        renderer.submit("x", variables(), expert="e").result(timeout=30)
    renderer.close()


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    code = (
        "import os; from coe.engines.render import Renderer; r = Renderer();"
        "r.submit('x', {'messages': []}, expert='e').result();"
        "print(next(iter(r._queue._workers))._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid = int(found.stdout)
    deadline = time.monotonic() + 20
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_templates_see_no_keys(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    fresh = Renderer()
    assert fresh.submit("x", variables(), expert="e").result() == "x"
    [worker] = fresh._queue._workers
    assert worker._process is not None
    if sys.platform == "linux":
        assert b"secret" not in Path(f"/proc/{worker._process.pid}/environ").read_bytes()
    fresh.close()


def test_a_closed_renderer_refuses_and_its_processes_end() -> None:
    renderer = Renderer()
    assert renderer.submit("x", variables(), expert="e").result() == "x"
    [worker] = renderer._queue._workers
    process = worker._process
    renderer.close()
    assert process is not None and process.poll() is not None
    with pytest.raises(EngineError, match="'e' was unloaded"):
        renderer.submit("x", variables(), expert="e")


def test_processes_end_with_the_last_reference_to_the_renderer() -> None:
    renderer = Renderer()
    renderer.start()
    assert renderer.submit("x", variables(), expert="e").result() == "x"
    [worker] = renderer._queue._workers
    process = worker._process
    del renderer
    assert process is not None and process.wait(10) is not None


async def test_a_cancelled_render_does_not_run(strict: Renderer) -> None:
    slow = asyncio.create_task(strict.render(LOOPS, variables(), expert="e"))
    waiting = asyncio.create_task(strict.render(LOOPS, variables(), expert="e"))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    with pytest.raises(TemplateError):
        await slow


def test_a_rejection_is_told_with_a_bounded_text(renderer: Renderer) -> None:
    with pytest.raises(Rejected) as caught:
        renderer.submit("{{ raise_exception(messages[0].content * 9999) }}", variables(), expert="e").result()
    assert str(caught.value).endswith("hihi") and len(str(caught.value)) < 600
    assert json.dumps(str(caught.value))
