"""Composed experts behind `coe serve` with two pools on Ray: real tiny models, the official client, log and replay."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import openai
import pytest
from engine_models import make_tokenizer, model_spec, save_adapter
from latent_experts import interactions
from latent_models import save_tiny
from mot_serving import trained
from other_tokenizer import make_piece_tokenizer
from serve_process import ServeProcess, serving
from typer.testing import CliRunner

from coe.cli.app import app
from coe.config import load_config
from coe.engines.base import Member
from coe.engines.hf.engine import HFEngine
from coe.engines.latent.artifact import Artifact
from coe.engines.latent.mot import documents
from coe.experts import open_snapshot
from coe.local import open_local
from registry.composed import Composed
from registry.digest import identity
from registry.store import Snapshot

pytestmark = pytest.mark.integration

MEMBERS = """\
experts:
  - {name: first, kind: model, source: first}
  - {name: peer, kind: model, source: peer}
  - {name: late, kind: model, source: late}
  - {name: other, kind: model, source: other}
  - {name: tuned, kind: adapter, base: first, source: tuned}
  - {name: tuned2, kind: adapter, base: first, source: tuned2}
  - {name: foreign, kind: adapter, base: other, source: foreign}
"""
COMPOSED = """\
  - {name: noted, kind: composed, architecture: notes, members: [first, peer, foreign], source: noted}
  - {name: shaky, kind: composed, architecture: notes, members: [first, peer, late], source: shaky}
  - {name: cached, kind: composed, architecture: cache, members: [first, tuned], source: cached}
  - {name: mixed, kind: composed, architecture: lora-mix, members: [tuned, tuned2], settings: {gate: arrow}}
  - {name: averaged, kind: composed, architecture: logits, members: [first, peer], settings: {mode: mean}}
  - {name: together, kind: composed, architecture: mot, members: [first, other], source: together}
  - {name: huge, kind: composed, architecture: mot, members: [first, peer, other, late], source: huge}
"""
CONFIG = """\
experts: [experts.yaml]
engines: {hf: {device: cpu, dtype: float32}}
policies:
  default: {expert: noted}
  noted: {expert: noted}
  cached: {expert: cached}
  mixed: {expert: mixed}
  averaged: {expert: averaged}
  together: {expert: together}
  spare: {expert: huge, fallback: first}
serve:
  watch_s: 0.2
  pools:
    - {name: answering, experts: [noted, shaky, cached], budget: BUDGET_A}
    - {name: hosts, experts: [peer, late, tuned, foreign, mixed, averaged, together, huge], budget: BUDGET_B}
  log: {folder: home/logs/decisions, texts: true}
