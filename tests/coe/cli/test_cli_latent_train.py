"""`coe latent train` from the file to an expert that answers; interruptions, refusals."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from composed_training import make_service, write_config, write_rows
from engine_models import save_adapter
from typer.testing import CliRunner

from coe.cli.app import app
from coe.config import load_config
from coe.engines.latent.artifact import Artifact
from coe.errors import ConfigError, TaskError, Unsupported
from coe.experts import open_snapshot
from coe.hosting import open_host
from coe.latent.config import read_train_file
from coe.latent.training.answer_rows import read_answer_rows
from coe.latent.training.bare import rows_right_bare
from coe.latent.training.exposure import Source
from coe.latent.training.notes import NotesTrainer
from coe.latent.training.trainer import Job
from coe.types import GenerateRequest
from registry.errors import InvalidSpec
from routers.base import Message

SMALL = {"interactions": 1, "shared_width": 16, "heads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_service(tmp_path_factory.mktemp("models")).parent
    save_adapter(folder / "activated", folder / "base", alora_invocation_tokens=[3])
    save_adapter(folder / "dora", folder / "base", use_dora=True)
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("service.yaml", "experts.yaml"):
        shutil.copy(models / name, tmp_path)
    write_rows(tmp_path / "train.jsonl", 12, seed=1)
    write_rows(tmp_path / "valid.jsonl", 8, seed=2)
    monkeypatch.setenv("COE_HOME", str(tmp_path / "home"))
    return tmp_path


def run(folder: Path, *words: str, **fields: Any) -> Result:
    return CliRunner().invoke(app, ["latent", "train", "--config", str(write_config(folder, **fields)), *words])


def test_it_writes_the_folder_and_prints_how_to_register_it(folder: Path) -> None:
    result = run(folder, "--json", str(folder / "result.json"))
    assert result.exit_code == 0, result.output
    artifact = Artifact.read(folder / "out")
    assert artifact.composed.architecture == "notes"
    assert "| cross-entropy of an answer token |" in (folder / "out" / "README.md").read_text()
    printed = result.output.partition("To use it as an expert, ")[2]
    assert yaml.safe_load(printed.partition("\n")[2]) == [
        {
            "name": "out",
            "kind": "composed",
            "architecture": "notes",
            "members": ["base", "other"],
            "source": str(folder / "out"),
        }
    ]
    written = json.loads((folder / "result.json").read_text())
    assert (written["steps"], written["architecture"]) == (3, "notes")
    metrics = [json.loads(line) for line in (folder / "out.training" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [0, 1, 2, 2, 3, 3]
    assert {"loss", "cross_entropy", "gradient_norm", "learning_rate", "peers"} <= metrics[1].keys()
    assert sorted(path.name for path in (folder / "out.training").iterdir()) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("preset", "members", "settings", "loaded"),
    [
        ("notes", ["base", "other"], SMALL, ["other", "base"]),
        ("cache", ["one", "base"], {"max_answer_tokens": 5}, ["base", "one"]),
        ("lora-mix", ["one", "second"], {"gate": "trained"}, ["one"]),
        ("mot", ["base", "other"], {**SMALL, "router": "first", "k": 2}, ["base", "other"]),
        ("logits", ["base", "one"], {"certain": 1.0}, ["base", "one"]),
    ],
)
def test_a_line_names_each_member_before_it_is_loaded(
    folder: Path, preset: str, members: list[str], settings: dict[str, Any], loaded: list[str]
) -> None:
    result = run(folder, preset=preset, members=members, settings=settings)
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("loading ")] == [f"loading {name}" for name in loaded]


@pytest.mark.parametrize(
    ("preset", "members", "settings"),
    [
        ("notes", ["base", "other", "one"], {**SMALL, "layers": {"other": [2, 4], "one": [1, 2]}}),
        (
            "notes-prompt",
            ["one", "other"],
            {"interactions": 1, "shared_width": 16, "heads": 2, "places": "all", "lora": {}},
        ),
        ("cache", ["base", "one", "second"], {"max_answer_tokens": 5}),
        ("cache", ["one", "second", "base"], {"max_answer_tokens": 5}),
    ],
)
async def test_the_expert_answers_as_it_was_trained(
    folder: Path, preset: str, members: list[str], settings: dict[str, Any]
) -> None:
    """The log-probability of the first token served is that of the training's forward."""
    training = {"steps": 4, "batch": 4, "accumulate": 1, "learning_rate": 0.05, "validate_every": 4}
    fields = {"preset": preset, "members": members, "settings": settings, "training": training}
    result = await in_thread(folder, fields)
    assert result.exit_code == 0, result.output
    expected = await in_thread_logits(folder)
    register(folder, members)
    row = read_answer_rows(folder / "valid.jsonl", fewest=1)[0]
    request = GenerateRequest(messages=(Message("user", row.prompt),), max_tokens=2, logprobs=1)
    async with open_host(load_config(folder / "service.yaml")) as host:
        chunks = [chunk async for chunk in host.ask("out", request)]
    served = next(each for chunk in chunks for each in chunk.logprobs)
    assert served.logprob == pytest.approx(float(expected.log_softmax(-1).max()), abs=2e-2)


