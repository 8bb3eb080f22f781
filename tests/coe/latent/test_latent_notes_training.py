"""Training with notes on tiny models: what is trained, what stays, what is learned, what does not leak."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from composed_training import WIDTHS, PlantedNotes, make_service, read_config, teach_format, write_rows

from coe.config import load_config
from coe.engines.latent.interaction import Interactions
from coe.experts import open_snapshot
from coe.latent.training import notes as notes_module
from coe.latent.training.answer_rows import read_answer_rows
from coe.latent.training.checkpoint import Checkpoint
from coe.latent.training.loop import train
from coe.latent.training.notes import NotesObjective, NotesTrainer
from coe.latent.training.trainer import Job, Step

N_TRAIN, N_VALID = 32, 16


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_service(tmp_path_factory.mktemp("service"))
    teach_format(path.parent / "base")
    return path


@pytest.fixture
def folder(service: Path, tmp_path: Path) -> Path:
    """A folder with the service, and rows to train on."""
    for name in ("service.yaml", "experts.yaml"):
        shutil.copy(service.parent / name, tmp_path)
    return tmp_path


def prepared(
    folder: Path, patch: pytest.MonkeyPatch, *, permuted: bool = False, planted: Mapping[str, Any] = {}, **fields: Any
) -> NotesObjective:
    """An objective whose peers have left planted notes."""
    letters = write_rows(folder / "train.jsonl", N_TRAIN, seed=1, permuted=permuted)
    letters += write_rows(folder / "valid.jsonl", N_VALID, seed=2, permuted=permuted)
    file = read_config(folder, **fields)
    config = load_config(file.config.config)
    found = PlantedNotes(letters, {**WIDTHS, "one": 32, "second": 32}, **planted)
    patch.setattr(notes_module, "collect_notes", lambda *_: found)
    rows, valid = (read_answer_rows(path, fewest=1) for path in (file.config.train, file.config.valid))
    job = Job(file, config, open_snapshot(config), rows, valid, folder / "work", lambda what, done, total: None)
    job.work.mkdir(exist_ok=True)
    NotesTrainer.check(job)
    return NotesTrainer.prepare(job)


def run(objective: NotesObjective, folder: Path) -> Any:
    config = objective._job.config.training
    return train(objective, N_TRAIN, config, Checkpoint(folder / "checkpoint"))


def parameters(objective: NotesObjective) -> dict[str, torch.Tensor]:
    return {name: tensor for group in objective.groups() for name, tensor in group.tensors.items()}


def randomise(objective: NotesObjective) -> None:
    """Give Wo random values."""
    torch.nn.init.normal_(parameters(objective)["interactions.0.output"], generator=torch.Generator().manual_seed(0))


def logits(objective: NotesObjective, rows: Sequence[int] = range(4), *, peers: bool = True) -> torch.Tensor:
    from coe.latent.training.exposure import Source

    sources = [{"other": Source("other", row)} if peers else {} for row in rows]
    with torch.no_grad():
        return objective.predict(rows, sources).logits


def test_the_start_is_the_bare_primary_bit_for_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = prepared(folder, monkeypatch)
    assert torch.equal(logits(objective), logits(objective, peers=False))


def test_frozen_weights_stay_and_the_trained_ones_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = prepared(folder, monkeypatch)
    model = objective._primary.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = {name: tensor.detach().clone() for name, tensor in parameters(objective).items()}
    run(objective, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    changed = {name for name, tensor in parameters(objective).items() if not torch.equal(tensor, first[name])}
    assert changed == set(first)


def test_at_the_first_step_only_wo_has_a_gradient(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"steps": 3, "drop_peer": 0, "drop_all": 0, "wrong_peer": 0}
    objective = prepared(folder, monkeypatch, training=training)
    tensors = parameters(objective)

    def gradients() -> set[str]:
        for tensor in tensors.values():
            tensor.grad = None
        objective.loss(range(4), Step(0, 3, Random(0))).total.backward()
        return {name for name, tensor in tensors.items() if tensor.grad is not None and bool(tensor.grad.any())}

    assert gradients() == {"interactions.0.output"}
    with torch.no_grad():
        tensors["interactions.0.output"].sub_(tensors["interactions.0.output"].grad)
    assert gradients() == set(tensors)


def test_below_the_first_interaction_nothing_is_kept_for_the_backward_pass(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = prepared(folder, monkeypatch, members=["other", "base"], settings={"interactions": 1, "heads": 2})
    seen: dict[int, bool] = {}
    layers = objective._primary.decoder.layers
    assert objective._interactions.where() == (2,)
    for number, layer in enumerate(layers, 1):
        layer.register_forward_hook(lambda _m, _i, out, number=number: seen.update({number: out.requires_grad}))
    objective.predict([0, 1], [{"base": notes_module.Source("base", row)} for row in (0, 1)])
    assert seen == {1: False, 2: False, 3: True, 4: True}  # the interaction adds behind layer 2


LONG = {"steps": 120, "batch": 8, "accumulate": 1, "validate_every": 20, "patience": 9, "learning_rate": 2e-2}
WIDE = {"interactions": 1, "shared_width": 32, "heads": 4}


CHANCE = math.log(4) / 2
"""Cross-entropy of one of four letters, and of the end token, which is certain."""


def test_what_only_the_peer_knows_is_learned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = prepared(folder, monkeypatch, training=LONG, settings=WIDE)
    outcome = run(objective, folder)
    assert outcome.before.loss == pytest.approx(CHANCE, abs=0.05)
    assert outcome.before.accuracy <= 0.5  # the bare primary guesses
    assert outcome.after.accuracy >= 0.9
    assert outcome.after.loss < 0.2
    rows = range(N_TRAIN, N_TRAIN + N_VALID)
    alone = objective.predict(rows, [{} for _ in rows])
    assert float(alone.loss()) == pytest.approx(outcome.before.loss, abs=1e-5)  # without notes, still the bare primary


def test_nothing_of_the_answer_leaks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With answers at random, 60 steps do not lower the loss of held-out rows."""
    found: list[float] = []

    def on_step(step: int, figures: Mapping[str, float]) -> None:
        found.extend(value for name, value in figures.items() if name == "valid_loss")

    training = {**LONG, "steps": 60, "validate_every": 60, "patience": 9, "learning_rate": 5e-3}
    objective = prepared(folder, monkeypatch, permuted=True, training=training, settings=WIDE)
    train(objective, N_TRAIN, objective._job.config.training, Checkpoint(folder / "checkpoint"), on_step=on_step)
    before, after = found
    assert before == pytest.approx(CHANCE, abs=0.05)
    assert after >= before - 0.02


