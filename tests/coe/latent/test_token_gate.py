"""Training of the token gate: what members leave of the rows, learning, and the artifact as it is served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from engine_models import model_spec, say
from mot_members import job as mot_job
from mot_members import random_rows, save_gemma, save_llama, snapshot_of

from coe.engines.base import Member
from coe.engines.hf.composed.logits import Logits
from coe.engines.hf.engine import HFEngine
from coe.engines.latent.artifact import Artifact
from coe.engines.latent.token_gate import TokenGate, token_features
from coe.errors import ConfigError, Unsupported, WeightsError
from coe.latent.training.checkpoint import Checkpoint
from coe.latent.training.loop import train
from coe.latent.training.token_gate import GateObjective, LogitsTrainer, TokenRows
from coe.latent.training.trainer import Job
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot

N_TOKENS = 12  # of the planted vocabulary


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("members")
    return {
        "first": save_llama(root / "first"),
        "second": save_llama(root / "second", seed=5),
        "third": save_llama(root / "third", seed=6, hidden_size=24),
    }


@pytest.fixture(scope="module")
def snapshot(folders: dict[str, Path]) -> Snapshot:
    return snapshot_of(folders)


def job(
    folder: Path, snapshot: Snapshot, members: Sequence[str] = ("first", "second", "third"), **settings: Any
) -> Job:
    rows, training = (random_rows(24, "train"), random_rows(12, "valid")), {"steps": 40, "learning_rate": 0.02}
    return mot_job(folder, snapshot, members, *rows, preset="logits", settings=settings, training=training)


def planted(n_rows: int, seed: int) -> TokenRows:
    """Two experts that differ on each token; the one with the more certain distribution is right."""
    generator, random = torch.Generator().manual_seed(seed), Random(seed)
    logprobs = torch.randn(n_rows, 2, N_TOKENS, generator=generator) * 0.3
    for row in range(n_rows):
        right = random.randrange(2)
        logprobs[row, right, 0] += 2.5
        logprobs[row, 1 - right, 1 + random.randrange(N_TOKENS - 1)] += 2.1
    logprobs = logprobs.log_softmax(-1)
    features = token_features(logprobs, torch.full((2,), 0.5))
    return TokenRows(logprobs, features, torch.arange(n_rows), torch.zeros(n_rows, 2, dtype=torch.bool))


# Features


def test_features_are_those_of_each_expert() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.4, 0.1]])
    found = token_features(p.log(), torch.tensor([0.1, 0.2, 0.3]))
    entropy = -(p * p.log()).sum(-1)
    others = torch.stack([(p[0, 1] * p[0, 0]).log() / 2, p[1, 0].log(), (p[2, 0] * p[2, 1]).log() / 2])
    expected = [entropy, p.amax(-1), torch.tensor([0.5, 0.3, 0.1]), others, torch.tensor([2 / 3, 1 / 3, 2 / 3])]
    torch.testing.assert_close(found, torch.stack([*expected, torch.tensor([0.1, 0.2, 0.3])], -1))


def test_tokens_that_are_impossible_leave_finite_features() -> None:
    logprobs = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    assert token_features(logprobs, torch.zeros(2)).isfinite().all()


def test_a_gate_has_257_weights_and_starts_as_the_mean() -> None:
    gate = TokenGate()
    assert sum(parameter.numel() for parameter in gate.parameters()) == 257
    logprobs = torch.randn(3, 9).log_softmax(-1)
    torch.testing.assert_close(gate.scores(logprobs, torch.zeros(3)), logprobs.mean(0))
    assert torch.equal(TokenGate(1).layers[0].weight, TokenGate(1).layers[0].weight)  # type: ignore[union-attr]


# Training


def test_it_learns_whom_to_follow(tmp_path: Path, snapshot: Snapshot) -> None:
    made = job(tmp_path, snapshot, ("first", "second"))
    rows, held_out = planted(24, 0), planted(12, 1)
    objective = GateObjective(made, rows, held_out, {"first": 0.5, "second": 0.5})
    outcome = train(objective, 24, made.config.training, Checkpoint(tmp_path / "work"))
    assert outcome.after.loss < outcome.before.loss - 0.3
    assert outcome.after.accuracy >= outcome.before.accuracy


def test_only_the_combined_tokens_are_trained_on(tmp_path: Path, snapshot: Snapshot) -> None:
    made, rows = job(tmp_path, snapshot, ("first", "second")), planted(24, 0)
    rows.logprobs[:12] = rows.logprobs[:12, :1]  # the same
    rows.features[:12] = token_features(rows.logprobs[:12], torch.full((2,), 0.5))
    objective = GateObjective(made, rows, planted(12, 1), {"first": 0.5, "second": 0.5})
    step: Any = None
    assert objective.loss(range(12), step).total.item() == 0
    assert objective.loss(range(24), step).parts["combined_tokens"] == 12
    objective.loss(range(24), step).total.backward()
    assert all(parameter.grad is not None for parameter in objective._gate.parameters())
    rows.logprobs[:] = rows.logprobs[:, :1]
    same = token_features(rows.logprobs, torch.full((2,), 0.5))
    with pytest.raises(ConfigError, match="nothing to combine: raise settings.certain"):
        GateObjective(made, TokenRows(rows.logprobs, same, rows.rows, rows.right), planted(12, 1), {"a": 0.5, "b": 0.5})


def test_members_leave_the_log_probabilities_of_candidates(
    tmp_path: Path, snapshot: Snapshot, folders: dict[str, Path]
) -> None:
    """Compared with whole forwards of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = job(tmp_path, snapshot, candidates=4)
    objective = LogitsTrainer.prepare(made)
    rows, first = objective._train, made.train[0]
    tokenizer: Any = AutoTokenizer.from_pretrained(folders["first"])
    messages = [{"role": "user", "content": first.prompt}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answer = tokenizer(first.answer, add_special_tokens=False)["input_ids"]
    targets = [*answer, tokenizer.eos_token_id]
    n_right = 0
    for position, name in enumerate(("first", "second", "third")):
        model: Any = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 :]
        logprobs = logits.log_softmax(-1)
        found = rows.logprobs[rows.rows == 0][:, position]
        torch.testing.assert_close(found[:, 0], logprobs.gather(1, torch.tensor(targets)[:, None])[:, 0])
        best = logprobs.topk(4, -1).values
        ours = found[:, 1:].nan_to_num(neginf=-1e9).topk(4, -1).values
        assert (ours[:, 0] <= best[:, 0] + 1e-4).all()
        n_right += int((logprobs.argmax(-1) == torch.tensor(targets)).all())
    assert int(rows.right[0].sum()) == n_right
    assert (rows.logprobs.exp().nan_to_num().sum(-1) <= 1 + 1e-4).all()  # no candidate counts twice


