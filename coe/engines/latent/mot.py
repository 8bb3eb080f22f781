"""The trained tensors of a Mixture of Thoughts: interactions of each member that may be primary, and its router.

Any member may write the answer, so each has its own cross-attentions (`interaction.py`), for the widths and layers of
its model. P_m, e_m, mu_m and sigma_m depend on the peer alone and exist once for all primaries, as does d_s.

Tensors of an artifact, members by their position:

    peers.<m>.project (d_m, d_s), .bias (d_s,), .mean and .deviation (J, d_m)
    primaries.<m>.interactions.<q>.*, primaries.<m>.null
    router.*                                    see `mot_router.py`; of a latent router only
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from coe.engines.latent.fitting import check_fit, sizes_of
from coe.engines.latent.interaction import Interactions
from coe.engines.latent.mot_router import PREFIX
from coe.engines.latent.shape import InteractionShape
from coe.errors import ConfigError, WeightsError

Shapes = Mapping[str, InteractionShape]
"""Primary -> shape of its interactions."""
_WHAT: Final = "the weights.safetensors of the composition"


class MotInteractions(nn.Module):
    """The interactions of every member that may be primary.

    Args:
        members: names, in the order of the artifact.
        shapes: one for each member that may be primary, whose peers are all other members.
        seed: of the random tensors; Wo is zero.

    Raises:
        ConfigError: shapes that do not go together.
    """

    def __init__(self, members: Sequence[str], shapes: Shapes, *, seed: int = 0) -> None:
        super().__init__()
        _check(members, shapes)
        self.members, self.shapes = tuple(members), dict(shapes)
        self.peers, self.primaries = nn.ModuleDict(), nn.ModuleDict()
        for position, name in enumerate(self.members):
            if name in shapes:
                self.primaries[str(position)] = Interactions(shapes[name], seed=seed * len(members) + position)
        for position, name in enumerate(self.members):
            users = [primary for primary in self.primary_names if primary != name]
            if users:
                self.peers[str(position)] = self.of(users[0]).peer(name)
        for primary in self.primary_names:
            own = self.of(primary)
            own.peers = nn.ModuleList(self.peers[str(self.members.index(name))] for name in own.shape.peers)

    @property
    def primary_names(self) -> tuple[str, ...]:
        """The members that may be primary."""
        return tuple(name for name in self.members if name in self.shapes)

    def of(self, primary: str) -> Interactions:
        """The interactions of a primary. Raises WeightsError if the member was not trained as one."""
        if primary not in self.shapes:
            trained = ", ".join(self.primary_names)
            raise WeightsError(f"{primary!r} was not trained as a primary of the composition; these were: {trained}")
        found = self.primaries[str(self.members.index(primary))]
        assert isinstance(found, Interactions)
        return found

    def standardise(self, member: str, mean: Tensor, deviation: Tensor) -> None:
        """Set mu and sigma (J, d_m) of a member's states, for all primaries that read it."""
        for primary in self.primary_names:
            if primary != member:
                self.of(primary).peer(member).standardise(mean, deviation)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their names in an artifact, each once."""
        own = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        return {name: tensor for name, tensor in own.items() if not _is_shared(name)}

    @classmethod
    def of_tensors(cls, members: Sequence[str], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The interactions of an artifact, in float32 and without gradients.

        Args:
            settings: of the artifact; `primaries` has the shapes (`InteractionShape.document`).
            tensors: of the artifact; those of the router are left out.

        Raises:
            ConfigError: damaged settings.
            WeightsError: a tensor is missing, unknown, of another shape, or not finite.
        """
        shapes = shapes_of(settings)
        _check(members, shapes)
        found = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
        check_fit(found, _matrices(members, shapes), what=_WHAT, among=True)  # before memory is taken for them
        made = cls(members, shapes)
        wanted = made.tensors()
        check_fit(found, sizes_of(wanted), what=_WHAT)
        with torch.no_grad():
            for name, tensor in wanted.items():
                tensor.copy_(found[name])
        return made.requires_grad_(False).eval()


def shapes_of(settings: Mapping[str, Any]) -> dict[str, InteractionShape]:
    """The shapes that the settings of an artifact state. Raises ConfigError."""
    stated = settings.get("primaries")
    if not isinstance(stated, Mapping) or not stated:
        raise ConfigError("the settings of the composition lack `primaries`: the interaction of each of them")
    return {name: InteractionShape.of(document) for name, document in stated.items()}


def documents(shapes: Shapes) -> dict[str, Any]:
    """What `settings.primaries` of an artifact holds."""
    return {name: shape.document() for name, shape in shapes.items()}


def _check(members: Sequence[str], shapes: Shapes) -> None:
    """Raises ConfigError unless the peers of each primary are the other members, all with the same widths."""
    if len(set(members)) < len(members):
        raise ConfigError(f"members are different experts, not {', '.join(members)}")
    if not shapes or not shapes.keys() <= set(members):
        raise ConfigError(f"primaries are some of the members {', '.join(members)}, not {', '.join(shapes) or 'none'}")
    widths: dict[str, int] = {}
    for primary, shape in shapes.items():
        others = [name for name in members if name != primary]
        if list(shape.peers) != others:
            raise ConfigError(f"the peers of {primary!r} are the other members, {', '.join(others)}, in their order")
        for name, width in [(primary, shape.width), *shape.peers.items()]:
            if widths.setdefault(name, width) != width:
                raise ConfigError(f"the width of {name!r} is stated as {widths[name]} and as {width}")
    if len({(each.shared_width, each.depths) for each in shapes.values()}) > 1:
        raise ConfigError("all primaries read notes of one shared width and number of depths")


def _matrices(members: Sequence[str], shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The sizes of the matrices by name: nearly all of the memory."""
    wanted: dict[str, tuple[int, ...]] = {}
    for primary, shape in shapes.items():
        for name, sizes in shape.matrices().items():
            if name.startswith("interactions."):
                wanted[f"primaries.{members.index(primary)}.{name}"] = sizes
        for peer, width in shape.peers.items():
            wanted[f"peers.{members.index(peer)}.project"] = (width, shape.shared_width)
    return wanted


def _is_shared(name: str) -> bool:
    """Whether a tensor of `state_dict` is that of a peer under the name of a primary."""
    parts = name.split(".")
    return parts[0] == "primaries" and parts[2] == "peers"