"""
STAGED = {"noted": ("peer", "foreign"), "cached": ("tuned",)}
TOGETHER = {"mixed": 1, "averaged": 2, "together": 2}
"""Composed expert -> its members that count in usage."""
QUESTION = "the capital of france"
N_TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of random weights, artifacts with random interactions, and the files of the service."""
    folder = tmp_path_factory.mktemp("composed")
    for seed, name in enumerate(("first", "peer", "late")):
        save_tiny(folder / name, "LlamaForCausalLM", make_tokenizer(), seed=seed)
    save_tiny(folder / "other", "Gemma3ForCausalLM", make_piece_tokenizer(), seed=3)
    for name, base in (("tuned", "first"), ("tuned2", "first"), ("foreign", "other")):
        save_adapter(folder / name, folder / base)
    largest = max(path.stat().st_size for path in folder.glob("*/model.safetensors"))
    budgets = CONFIG.replace("BUDGET_A", str(largest * 3 // 2)).replace("BUDGET_B", str(largest * 7 // 2))
    (folder / "service.yaml").write_text(budgets)
    (folder / "experts.yaml").write_text(MEMBERS)
    snapshot = open_snapshot(load_config(folder / "service.yaml").model_copy(update={"policies": {}}))
    for name, peers in (("noted", ("peer", "foreign")), ("shaky", ("peer", "late"))):
        module = interactions(peers)
        settings = {"interaction": module.shape.document()}
        write(folder / name, "notes", ("first", *peers), snapshot, settings, module.state_dict())
    write(folder / "cached", "cache", ("first", "tuned"), snapshot, {}, {})
    write(folder / "huge", "mot", ("first", "peer", "other", "late"), snapshot, {}, {})
    asyncio.run(write_mot(folder / "together", ("first", "other"), snapshot))
    (folder / "experts.yaml").write_text(MEMBERS + COMPOSED)
    return folder


def write(
    folder: Path,
    architecture: str,
    members: tuple[str, ...],
    snapshot: Snapshot,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Any],
) -> None:
    known = {name: identity(snapshot.experts[name], snapshot.experts) for name in members}
    Artifact.write(folder, Composed(architecture, known, settings), tensors=tensors, card="")


async def write_mot(folder: Path, names: tuple[str, ...], snapshot: Snapshot) -> None:
    """A Mixture of Thoughts of these models, whose first one answers."""
    engine = HFEngine(device="cpu", dtype="float32")
    members = {}
    for name in names:
        path = folder.parent / name
        members[name] = Member(await engine.load(model_spec(path).model_copy(update={"name": name}), path))
    made, layers = trained(members, layers="same", scale=0.4)
    for member in members.values():
        await engine.unload(member.expert)
    settings = {"reads": "together", "router": "first", "k": len(names), "layers": layers}
    write(folder, "mot", names, snapshot, settings | {"primaries": documents(made.shapes)}, made.tensors())


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, str]:
    """The answer of every composed expert, and of the first member, in one process without Ray."""

    async def texts() -> dict[str, str]:
        config = load_config(folder / "service.yaml")
        async with open_local(config) as system:
            names = ("first", *STAGED, *TOGETHER)
            return {name: await system.ask(QUESTION, model=name, max_tokens=N_TOKENS) for name in names}

    return asyncio.run(texts())


@pytest.fixture(scope="module")
def service(folder: Path, alone: dict[str, str]) -> Iterator[ServeProcess]:
    with serving(folder, (folder / "service.yaml").read_text(), (folder / "experts.yaml").read_text()) as service:
        yield service


@pytest.fixture
async def client(service: ServeProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=service.base_url, api_key="none", max_retries=0) as client:
        yield client


async def asked(client: openai.AsyncOpenAI, model: str, text: str = QUESTION) -> tuple[str, Any, dict[str, Any]]:
    """Text, usage and the field `coe` of one body."""
    answer = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        max_tokens=N_TOKENS,
        extra_body={"coe": {"answers": True}},
    )
    return answer.choices[0].message.content or "", answer.usage, (answer.model_extra or {})["coe"]


async def streamed(client: openai.AsyncOpenAI, model: str, text: str = QUESTION) -> tuple[str, Any, dict[str, Any]]:
    """The same of a stream."""
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        max_tokens=N_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"coe": {"answers": True}},
    )
    chunks = [chunk async for chunk in stream]
    said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    [extra] = [chunk.model_extra["coe"] for chunk in chunks if chunk.model_extra and "coe" in chunk.model_extra]
    return said, chunks[-1].usage, extra


def tokens(usage: Any) -> tuple[int, int]:
    found = usage if isinstance(usage, dict) else usage.model_dump()
    return found["prompt_tokens"], found["completion_tokens"]


