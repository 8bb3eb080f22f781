"""The mixtures of one base model that are ready: their gates, beside the adapters that they mix."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Final

from coe.engines.hf.lora.low_rank import LowRankAdapters
from coe.engines.hf.lora.mixture import Mixture, MixtureSlot, QueryMixture
from coe.engines.latent.artifact import Artifact
from coe.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

MOST_MIXTURES: Final = 16
"""Most mixtures kept on a base; a gate holds a vector for each adapter and adapted layer."""
MOST_MIXTURE_BYTES: Final = 2 * 2**30
"""Most bytes of the low-rank matrices of a batch with mixtures, which are copied for it."""


class MixtureSlots:
    """Mixtures by identity, least recently used first. One is forgotten with any of its adapters."""

    def __init__(self) -> None:
        self._slots: OrderedDict[str, MixtureSlot] = OrderedDict()
        self._n_built = 0

    @property
    def by_name(self) -> dict[str, MixtureSlot]:
        """The mixtures by the names that rows have."""
        return {slot.name: slot for slot in self._slots.values()}

    def get(self, key: str) -> MixtureSlot | None:
        """The mixture of this identity, if it is ready."""
        return self._slots.get(key)

    def check(self, mixture: Mixture, n_slots: int) -> None:
        """Raises WeightsError if the members of a mixture do not fit the slots of its base."""
        if len(mixture.members) > n_slots:
            raise WeightsError(
                f"{mixture.spec.name!r} mixes {len(mixture.members)} adapters, and its base keeps at most {n_slots} at "
                "once: raise engines.hf.max_adapters, or name fewer members"
            )

    def acquire(
        self, mixture: Mixture, names: Sequence[str], low_rank: LowRankAdapters, in_use: Collection[str | None]
    ) -> QueryMixture:
        """The mixture, with what the request's query adds to its gate; built if absent.

        Args:
            names: those of its members on the base, which are loaded.
            low_rank: the adapters of the base.
            in_use: names of mixtures that must not be forgotten.

        Raises:
            WeightsError: the members are too large, or the gate's weights do not fit them.
        """
        import torch

        key = mixture.key()
        if key not in self._slots:
            self._slots[key] = self._build(mixture, names, low_rank)
            self._evict({*in_use, self._slots[key].name})
        self._slots.move_to_end(key)
        slot = self._slots[key]
        if mixture.query is None:
            return QueryMixture(slot.name)
        query = torch.as_tensor(mixture.query, dtype=torch.float32, device=low_rank.model.device)
        logits = slot.gate.query_logits(query[None])
        return QueryMixture(slot.name, None if logits is None else logits[0])

    def forget(self, adapter: str) -> None:
        """Forget the mixtures of an adapter."""
        for key in [key for key, slot in self._slots.items() if adapter in slot.members]:
            del self._slots[key]

    def _build(self, mixture: Mixture, names: Sequence[str], low_rank: LowRankAdapters) -> MixtureSlot:
        from coe.engines.hf.lora.gates import build_gate
        from coe.engines.hf.lora.token_mixing import layers_of

        if (size := low_rank.n_bytes(names)) > MOST_MIXTURE_BYTES:
            raise WeightsError(
                f"the adapters of {mixture.spec.name!r} have {size / 2**20:.0f} MiB of low-rank matrices, and at most "
                f"{MOST_MIXTURE_BYTES / 2**20:.0f} MiB can be mixed: name fewer members"
            )
        members = [member.spec.name for member in mixture.members]
        tensors = _read_weights(mixture)
        gate = build_gate(layers_of(low_rank, names), members, mixture.settings, tensors, expert=mixture.spec.name)
        self._n_built += 1
        return MixtureSlot(f"mixture{self._n_built}", tuple(names), gate.to(low_rank.model.device))

    def _evict(self, in_use: Collection[str | None]) -> None:
        if len(self._slots) > MOST_MIXTURES:
            key = next((key for key, slot in self._slots.items() if slot.name not in in_use), None)
            if key is not None:
                del self._slots[key]


def _read_weights(mixture: Mixture) -> dict[str, Tensor] | None:
    if mixture.artifact is None:
        return None
    tensors = Artifact.read(mixture.artifact).tensors()
    return {name: tensor.float() for name, tensor in tensors.items()}
