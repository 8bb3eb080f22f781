"""A composed expert is like any other: addressed, called by compositions, batched, evaluated, and verified."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from batch_runs import InProcess, records, run
from engine_models import make_tokenizer, save_adapter
from latent_experts import asked, interactions
from latent_models import save_tiny
from typer.testing import CliRunner

from coe.cli.app import app
from coe.config import load_config
from coe.engines.latent.artifact import Artifact
from coe.experts import open_snapshot
from coe.local import open_local
from registry.composed import Composed
from registry.digest import identity
from registry.errors import InvalidSpec
from registry.store import Snapshot

pytestmark = pytest.mark.integration

MEMBERS = """\
experts:
  - {name: first, kind: model, source: first}
  - {name: peer, kind: model, source: peer}
  - {name: tuned, kind: adapter, base: first, source: tuned}
"""
COMPOSED = """\
  - {name: noted, kind: composed, architecture: notes, members: [first, peer], source: noted}
  - {name: cached, kind: composed, architecture: cache, members: [first, tuned], source: cached}
  - {name: mixed, kind: composed, architecture: lora-mix, members: [tuned, tuned2], settings: {gate: arrow}}
  - {name: tuned2, kind: adapter, base: first, source: tuned2}
"""
CONFIG = """\
experts: [experts.yaml]
engines: {hf: {device: cpu, dtype: float32}}
host: {budget: 64MiB}
policies:
  default: {expert: noted, fallback: first}
  chained: {expert: first, composition: {kind: chain, experts: [noted, cached]}}
"""
NAMES = ("noted", "cached", "mixed")
QUESTION = "the capital of france"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of random weights, artifacts with random interactions, and their configuration."""
    folder = tmp_path_factory.mktemp("composed")
    for seed, name in enumerate(("first", "peer")):
        save_tiny(folder / name, "LlamaForCausalLM", make_tokenizer(), seed=seed)
    for name in ("tuned", "tuned2"):
        save_adapter(folder / name, folder / "first")
    (folder / "coe.yaml").write_text(CONFIG)
    (folder / "experts.yaml").write_text(MEMBERS)
    snapshot = open_snapshot(load_config(folder / "coe.yaml"))
    module = interactions(["peer"])
    settings = {"interaction": module.shape.document()}
    write(folder / "noted", "notes", ("first", "peer"), snapshot, settings, module.state_dict())
    write(folder / "cached", "cache", ("first", "tuned"), snapshot, {}, {})
    (folder / "experts.yaml").write_text(MEMBERS + COMPOSED)
    return folder


def write(
    folder: Path, architecture: str, members: tuple[str, ...], snapshot: Snapshot, settings: object, tensors: object
) -> None:
    known = {name: identity(snapshot.experts[name], snapshot.experts) for name in members}
    Artifact.write(folder, Composed(architecture, known, settings), tensors=tensors, card="")  # type: ignore[arg-type]


async def test_it_answers_by_name_as_a_policy_and_in_a_composition(folder: Path) -> None:
    async with open_local(folder / "coe.yaml") as system:
        alone = await system.ask(QUESTION, model="first", max_tokens=8)
        texts = {name: await system.ask(QUESTION, model=name, max_tokens=8) for name in NAMES}
        assert alone not in texts.values() and len(set(texts.values())) == 3, "random notes change the answer"
        reply = system.answer(asked(QUESTION), model="auto")
        assert await reply.text() == texts["noted"] and reply.asked == ["peer", "noted"]
        assert reply.answer is not None and reply.answer.notes[0].startswith("peer left notes (sha256:")
        first = system.answer(asked(QUESTION), model="first")
        await first.text()
        assert first.answer is not None
        assert reply.answer.usage.completion_tokens == 16 and first.answer.usage.completion_tokens == 8
        chained = system.answer(asked(QUESTION), model="coe/chained")
        assert await chained.text()
        assert chained.asked == ["peer", "noted", "tuned", "cached"]
        direct = [chunk async for chunk in system.host.ask("noted", asked(QUESTION))]
        assert "".join(chunk.text for chunk in direct) == texts["noted"], "as an evaluation calls it"
        assert direct[-1].usage == reply.answer.usage


def test_a_batch_calls_the_peers_of_all_rows_before(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"id": f"{name}-{i}", "prompt": f"{QUESTION} {i}", "model": name, "max_tokens": 6}
        for name in NAMES
        for i in range(3)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    executor = InProcess()
    run(folder / "coe.yaml", tmp_path / "rows.jsonl", tmp_path / "out", executor)
    found = records(tmp_path / "out")
    assert [sorted(name for item in stage for names in [item] for name in names) for stage in executor.items] == [
        ["mixed", "peer", "tuned"], ["cached", "noted"],
    ]  # fmt: skip
    assert {record["error"] for record in found.values()} == {None}
    assert found["noted-1"]["notes"][0].startswith("peer left notes")

    async def online() -> dict[str, str]:
        async with open_local(folder / "coe.yaml") as system:
            return {row["id"]: await system.ask(row["prompt"], model=row["model"], max_tokens=6) for row in rows}

    assert {key: record["answer"] for key, record in found.items()} == asyncio.run(online())


def test_it_is_evaluated_and_checked_like_any_expert(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"id": "1", "prompt": "the capital of france", "answer": "paris"}\n')
    (tmp_path / "t.yaml").write_text("{name: t, data: t.jsonl, grader: contains, max_tokens: 4}\n")
    command = ["eval", "--config", str(folder / "coe.yaml"), "--tasks", str(tmp_path / "t.yaml"), "--out"]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in NAMES), result.output
    checked = CliRunner().invoke(app, ["config", "check", str(folder / "coe.yaml")])
    assert checked.exit_code == 0, checked.output


def test_an_artifact_belongs_to_the_contents_of_its_members(folder: Path, tmp_path: Path) -> None:
    for name in ("first", "tuned", "tuned2", "noted", "cached"):
        (tmp_path / name).symlink_to(folder / name)
    save_tiny(tmp_path / "peer", "LlamaForCausalLM", make_tokenizer(), seed=7)
    (tmp_path / "coe.yaml").write_text(CONFIG)
    (tmp_path / "experts.yaml").write_text(MEMBERS + COMPOSED)
    with pytest.raises(InvalidSpec, match="it was trained with another 'peer'") as refused:
        open_snapshot(load_config(tmp_path / "coe.yaml"))
    assert len(refused.value.problems) == 1
