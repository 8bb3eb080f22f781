"""Experts whose chat templates reject, fail or never end: another expert answers, online, streamed, in a batch."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from batch_runs import openai_row, records, run, write_lines
from engine_models import adapter_spec, model_spec, say
from test_engine_chat import GEMMA
from typer.testing import CliRunner

from coe.cli.evaluate import evaluate
from coe.engines.base import Adapter
from coe.engines.hf.engine import HFEngine
from coe.engines.render import Renderer, RenderLimits
from coe.errors import EngineError, Rejected, TemplateError
from coe.local import open_local
from coe.types import GenerateRequest
from routers.base import Message

TEMPLATES = {
    "strict": GEMMA + "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}",
    "broken": "{% for m in messages %}",
    "unknown": "{{ no_such_function(messages) }}",
    "huge": "{{ 'a' * 10 ** 10 }}",
}
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
SYSTEM, USER = Message("system", "short"), Message("user", "the end")


def adapter_with(folder: Path, like: Adapter, template: str | None = None, **config: Any) -> Adapter:
    """A copy of an adapter with a chat template of its own."""
    shutil.copytree(like.path, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Adapter(adapter_spec(folder), folder)


@pytest.fixture
def service(tmp_path: Path, tiny: Path, adapters: list[Adapter]) -> Path:
    """The tiny base, an adapter for each template, and a policy for each with the base as its fallback."""
    experts = [f"{{name: tiny, kind: model, source: {tiny}}}"]
    for name, template in TEMPLATES.items():
        adapter_with(tmp_path / name, adapters[0], template)
        experts.append(f"{{name: {name}, kind: adapter, base: tiny, source: {name}}}")
    (tmp_path / "experts.yaml").write_text("experts:\n" + "".join(f"  - {one}\n" for one in experts))
    policies = "".join(f"  {name}: {{expert: {name}, fallback: tiny}}\n" for name in TEMPLATES)
    path = tmp_path / "service.yaml"
    path.write_text(
        f"experts: [experts.yaml]\nhost: {{budget: 64MiB}}\npolicies:\n  default: {{expert: tiny}}\n{policies}"
    )
    return path


@pytest.mark.parametrize("stream", [False, True])
async def test_the_fallback_answers_with_a_note_and_alone_the_error_is_of_the_expert(
    service: Path, stream: bool
) -> None:
    request = GenerateRequest(messages=(SYSTEM, USER), max_tokens=3, stream=stream)
    async with open_local(service) as system:
        expected = await system.answer(request, model="tiny").text()
        for name in TEMPLATES:
            reply = system.answer(request, model=f"coe/{name}")
            assert await reply.text() == expected
            assert reply.expert == "tiny" and reply.asked == [name, "tiny"]
            assert any(f"the chat template of '{name}'" in note for note in reply.notes), reply.notes
            alone = Rejected if name == "strict" else TemplateError
            with pytest.raises(alone, match=f"the chat template of '{name}'"):
                await system.answer(request, model=name).text()
        reply = system.answer(GenerateRequest(messages=(USER,), max_tokens=3, stream=stream), model="coe/strict")
        await reply.text()
        assert reply.asked == ["strict"]  # a conversation that its template takes


def test_rows_of_a_batch_go_to_the_fallback(service: Path) -> None:
    conversation = [{"role": "system", "content": "short"}, {"role": "user", "content": "the end"}]
    rows = [openai_row(f"{n}-{name}", "", f"coe/{name}", max_tokens=3) for n in range(2) for name in TEMPLATES]
    rows += [openai_row(f"alone-{name}", "", name, max_tokens=3) for name in TEMPLATES]
    for row in rows:
        row["body"]["messages"] = conversation
    run(service, write_lines(service.parent / "in.jsonl", rows), service.parent / "out")
    found = records(service.parent / "out")
    for name in TEMPLATES:
        assert [found[f"{n}-{name}"]["expert"] for n in range(2)] == ["tiny", "tiny"]
        code = "invalid_request" if name == "strict" else "invalid_template"
        assert found[f"alone-{name}"]["error"]["code"] == code


def test_an_evaluation_counts_a_rejected_row_and_ends_with_a_broken_template(
    service: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(service.parent)
    Path("tasks").mkdir()
    Path("tasks/t.yaml").write_text("name: t\ndata: t.jsonl\ngrader: contains\nmax_tokens: 3\n")
    rows = [{"id": str(n), "prompt": "no" if n == 3 else "the end", "answer": "the"} for n in range(5)]
    write_lines(Path("tasks/t.jsonl"), rows)
    app = typer.Typer()
    app.command()(evaluate)
    given = ["--config", str(service), "--tasks", "t", "--out"]
    result = CliRunner().invoke(app, [*given, "run", "--experts", "tiny,strict"])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for file in Path("run").rglob("*.jsonl") for line in file.read_text().splitlines()]
    failed = [(line["expert"], line["row"]) for line in lines if line.get("error")]
    assert failed == [("strict", "3")]
    broken = CliRunner().invoke(app, [*given, "broken", "--experts", "broken"])
    assert broken.exit_code != 0
    assert "TemplateError: the chat template of 'broken' is broken: line 1" in str(broken.exception)


async def test_templates_that_never_end_delay_neither_the_base_nor_other_adapters(
    tmp_path: Path, tiny: Path, adapters: list[Adapter]
) -> None:
    engine = HFEngine(device="cpu", dtype="float32")
    engine._renderer = Renderer(RenderLimits(cpu_s=0.3))
    expert = await engine.load(model_spec(tiny), tiny)
    endless = adapter_with(tmp_path / "endless", adapters[0], LOOPS)
    request = GenerateRequest(messages=(USER,), max_tokens=2)
    plain = await say(expert, request)
    adapted = await say(expert, request, adapters[1])
    stuck = [asyncio.create_task(say(expert, request, endless)) for _ in range(24)]
    late, stop = 0.0, time.monotonic() + 1.0
    while time.monotonic() < stop:
        began = time.monotonic()
        await asyncio.sleep(0.01)
        late = max(late, time.monotonic() - began)
        assert (await say(expert, request)).text == plain.text
        assert (await say(expert, request, adapters[1])).text == adapted.text
    assert late < 0.5  # the loop itself never stands
    outcomes = await asyncio.wait_for(asyncio.gather(*stuck, return_exceptions=True), 60)
    assert all(isinstance(outcome, TemplateError) for outcome in outcomes)
    await engine.unload(expert)
    engine._renderer.close()


async def test_long_prompts_hold_no_threads_of_others(
    engine: HFEngine, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = await engine.load(model_spec(tiny), tiny)
    let_go = threading.Event()
    monkeypatch.setattr("coe.engines.chat.encode_text", lambda *_, **__: let_go.wait(30) and [1])
    long = [asyncio.create_task(say(expert, GenerateRequest(prompt="x", max_tokens=1))) for _ in range(40)]
    await asyncio.sleep(0.05)
    await asyncio.wait_for(asyncio.to_thread(int), 5)
    let_go.set()
    assert {answer.reason for answer in await asyncio.gather(*long)} == {"length"}
    await engine.unload(expert)
    for request in (GenerateRequest(prompt="x"), GenerateRequest(messages=(USER,))):
        with pytest.raises(EngineError, match="'tiny' was unloaded"):
            await say(expert, request)


async def test_adapters_in_the_hubs_cache_and_with_named_templates(
    tmp_path: Path, engine: HFEngine, tiny: Path, adapters: list[Adapter], tokenizer: Any
) -> None:
    named = [{"name": "rag", "template": "never"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    stored = adapter_with(tmp_path / "stored", adapters[0], chat_template=named)
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "0c1d", tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(stored.path.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    cached = Adapter(adapter_spec(snapshot), snapshot)
    expert = await engine.load(model_spec(tiny), tiny)
    answer = await say(expert, GenerateRequest(messages=(USER,), max_tokens=8), cached)
    same = await say(expert, GenerateRequest(prompt="the end", max_tokens=8), adapters[0])
    assert answer.text == same.text and answer.usage == same.usage
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer("the end", add_special_tokens=False)["input_ids"])
    await engine.unload(expert)
