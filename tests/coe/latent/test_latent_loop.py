"""The loop on a small objective: rates, rows, early stopping, interruptions, exact resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from coe.engines.latent.artifact import Artifact
from coe.errors import ConfigError, EngineError
from coe.latent.config import TrainingConfig
from coe.latent.training.checkpoint import Checkpoint
from coe.latent.training.loop import Outcome, learning_rate, rows_of, train
from coe.latent.training.metrics import Metrics
from coe.latent.training.trainer import Group, Losses, Step, Validation

CONFIG = TrainingConfig(steps=12, batch=2, accumulate=2, learning_rate=0.1, validate_every=3, patience=9)


class Regression:
    """Fits a vector to points, with a random mask; `held_out` is the validation loss of each call, if given."""

    def __init__(self, held_out: Sequence[float] = (), stop_at: int | None = None, nan_at: int | None = None) -> None:
        self.weight, self.bias = Parameter(torch.zeros(3)), Parameter(torch.zeros(1))
        self.points = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
        self.held_out, self.stop_at, self.nan_at = list(held_out), stop_at, nan_at
        self.seen: list[list[int]] = []
        self.n_validated = 0

    def groups(self) -> list[Group]:
        return [Group({"weight": self.weight}), Group({"bias": self.bias}, learning_rate=0.02)]

    def loss(self, rows: Sequence[int], step: Step) -> Losses:
        if self.stop_at is not None and step.number == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append(list(rows))
        mask = torch.tensor([step.chance.random() > 0.2 for _ in rows])
        wrong = (self.points[list(rows)] * self.weight).sum(1) - self.points[list(rows)].sum(1) + self.bias
        total = (wrong.square() * mask).mean()
        return Losses(total * torch.nan if step.number == self.nan_at else total, {"kept": float(mask.sum())})

    def validate(self) -> Validation:
        self.n_validated += 1
        if self.held_out:
            return Validation(self.held_out[min(self.n_validated, len(self.held_out)) - 1], 0.5)
        return Validation(float((self.weight.detach() - 1).square().sum()), 0.5)

    def save(self, path: Path, card: str) -> Artifact:
        pytest.fail("the loop writes no artifact")


def run(objective: Regression, folder: Path, config: TrainingConfig = CONFIG) -> Outcome:
    return train(objective, 10, config, Checkpoint(folder / "checkpoint"))


def test_it_learns_and_ends_with_the_best_tensors(tmp_path: Path) -> None:
    objective = Regression()
    outcome = run(objective, tmp_path)
    assert (outcome.steps, outcome.before.loss) == (12, 3.0)
    assert outcome.after.loss < 1
    assert outcome.after.loss == pytest.approx(float((objective.weight.detach() - 1).square().sum()))
    assert objective.n_validated == 5  # the start, and steps 3, 6, 9, 12


def test_rates_warm_up_and_fall_as_a_cosine() -> None:
    config = TrainingConfig(steps=100, warmup=0.1, final_rate=0.05)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.525)
    assert rates[99] == pytest.approx(0.05, abs=1e-3)
    assert learning_rate(0, TrainingConfig(steps=1, warmup=0)) == 1.0


def test_each_epoch_reads_every_row_once_in_another_order() -> None:
    rows = [row for step in range(5) for row in rows_of(step, 10, 4, seed=3)]
    first, second = rows[:10], rows[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert rows_of(2, 10, 4, seed=3) == rows[8:12]  # of two epochs
    assert rows_of(0, 10, 4, seed=4) != rows[:4]


def test_it_stops_when_validation_no_longer_improves(tmp_path: Path) -> None:
    objective = Regression(held_out=[5, 4, 6, 7, 3])
    outcome = run(objective, tmp_path, CONFIG.model_copy(update={"patience": 2}))
    assert (outcome.steps, outcome.best_step, outcome.after.loss) == (9, 3, 4)


def test_a_training_that_never_improves_ends_with_the_untouched_start(tmp_path: Path) -> None:
    objective = Regression(held_out=[1, 2])
    outcome = run(objective, tmp_path, CONFIG.model_copy(update={"patience": 1}))
    assert (outcome.best_step, outcome.steps) == (0, 3)
    assert torch.equal(objective.weight, torch.zeros(3))


@pytest.mark.parametrize("stop_at", [1, 3, 7])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    whole = Regression()
    expected = run(whole, tmp_path / "whole")
    first = Regression(stop_at=stop_at)
    with pytest.raises(KeyboardInterrupt):
        run(first, tmp_path / "parts")
    second = Regression()
    outcome = run(second, tmp_path / "parts")
    assert [*first.seen, *second.seen][-len(second.seen) :] == whole.seen[-len(second.seen) :]
    assert len(second.seen) < len(whole.seen)  # it does not start again
    assert torch.equal(second.weight, whole.weight)
    assert torch.equal(second.bias, whole.bias)
    assert (outcome.after, outcome.best_step) == (expected.after, expected.best_step)


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    run(Regression(), tmp_path)
    again = Regression()
    assert run(again, tmp_path).steps == 12
    assert again.seen == []
    assert Checkpoint(tmp_path / "checkpoint").step == 12
    assert Checkpoint(tmp_path / "none").step == 0


@pytest.mark.parametrize("file", ["now.safetensors", "best.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, file: str) -> None:
    run(Regression(), tmp_path)
    path = tmp_path / "checkpoint" / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="is damaged .*: remove it to start again"):
        run(Regression(), tmp_path)


def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="the loss of step 5 is nan: lower training.learning_rate"):
        run(Regression(nan_at=4), tmp_path)


def test_a_micro_batch_without_any_peer_gives_no_gradient(tmp_path: Path) -> None:
    class Constant(Regression):
        def loss(self, rows: Sequence[int], step: Step) -> Losses:
            losses = super().loss(rows, step)
            return Losses(losses.total.detach(), losses.parts)

    objective = Constant()
    assert run(objective, tmp_path).steps == 12
    assert torch.equal(objective.weight, torch.zeros(3))


def test_rates_of_groups_and_clipping_bound_the_first_step(tmp_path: Path) -> None:
    objective = Regression()
    run(objective, tmp_path, TrainingConfig(steps=1, warmup=0, learning_rate=0.1, validate_every=1))
    assert float(objective.weight.detach().abs().max()) == pytest.approx(
        0.1, rel=1e-3
    )  # AdamW's first step is the rate
    assert abs(float(objective.bias.detach())) == pytest.approx(0.02, rel=1e-3)


def test_metrics_of_repeated_steps_are_dropped(tmp_path: Path) -> None:
    def lines() -> list[str]:
        return (tmp_path / "metrics.jsonl").read_text().splitlines()

    def write(steps: Sequence[int], figures: Mapping[str, float], first_step: int = 0) -> None:
        with Metrics(tmp_path, first_step=first_step, clock=lambda: 7.0) as metrics:
            for step in steps:
                metrics.add(step, figures)

    write([1, 2, 3], {"loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    write([3], {"loss": 0.25}, first_step=2)
    assert lines() == [
        f'{{"step": {step}, "time": 7.0, "loss": {loss}}}' for step, loss in ((1, 0.5), (2, 0.5), (3, 0.25))
    ]
    write([1], {"loss": 1.0})
    assert len(lines()) == 1


def test_figures_are_events_of_tensorboard_where_it_is_installed(tmp_path: Path) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Metrics(tmp_path) as metrics:
        metrics.add(1, {"loss": 0.5})
        metrics.add(2, {"loss": 0.25, "valid_loss": 0.75})
    with Metrics(tmp_path, first_step=1) as metrics:
        metrics.add(2, {"loss": 0.125})
    found = loading.EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 0.5), (2, 0.125)]
    with Metrics(tmp_path) as metrics:  # another training in this folder
        metrics.add(1, {"loss": 1.0})
    found = loading.EventAccumulator(str(tmp_path))
    found.Reload()
    assert found.Tags()["scalars"] == ["train/loss"]
