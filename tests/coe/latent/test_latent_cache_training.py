"""Training with key-value entries on tiny models: columns as in serving, one trained adapter, all else frozen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from composed_training import make_service, read_config, write_rows
from engine_models import save_adapter

from coe.config import load_config
from coe.engines.latent.cache_channel import suffix_of
from coe.engines.latent.notes import Notes
from coe.errors import ConfigError, TaskError
from coe.experts import open_snapshot
from coe.latent.training.answer_rows import read_answer_rows
from coe.latent.training.batches import Batch, EncodedRow
from coe.latent.training.cache import CacheObjective, CacheTrainer
from coe.latent.training.exposure import Source
from coe.latent.training.trainer import Job, Step

N_TRAIN, N_VALID = 8, 4
SETTINGS = {"max_answer_tokens": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The service, an adapter `same` that changes nothing, and rows; notes are kept for all tests of this module."""
    folder = tmp_path_factory.mktemp("service")
    make_service(folder)
    save_adapter(folder / "same", folder / "base")
    from safetensors.torch import load_file, save_file

    file = folder / "same" / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(file).items()}, file)
    experts = (folder / "experts.yaml").read_text()
    (folder / "experts.yaml").write_text(f"{experts}\n- {{name: same, kind: adapter, base: base, source: same}}\n")
    write_rows(folder / "train.jsonl", N_TRAIN, seed=1)
    write_rows(folder / "valid.jsonl", N_VALID, seed=2)
    return folder


@pytest.fixture(autouse=True)
def home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COE_HOME", str(folder / "home"))


def job_of(folder: Path, work: Path, **fields: Any) -> Job:
    file = read_config(folder, **{"preset": "cache", "members": ["base", "one"], "settings": SETTINGS, **fields})
    config = load_config(file.config.config)
    rows, valid = (read_answer_rows(path, fewest=1) for path in (file.config.train, file.config.valid))
    return Job(file, config, open_snapshot(config), rows, valid, work, lambda what, done, total: None)


def prepared(folder: Path, work: Path, **fields: Any) -> CacheObjective:
    job = job_of(folder, work, **fields)
    CacheTrainer.check(job)
    return CacheTrainer.prepare(job)


def logits(objective: CacheObjective, rows: Sequence[int], peers: Sequence[str] = ("one",)) -> torch.Tensor:
    with torch.no_grad():
        return objective.predict(rows, [{peer: Source(peer, row) for peer in peers} for row in rows]).logits


def test_without_entries_it_is_the_bare_primary(folder: Path, tmp_path: Path) -> None:
    objective = prepared(folder, tmp_path)
    with objective._primary.bare():
        bare = objective._primary.predict(objective._loss.batch(range(4))).logits
    torch.testing.assert_close(logits(objective, range(4), ()), bare)
    assert not torch.allclose(logits(objective, range(4)), bare, atol=1e-3)