@pytest.mark.parametrize("name", [*STAGED, *TOGETHER])
async def test_a_composed_expert_answers_as_in_one_process_by_name_as_a_policy_and_streamed(
    client: openai.AsyncOpenAI, alone: dict[str, str], name: str
) -> None:
    assert alone[name] and alone[name] != alone["first"]
    answers = [await ask(client, model) for model in (name, f"coe/{name}") for ask in (asked, streamed)]
    for text, usage, told in answers:
        assert text == alone[name]
        assert tokens(usage) == tokens(answers[0][1]) and told["notes"] == answers[0][2]["notes"]
        assert {each["expert"] for each in told["answers"]} == {*STAGED.get(name, ()), name}
        spent = [tokens(each["usage"]) for each in told["answers"]]
        assert tokens(usage) == (sum(n for n, _ in spent), sum(n for _, n in spent))
    spent_by = len(STAGED[name]) + 1 if name in STAGED else TOGETHER[name]
    assert tokens(answers[0][1])[1] >= N_TOKENS * spent_by  # a peer of `together` reads with another tokenizer


async def test_notes_of_the_answer_say_what_was_read(client: openai.AsyncOpenAI) -> None:
    async def notes(name: str) -> list[str]:
        found: list[str] = (await asked(client, name))[2]["notes"]
        return found

    for name, peers in STAGED.items():
        assert [note.partition(" (sha256:")[0] for note in await notes(name)] == [f"{p} left notes" for p in peers]
    assert (await notes("averaged"))[0].startswith("scores were combined for ")
    assert (await notes("together"))[0].startswith("first answers, and reads other")


async def test_peers_answer_in_the_pool_that_names_them(service: ServeProcess, client: openai.AsyncOpenAI) -> None:
    await asked(client, "noted")
    resident = {host["pool"]: set(host["resident"]) for host in await asyncio.to_thread(service.hosts)}
    assert resident["answering"] == {"first"}
    assert {"peer", "other"} <= resident["hosts"]


async def test_members_that_cannot_be_in_memory_together_are_told(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        await asked(client, "huge")
    assert refused.value.status_code == 503 and refused.value.code == "out_of_memory"
    for words in ("'huge'", "'first", "'late", "'other", "'peer", "memory together", "`budget` of its pool"):
        assert words in refused.value.message
    text, _, told = await asked(client, "coe/spare")
    assert text and any("huge failed: BudgetExceeded: 'huge' needs its members" in note for note in told["notes"])


async def test_it_is_listed_and_routed(client: openai.AsyncOpenAI) -> None:
    listed = [model.id async for model in client.models.list()]
    assert {"noted", "coe/noted", "averaged", "huge"} <= {*listed}
    body = {"model": "coe/cached", "messages": [{"role": "user", "content": QUESTION}]}
    routed = await client.post("/route", body=body, cast_to=dict[str, Any])
    assert routed["decision"]["experts"] == ["cached"]


async def test_a_peer_whose_files_have_changed_is_left_out_and_named(
    service: ServeProcess, client: openai.AsyncOpenAI
) -> None:
    """`late` was never loaded."""
    weights = service.folder / "late" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-4] + b"\0\0\0\1")
    try:
        text, _, told = await asked(client, "shaky")
        assert (await streamed(client, "shaky"))[0] == text
    finally:
        weights.write_bytes(kept)
    assert text and told["notes"][0].startswith("peer left notes (sha256:")
    assert told["notes"][1].startswith("late left no notes: WeightsError: expert 'late' cannot answer: its files are")
    assert str(service.folder) not in json.dumps(told)
    failed = next(each for each in told["answers"] if each["expert"] == "late")
    assert "its files are not the registered ones" in failed["error"]["message"]


def test_the_log_has_digests_of_notes_and_replays(service: ServeProcess) -> None:
    """The last of these tests."""
    lines = [json.loads(line) for path in service.logs.glob("*.jsonl") for line in path.read_text().splitlines()]
    for name, peers in STAGED.items():
        logged = [line["notes"] for line in lines if line["expert"] == name and line["status"] == 200]
        assert len(logged) >= 4 and all(note == logged[0] for note in logged)
        assert [note.partition(":")[0] for note in logged[0]] == [f"{peer} left notes (sha256" for peer in peers]
    config = str(service.folder / "service.yaml")
    done = CliRunner().invoke(app, ["replay", str(service.logs), "--config", config, "--json", "-"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["differing"] == 0 and report["repeated"] >= 10
