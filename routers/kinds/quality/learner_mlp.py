"""Small networks with one hidden layer, trained on cross-entropy plus expected regret; numpy predicts.

The loss of a query with scores y and logits f is

    sum_m BCE(f_m, y_m) / m  +  REGRET x sum_m softmax(SHARPNESS f)_m (max y - y_m)

The first term makes each output a probability, the second is the expected loss of the routing. Alone, the second learns
only the best single expert where one dominates. The mean of several networks has less variance than one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from routers.kinds.quality.features import Seen
from routers.kinds.quality.learners import Floats
from routers.numeric.calibration import sigmoid
from routers.numeric.records import ArrayRecord

if TYPE_CHECKING:
    import torch

NETWORKS = 4
HIDDEN = 64
EPOCHS = 12
BATCH = 256
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1
DROPOUT_IN, DROPOUT_HIDDEN = 0.1, 0.3
REGRET = 2.0
SHARPNESS = 4.0
INPUT_SCALE = 2.0
"""Blocks have a total variance of 1; the first layer learns faster from larger inputs."""


@dataclass(frozen=True, slots=True, eq=False)
class Networks(ArrayRecord):
    """The mean of S networks: sigmoid(relu(x @ first + first_bias) @ second + second_bias)."""

    first: NDArray[np.float32]  # (S, d, h)
    first_bias: NDArray[np.float32]  # (S, h)
    second: NDArray[np.float32]  # (S, h, m)
    second_bias: NDArray[np.float32]  # (S, m)

    @classmethod
    def fit(cls, seen: Seen, y: Floats, rng: np.random.Generator) -> Networks:
        """Train the networks in turn, each with its own seed."""
        x = (INPUT_SCALE * seen.x).astype(np.float32)
        trained = [_train(x, y.astype(np.float32), int(rng.integers(2**31))) for _ in range(NETWORKS)]
        first, first_bias, second, second_bias = (np.stack(parts) for parts in zip(*trained, strict=True))
        return cls(first, first_bias, second, second_bias)

    def predict(self, seen: Seen) -> Floats:
        """(n, m) probabilities."""
        x = (INPUT_SCALE * seen.x).astype(np.float32)
        total = np.zeros((len(x), self.second.shape[2]))
        for one in range(len(self.first)):
            hidden = np.maximum(x @ self.first[one] + self.first_bias[one], 0.0)
            total += sigmoid(hidden @ self.second[one] + self.second_bias[one])
        return total / len(self.first)


def regret_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """() mean over the queries of sum_m softmax(SHARPNESS logits)_m (max y - y_m), of (n, m) logits and scores."""
    import torch

    chosen = torch.softmax(SHARPNESS * logits, dim=1)
    return (chosen * (y.max(dim=1, keepdim=True).values - y)).sum(dim=1).mean()


def _train(x: NDArray[np.float32], y: NDArray[np.float32], seed: int) -> tuple[NDArray[np.float32], ...]:
    """The weights and biases of both layers, as `Networks` keeps them."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    with torch.random.fork_rng(devices=[]):  # dropout and shuffling use torch's global generator
        torch.manual_seed(seed)
        first, second = _layers(x.shape[1], y)
        net = torch.nn.Sequential(
            torch.nn.Dropout(DROPOUT_IN), first, torch.nn.ReLU(), torch.nn.Dropout(DROPOUT_HIDDEN), second
        )
        optimiser = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        steps = EPOCHS * -(-len(x) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps, pct_start=0.1)
        for _ in range(EPOCHS):
            for rows in torch.tensor_split(torch.randperm(len(x)), steps // EPOCHS):
                logits, scores = net(inputs[rows]), targets[rows]
                loss = binary_cross_entropy_with_logits(logits, scores) + REGRET * regret_loss(logits, scores)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
    tensors = (first.weight.T, first.bias, second.weight.T, second.bias)
    return tuple(np.ascontiguousarray(tensor.detach().numpy()) for tensor in tensors)


def _layers(width: int, y: NDArray[np.float32]) -> tuple[torch.nn.Linear, torch.nn.Linear]:
    """Both layers, initialised so that outputs start near the experts' mean scores."""
    import torch

    first, second = torch.nn.Linear(width, HIDDEN), torch.nn.Linear(HIDDEN, y.shape[1])
    means = y.mean(axis=0).clip(0.02, 0.98)
    with torch.no_grad():
        second.weight.mul_(0.1)
        second.bias.copy_(torch.from_numpy(np.log(means / (1 - means))))
    return first, second
