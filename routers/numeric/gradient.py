"""Gradient descent for the routers that need it: torch for training, seeded and on one thread; numpy for inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from routers.settings import check_positive, check_range

if TYPE_CHECKING:
    import torch

HELD_OUT = 0.2
"""Share of the training rows that is held out for early stopping and calibration."""
PATIENCE = 10
"""Epochs without improvement on the held-out rows after which training stops."""

Parameters = Mapping[str, "torch.Tensor"]
Loss = Callable[["torch.Tensor"], "torch.Tensor"]
"""The mean loss of a batch, given as (b,) row numbers."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Adam with decoupled weight decay (AdamW), over shuffled minibatches.

    epochs: the most passes over the rows.
    """

    learning_rate: float
    weight_decay: float
    epochs: int
    batch: int = 256

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate")
        check_range(self, "weight_decay")
        check_range(self, "epochs", "batch", low=1)


def split_rows(n: int, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Row numbers to train on and to hold out, sorted; a single row is both."""
    order = np.random.default_rng(seed).permutation(n)
    n_held = max(1, round(HELD_OUT * n))
    return np.sort(order[n_held:]) if n > 1 else order, np.sort(order[:n_held])


def descend(
    parameters: Parameters,
    loss: Loss,
    rows: NDArray[np.intp],
    schedule: Schedule,
    seed: int,
    *,
    check: Callable[[], float] | None = None,
) -> int:
    """Train the parameters in place.

    Args:
        check: a loss on held-out rows, computed after each epoch. Training stops after `PATIENCE` epochs without a new
            minimum, and the parameters are those of the minimum. Without it all epochs are run.

    Returns:
        The epoch of the returned parameters.
    """
    import torch

    chance = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(
        list(parameters.values()), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
    )
    best, best_value, best_epoch = dict[str, torch.Tensor](), np.inf, schedule.epochs
    numbers = torch.from_numpy(rows)
    for epoch in range(1, schedule.epochs + 1):
        for batch in torch.split(numbers[torch.randperm(len(rows), generator=chance)], schedule.batch):
            optimiser.zero_grad()
            loss(batch).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        if check is None:
            continue
        with torch.no_grad():
            value = check()
        if value < best_value:
            best, best_value, best_epoch = {n: p.detach().clone() for n, p in parameters.items()}, value, epoch
        elif epoch - best_epoch >= PATIENCE:
            break
    with torch.no_grad():
        for name, kept in best.items():
            parameters[name].copy_(kept)
    return best_epoch


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread inside this context, so that sums have the same order every time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_tensor(shape: tuple[int, ...], scale: float, rng: np.random.Generator) -> torch.Tensor:
    """Normal numbers of standard deviation `scale`, with gradients."""
    import torch

    return torch.from_numpy(rng.normal(0.0, scale, shape).astype(np.float32)).requires_grad_()


def as_arrays(parameters: Parameters) -> dict[str, NDArray[np.float32]]:
    """The current parameters as numpy copies."""
    return {name: tensor.detach().numpy().copy() for name, tensor in parameters.items()}
