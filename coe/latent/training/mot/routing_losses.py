"""Losses on how a gate spreads the tokens of a batch over the adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coe.engines.hf.lora.gates.choice import tsallis_entropy
from coe.engines.hf.lora.gates.settings import MixSettings


class RoutingLosses:
    """Collects what a gate did in a forward; the losses are means over layers. Padding does not count.

    Args:
        settings: with a balance or an entropy rule.
        members: in the order of the gate.
    """

    def __init__(self, settings: MixSettings, members: Sequence[str]) -> None:
        self._settings, self._members = settings, list(members)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def begin(self) -> None:
        """A new forward."""
        self._seen.clear()

    def observe(self, layer: int, probabilities: Tensor, weights: Tensor) -> None:
        """What the gate did in a layer: (n_rows, n_tokens, n_members) each."""
        self._seen.append((probabilities, weights))

    def added_to(self, loss: Tensor, mask: Tensor, groups: Sequence[str]) -> tuple[Tensor, dict[str, float]]:
        """The loss with these losses, and their values before weighting.

        Args:
            mask: (n_rows, n_tokens) 1 for tokens.
            groups: (n_rows,) of the rows, for localized balance.
        """
        parts: dict[str, float] = {}
        balance, entropy = self._settings.balance, self._settings.entropy
        if balance is not None:
            if balance.kind == "switch":
                found = torch.stack([switch(p, w, mask) for p, w in self._seen]).mean()
            else:
                favour = self._favour(groups).to(mask.device)
                found = torch.stack([localized(w, mask, favour) for _, w in self._seen]).mean()
            loss = loss + balance.sign * balance.coefficient * found
            parts["balance"] = found.item()
        if entropy is not None:
            found = torch.stack([_mean(tsallis_entropy(p, entropy.q), mask) for p, _ in self._seen]).mean()
            loss = loss + entropy.coefficient * found
            parts["entropy"] = found.item()
        return loss, parts

    def _favour(self, groups: Sequence[str]) -> Tensor:
        """(n_rows, n_members) 1 + delta for members of the row's group, 1 - delta for others."""
        assert self._settings.balance is not None
        own, delta = self._settings.balance.groups, self._settings.balance.delta
        rows = [[1 + delta if own.get(m) == group else 1 - delta for m in self._members] for group in groups]
        return torch.tensor(rows)


def switch(probabilities: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """n_members * sum_e f_e P_e (arXiv 2101.03961): f_e the mean weight of e, without a gradient (with
    one member a token: its share of the tokens), P_e its mean probability. 1 if both are uniform, n_members if all
    tokens choose one member with certainty.

    Args:
        probabilities, weights: (n_rows, n_tokens, n_members).
        mask: (n_rows, n_tokens).
    """
    f, p = (_mean(each, mask) for each in (weights.detach(), probabilities))
    return probabilities.shape[-1] * (f * p).sum()


def localized(weights: Tensor, mask: Tensor, favour: Tensor) -> Tensor:
    """var(Z) / mean(Z) of Z = I * Q (LoRAMoE, arXiv 2312.09979): Q_ne the sum of the weights of member e over the
    tokens of row n, I_ne what favours the members of the row's group.

    Args:
        weights: (n_rows, n_tokens, n_members). mask: (n_rows, n_tokens). favour: (n_rows, n_members).
    """
    z = (weights * mask[..., None]).sum(dim=1) * favour
    return z.var(unbiased=False) / z.mean().clamp(min=1e-9)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over tokens of (n_rows, n_tokens, ...)."""
    shaped = mask.reshape(*mask.shape, *(1,) * (values.ndim - 2)).to(values.dtype)
    return (values * shaped).sum(dim=(0, 1)) / shaped.sum()