def register(folder: Path, members: list[str]) -> None:
    """Add the trained composition to the experts file."""
    experts = yaml.safe_load((folder / "experts.yaml").read_text())["experts"]
    architecture, source = Artifact.read(folder / "out").composed.architecture, str(folder / "out")
    fields = {"architecture": architecture, "members": members, "source": source}
    experts.append({"name": "out", "kind": "composed", **fields})
    (folder / "experts.yaml").write_text(yaml.safe_dump({"experts": experts}))


async def in_thread(folder: Path, fields: dict[str, Any]) -> Result:
    import asyncio

    return await asyncio.to_thread(lambda: run(folder, **fields))  # the command has an event loop of its own


async def in_thread_logits(folder: Path) -> torch.Tensor:
    import asyncio

    return await asyncio.to_thread(trained_logits, folder)


def trained_logits(folder: Path) -> torch.Tensor:
    """Of the first answer token of the first validation row, by the training's forward and the written tensors."""
    from coe.latent.config import trainer_class
    from coe.latent.training.primary import Primary
    from registry.spec import ExpertSpec, Kind

    file = read_train_file(folder / "train.yaml")
    config = load_config(file.config.config)
    train, valid = (read_answer_rows(path, fewest=1) for path in (file.config.train, file.config.valid))
    work = folder / "work"
    work.mkdir()
    job = Job(file, config, open_snapshot(config), train, valid, work, lambda what, done, total: None)
    objective = trainer_class(file.config.preset).prepare(job)
    artifact = Artifact.read(folder / "out")
    if artifact.composed.architecture == "notes":
        objective._interactions = artifact.interactions()
    if artifact.adapter is not None:
        spec = ExpertSpec(name="trained", kind=Kind.ADAPTER, base="base", source=str(artifact.adapter))
        objective._primary = Primary.open(
            spec,
            job.snapshot,
            config.engines,
            find=lambda each: (
                Path(each.source) if each.name == "trained" else Path(job.snapshot.experts["base"].source)
            ),
        )
    peers = file.config.members[1:]
    with torch.no_grad():
        predicted = objective.predict([len(train)], [{peer: Source(peer, len(train)) for peer in peers}])
    return predicted.logits[0]


def test_an_existing_folder_is_refused(folder: Path) -> None:
    (folder / "out").mkdir()
    with pytest.raises(ConfigError, match=r"train.yaml:\d+: out: .* exists: name another folder"):
        raise_from(run(folder))


def test_a_folder_that_another_process_writes_meanwhile_is_not_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NotesTrainer, "check", lambda job: (folder / "out").mkdir())
    with pytest.raises(ConfigError, match=r"train.yaml:\d+: out: .* exists: name another folder"):
        raise_from(run(folder))
    assert not list((folder / "out").iterdir())
    assert not (folder / "out.training" / "run.json").exists()