def test_a_saved_composition_gives_the_same_logits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = prepared(folder, monkeypatch)
    run(objective, folder)
    artifact = objective.save(folder / "out", "# card\n")
    expected = logits(objective)
    assert not torch.equal(expected, logits(objective, peers=False))
    again = prepared(folder, monkeypatch, training={"seed": 5})
    assert not torch.equal(logits(again), expected)
    again._interactions = artifact.interactions()
    assert torch.equal(logits(again), expected)
    assert artifact.composed.architecture == "notes"
    assert list(artifact.composed.members) == ["base", "other"]
    assert artifact.composed.settings["layers"] == {"other": []}
    assert artifact.composed.settings["reads"] == "answer"


def test_an_interrupted_training_resumes_to_the_same_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"steps": 6, "batch": 4, "accumulate": 2, "validate_every": 2, "learning_rate": 1e-2, "seed": 3}
    settings = {**WIDE, "lora": {}}
    whole = prepared(folder, monkeypatch, training=training, settings=settings)
    expected = train(whole, N_TRAIN, whole._job.config.training, Checkpoint(folder / "whole"))

    def stop(step: int, figures: Mapping[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    first = prepared(folder, monkeypatch, training=training, settings=settings)
    with pytest.raises(KeyboardInterrupt):
        train(first, N_TRAIN, first._job.config.training, Checkpoint(folder / "parts"), on_step=stop)
    second = prepared(folder, monkeypatch, training=training, settings=settings)
    outcome = train(second, N_TRAIN, second._job.config.training, Checkpoint(folder / "parts"))
    assert outcome.after == expected.after
    resumed = parameters(second)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in parameters(whole).items())


def test_several_peers_of_other_widths_and_depths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {name: [1, 2] for name in ("other", "base", "second")}
    objective = prepared(
        folder,
        monkeypatch,
        planted={"depths": 2, "layers": (1, 2)},
        members=["one", "other", "base", "second"],
        settings={"interactions": 1, "shared_width": 8, "heads": 2, "layers": layers},
    )
    outcome = run(objective, folder)
    assert outcome.steps == 3
    shape = objective._interactions.shape
    assert (dict(shape.peers), shape.depths) == ({"other": 24, "base": 32, "second": 32}, 2)


def test_notes_are_standardised_on_the_training_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = prepared(folder, monkeypatch)
    peer = objective._interactions.peer("other")
    every = torch.cat([objective._states(notes_module.Source("other", row)).states[0] for row in range(N_TRAIN)])  # type: ignore[union-attr]
    torch.testing.assert_close(peer.mean[0], every.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(peer.deviation[0], every.std(0, correction=0), atol=1e-4, rtol=1e-4)


def test_the_divergence_is_of_rows_that_the_bare_primary_answers_right(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = prepared(folder, monkeypatch)
    assert "divergence" not in objective.loss([0, 1], Step(0, 3, Random(0))).parts
    objective._loss._right = {1}
    losses = objective.loss([0, 1], Step(0, 3, Random(0)))
    assert losses.parts["divergence"] == pytest.approx(0.0, abs=1e-6)  # at the start they are the same
    randomise(objective)
    losses = objective.loss([0, 1], Step(0, 3, Random(0)))
    assert losses.parts["divergence"] > 1e-3
    assert float(losses.total.detach()) == pytest.approx(
        losses.parts["cross_entropy"] + 0.1 * losses.parts["divergence"], rel=1e-5
    )


def test_rows_without_notes_of_a_peer_are_trained_without_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = prepared(folder, monkeypatch, planted={"missing": {"other": [0, 1]}})
    randomise(objective)
    with_notes, without = logits(objective), logits(objective, peers=False)
    assert torch.equal(with_notes[:4], without[:4])  # two rows of two answer tokens
    assert not torch.equal(with_notes[4:], without[4:])


def test_a_peer_that_leaves_no_notes_at_all_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception, match="'other' has left no notes on any of the training rows"):
        prepared(folder, monkeypatch, planted={"missing": {"other": range(N_TRAIN)}})


@pytest.mark.parametrize("members", [["base", "other"], ["one", "other"]])
def test_an_adapter_of_the_primary_is_trained_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, members: list[str]
) -> None:
    settings = {"interactions": 1, "shared_width": 16, "heads": 2, "lora": {}}
    objective = prepared(folder, monkeypatch, members=members, settings=settings)
    plain = prepared(folder, monkeypatch, members=members)
    start = logits(objective, peers=False)
    torch.testing.assert_close(start, logits(plain, peers=False))  # it begins as the primary
    base = {name: each.clone() for name, each in objective._primary.model.state_dict().items() if "lora" not in name}
    run(objective, folder)
    trained = {name: tensor for name, tensor in parameters(objective).items() if name.startswith("lora.")}
    assert trained
    assert all(tensor.dtype == torch.float32 and tensor.requires_grad for tensor in trained.values())
    assert all(
        torch.equal(each, base[name]) for name, each in objective._primary.model.state_dict().items() if name in base
    )
    assert not torch.equal(logits(objective, peers=False), start)
    with objective._primary.bare():
        bare = objective._primary.predict(objective._loss.batch(range(4))).logits
    torch.testing.assert_close(bare, start)
    artifact = objective.save(folder / "out", "# card\n")
    assert artifact.adapter is not None
    assert adapted_logits(objective, artifact.adapter).allclose(logits(objective), atol=1e-5)


def adapted_logits(objective: NotesObjective, adapter: Path) -> torch.Tensor:
    """With the written adapter loaded as the engine loads it."""
    from coe.engines.base import Adapter
    from coe.latent.training.primary import Primary
    from registry.spec import ExpertSpec, Kind

    job = objective._job
    spec = ExpertSpec(name="trained", kind=Kind.ADAPTER, base="base", source=str(adapter))
    served = Primary.open(spec, job.snapshot, job.service.engines, find=lambda each: Path(each.source))
    assert isinstance(objective._interactions, Interactions)
    assert served.spec.base == Adapter(spec, adapter).spec.base
    own, objective._primary = objective._primary, served
    try:
        return logits(objective)
    finally:
        objective._primary = own