async def test_an_artifact_is_served(tmp_path: Path, snapshot: Snapshot, folders: dict[str, Path]) -> None:
    engine = HFEngine(device="cpu", dtype="float32")
    made = job(tmp_path, snapshot)
    LogitsTrainer.check(made)
    objective = LogitsTrainer.prepare(made)
    train(objective, 24, made.config.training, Checkpoint(tmp_path / "work"))
    artifact = objective.save(tmp_path / "out", "# card")
    settings = artifact.composed.settings
    assert settings["mode"] == "gate" and set(settings["quality"]) == {"first", "second", "third"}
    models = {name: await engine.load(model_spec(folder), folder) for name, folder in folders.items()}
    members = {name: Member(model) for name, model in models.items()}
    spec = ExpertSpec(
        name="gated",
        kind=Kind.COMPOSED,
        architecture="logits",
        members=tuple(members),
        source=str(artifact.path),
        settings=settings,
    )
    request = GenerateRequest(prompt="the end", max_tokens=12)
    said = await say(Logits(spec, members, artifact.path), request)  # type: ignore[arg-type]
    mean = spec.model_copy(update={"settings": {"mode": "mean"}})
    other = await say(Logits(mean, members, None), request)  # type: ignore[arg-type]
    assert said.chunks[-1].notes[0].startswith("scores were combined for ")
    assert said.text != other.text
    for model in models.values():
        await engine.unload(model)


# Refusals


def test_members_of_other_vocabularies_are_refused(tmp_path: Path) -> None:
    folders = {"first": save_llama(tmp_path / "first"), "gemma": save_gemma(tmp_path / "gemma")}
    with pytest.raises(Unsupported, match=r"that of 'first' \(\d+ tokens\) is not that of 'gemma'"):
        LogitsTrainer.prepare(job(tmp_path / "job", snapshot_of(folders), ("first", "gemma")))


def test_unknown_members_and_too_many_rows_are_refused(
    tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="settings.quality: 'other' is not one of the members"):
        LogitsTrainer.check(job(tmp_path, snapshot, quality={"other": 0.5}))
    monkeypatch.setattr("coe.latent.training.token_gate._MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="use fewer rows, or lower settings.candidates"):
        LogitsTrainer.prepare(job(tmp_path, snapshot))


@pytest.mark.parametrize(
    "change", [{"0.weight": None}, {"0.weight": torch.ones(3, 6)}, {"2.bias": torch.tensor([torch.nan])}]
)
def test_damaged_gates_are_refused(tmp_path: Path, snapshot: Snapshot, change: dict[str, Any]) -> None:
    made = job(tmp_path, snapshot, ("first", "second"))
    objective = GateObjective(made, planted(24, 0), planted(12, 1), {"first": 0.5, "second": 0.5})
    tensors = Artifact.tensors(objective.save(tmp_path / "out", "# card")) | change
    with pytest.raises(WeightsError):
        TokenGate.of_tensors({name: tensor for name, tensor in tensors.items() if tensor is not None})