def test_a_padded_batch_is_each_row_alone(folder: Path, tmp_path: Path) -> None:
    members = ["base", "one", "second"]
    objective = prepared(folder, tmp_path, members=members)
    sources = [
        {"one": Source("one", 0), "second": Source("second", 0)},
        {},
        {"second": Source("one", 2)},  # the entries of another member
        {"one": Source("one", 5)},  # those of another row
    ]
    with torch.no_grad():
        together = objective.predict([0, 1, 2, 3], sources)
        alone = [objective.predict([row], [source]).logits for row, source in enumerate(sources)]
    torch.testing.assert_close(together.logits, torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert together.owners.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("peers", [("same",), ("same", "one")])
def test_entries_of_the_primary_itself_are_as_if_it_had_read_them(
    folder: Path, tmp_path: Path, peers: tuple[str, ...]
) -> None:
    objective = prepared(folder, tmp_path, members=["base", "same", "one"])
    primary, row = objective._primary, objective._loss.encoded([3])[0]
    answer = Notes.unpack(objective._notes.of(3, "same")[0].data)
    assert len(answer) > 1
    suffix = suffix_of(objective._encoder.tokenizer, row.prompt, objective._encoder.turns)
    prompt = [*row.prompt, *answer.tokens.tolist(), *suffix]
    plain = EncodedRow(prompt, row.answer, np.full((len(prompt), 2), -1, np.int32))
    with primary.bare():
        expected = primary.predict(Batch.of([plain])).logits
    close = torch.allclose(logits(objective, [3], peers), expected, atol=2e-2)
    assert close == (peers == ("same",))  # entries travel as float16; those of another expert differ


def test_only_the_adapter_is_trained(folder: Path, tmp_path: Path) -> None:
    objective = prepared(folder, tmp_path)
    state = objective._primary.model.state_dict()
    frozen = {name: tensor.clone() for name, tensor in state.items() if "lora" not in name}
    tensors = {name: tensor for group in objective.groups() for name, tensor in group.tensors.items()}
    optimizer = torch.optim.AdamW(tensors.values(), lr=1e-2)
    found = []
    for number in range(3):
        objective.loss(range(4), Step(number, 3, Random(number))).total.backward()
        found.append(
            {name.split(".")[-3] for name, each in tensors.items() if each.grad is not None and each.grad.any()}
        )
        optimizer.step()
        optimizer.zero_grad()
    assert found == [{"lora_B"}, {"lora_A", "lora_B"}, {"lora_A", "lora_B"}]
    assert all(torch.equal(objective._primary.model.state_dict()[name], each) for name, each in frozen.items())


def test_the_artifact_is_an_adapter(folder: Path, tmp_path: Path) -> None:
    objective = prepared(folder, tmp_path, members=["one", "base"])
    artifact = objective.save(tmp_path / "out", "# card\n")
    assert artifact.adapter is not None
    assert artifact.tensors() == {}
    assert artifact.composed.architecture == "cache"
    assert artifact.composed.settings == {
        "reads": "answer",
        "asks": {},
        "peer_deadline_s": None,
        "max_answer_tokens": 6,
        "max_notes": 4096,
    }


def test_members_of_several_bases_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs members of one base: one on base, other on other"):
        CacheTrainer.check(job_of(folder, tmp_path, members=["one", "other"]))


def test_rows_that_exceed_the_context_with_the_entries_are_refused(folder: Path, tmp_path: Path) -> None:
    objective = prepared(folder, tmp_path)
    objective._primary.context_length = 30
    with pytest.raises(TaskError, match=r"train.jsonl:1: prompt, answers of the peers and right answer have"):
        logits(objective, [0])


def test_rows_may_name_their_peers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    lines[0]["peers"], lines[1]["peers"] = ["same"], []
    own = folder / "named.jsonl"
    own.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields: dict[str, Any] = {"members": ["base", "one", "same"], "train": "named.jsonl"}
    objective = prepared(folder, tmp_path, **fields)
    assert [[p for p in ("one", "same") if objective._notes.of(row, p)] for row in range(3)] == [
        ["same"], [], ["one", "same"],
    ]  # fmt: skip
    seen: list[set[str]] = []
    kept = objective.predict
    monkeypatch.setattr(objective, "predict", lambda rows, of: (seen.extend(map(set, of)), kept(rows, of))[1])
    objective.loss([0, 1], Step(0, 1, Random(3)))
    assert seen[0] <= {"same"} and seen[1] == set()
    lines[2]["peers"] = ["base"]
    own.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(TaskError, match=r"named.jsonl:3: 'base' is no peer of this composition; its peers: one, same"):
        prepared(folder, tmp_path, **fields)


def test_notes_are_collected_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(folder, tmp_path)
    notes = folder / "home" / "latent" / "notes"
    before = {path: path.stat().st_mtime_ns for path in notes.rglob("*.safetensors")}
    assert before
    monkeypatch.setattr("coe.latent.training.peers.open_host", lambda *_: pytest.fail("the peers are asked again"))
    prepared(folder, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in notes.rglob("*.safetensors")} == before
    assert not list(notes.rglob("*.part*"))
    shutil.rmtree(notes)