def raise_from(result: Result) -> None:
    assert result.exception is not None
    raise result.exception


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"members": ["base", "othr"]}, ConfigError, "train.yaml:.*no expert 'othr' is registered.*other"),
        (
            {"settings": {"asks": {"othr": {"template": "x"}}}},
            ConfigError,
            r"train.yaml:\d+: settings.asks.othr: 'othr' is no peer of this composition; did you mean 'other'?",
        ),
        ({"out": "train.jsonl/x"}, ConfigError, "train.yaml:8: out: .* cannot be written: Not a directory"),
        ({"out": "a\0b"}, ConfigError, "train.yaml:8: out: .* cannot be written: embedded null byte"),
        ({"out": "x" * 300}, ConfigError, "train.yaml:8: out: .* cannot be written: File name too long"),
        ({"members": ["base", "composed"]}, ConfigError, "'composed' is of kind 'composed'; members of a trained"),
        ({"members": ["base", "away"]}, ConfigError, "'away' is of kind 'remote'"),
        ({"members": ["base", "fake"]}, Unsupported, "train.yaml:3: members: 'fake' is served by the engine 'fake'"),
        (
            {"preset": "cache", "members": ["one", "other"], "settings": {}},
            ConfigError,
            "train.yaml:3: members: the preset 'cache' needs members of one base: one on base, other on other",
        ),
        ({"train": "few.jsonl"}, TaskError, "few.jsonl has 1 rows; a training needs 8"),
        ({"train": "empty.jsonl"}, TaskError, "empty.jsonl:1: answer: is empty"),
        ({"valid": "train.jsonl"}, TaskError, "the prompt is also that of"),
        ({"train": "huge.jsonl"}, TaskError, r"huge.jsonl:1: a text of .* more tokens than the 512 that 'base' reads"),
        ({"train": "huge_answer.jsonl"}, TaskError, r"huge_answer.jsonl:1: a text of 900,000 characters has more"),
        ({"train": "long.jsonl"}, TaskError, "long.jsonl:1: .* exceed the context of 'base', 512 tokens"),
        (
            {"settings": {"interactions": 9}},
            ConfigError,
            "9 interactions need different layers, and a model of 2",
        ),
        ({"settings": {"layers": {"one": [1]}}}, ConfigError, "states the layers of each peer, and of no other"),
        (
            {"settings": {"layers": {"other": [9]}, "interactions": 1}},
            ConfigError,
            "'other' has 4 layers, not 9",
        ),
        ({"settings": {"depth": 2}}, InvalidSpec, "train.yaml:.*depth: is not a known field.*depths"),
        ({"settings": {"interactions": 1, "lora": {"targets": ["none"]}}}, ConfigError, "settings.lora.targets none"),
        (
            {"members": ["one", "other"], "settings": {"interactions": 1, "lora": {"rank": 3}}},
            ConfigError,
            "goes on with the adapter 'one', which has rank 4",
        ),
        ({"members": ["activated", "other"]}, Unsupported, r"trained on 'activated': it acts from .*\(aLoRA\)"),
        ({"preset": "mot", "members": ["base", "activated"], "settings": {}}, Unsupported, "'mot' cannot use .*aLoRA"),
        ({"preset": "cache", "members": ["dora", "one"], "settings": {}}, Unsupported, "'dora' is no plain LoRA"),
        (
            {"members": ["dora", "other"], "settings": {"interactions": 1, "lora": {}}},
            Unsupported,
            "'dora' is no plain LoRA adapter, and cannot be trained on: name another first member",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(
    folder: Path, models: Path, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    (folder / "few.jsonl").write_text('{"id": 1, "prompt": "x", "answer": "y"}\n')
    (folder / "empty.jsonl").write_text('{"id": 1, "prompt": "x", "answer": " "}\n')
    long = [{"id": i, "prompt": f"{i} " + "z" * 600, "answer": "y"} for i in range(8)]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    for name, huge in (("huge", {"prompt": "z " * 450_000}), ("huge_answer", {"answer": "z " * 450_000})):
        rows = [{"id": i, "prompt": str(i), "answer": "y", **(huge if i == 0 else {})} for i in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    experts = yaml.safe_load((folder / "experts.yaml").read_text())["experts"]
    experts += [
        {"name": "composed", "kind": "composed", "architecture": "logits", "members": ["base", "one"]},
        {"name": "away", "kind": "remote", "source": "https://host.example/v1", "context_length": 100},
        {"name": "fake", "kind": "model", "source": "fake://echo", "context_length": 100},
        {"name": "activated", "kind": "adapter", "base": "base", "source": str(models / "activated")},
        {"name": "dora", "kind": "adapter", "base": "base", "source": str(models / "dora")},
    ]
    (folder / "experts.yaml").write_text(yaml.safe_dump({"experts": experts}))
    with pytest.raises(error, match=message):
        raise_from(run(folder, **fields))
    assert not (folder / "out").exists()


def test_another_run_in_the_work_folder_is_refused(folder: Path) -> None:
    work = folder / "out.training"
    work.mkdir()
    (work / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="an interrupted training with other preset, members, .*remove the folder"):
        raise_from(run(folder))


def test_ctrl_c_prints_the_command_that_goes_on_and_it_does(folder: Path) -> None:
    long = {"steps": 100, "batch": 4, "accumulate": 1, "validate_every": 40, "patience": 400, "learning_rate": 1e-3}
    config = write_config(folder, training=long)
    command = [sys.executable, "-c", "from coe.cli.app import main; main()", "latent", "train", "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    metrics = folder / "out.training" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 12):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert f"coe latent train --config {config}" in printed
    done = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert not (folder / "out").exists()
    assert run(folder, training=long).exit_code == 0
    steps = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    assert steps == list(range(1, 101))
    assert max(done) < 100


@pytest.mark.parametrize("content", ["{", "[999999]", '["x"]', "[" * 10_000])
def test_a_damaged_measurement_of_the_bare_primary_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "bare.json").write_text(content)
    with pytest.raises(ConfigError, match=r"bare.json is damaged .*: remove it to measure the bare primary again"):
        rows_right_bare(None, [None] * 4, SimpleNamespace(work=tmp_path))  # type: ignore[arg-type,list-item]
