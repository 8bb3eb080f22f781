"""The router of Mixture of Thoughts (arXiv 2509.21164): a frozen encoder of the prompt and an MLP score the members.

    z = encoder(prompt), s = MLP(z) (one hidden layer of 256, ReLU), p = softmax(s)
    training: g ~ Gumbel(0, 1); A = the K members of largest s + tau g, primary = the largest; tau falls from 1 to 0.1
    w_m = 1[m in A] + p_m - stop(p_m): 1 for each member of A, with the gradient of p_m; log w_m enters the attention
    serving: g = 0

The paper encodes with DeBERTa-v3; here it is an encoder of `routers.encoders`, which other routers of a service share.
The scores of the paper's router get no gradient through the choice itself. Here they have one: through w_m, which
scales what the primary reads from peer m, and through the losses of `coe/latent/training/mot/losses.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import torch
from torch import Tensor, nn

from coe.errors import ConfigError, WeightsError
from registry.digest import shown
from routers.encoders.build import build_encoder
from routers.encoders.embed import embed
from routers.errors import RouterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from routers.encoders.base import Encoder

HIDDEN: Final = 256
LATENT, FIRST = "latent", "first"
ROUTERS: Final = (LATENT, FIRST)
"""Values of the setting `router`: the MLP, or always the first K members in their order."""
PREFIX: Final = "router."
"""Of the names of the tensors in an artifact: `router.0.weight` (256, dim), `.bias`, `router.2.weight` (M, 256)."""
_LEAST_WEIGHT: Final = 1e-6
_MOST_MEMBERS: Final = 64
_MOST_DIM: Final = 8192


@dataclass(frozen=True, slots=True)
class Chosen:
    """The members that answer a prompt.

    Attributes:
        primary: the member that writes the answer.
        peers: the members whose hidden states it reads, by falling score.
        weights: w_m of each peer; the logarithm is added to the attention scores of its notes. 1 without noise.
        probabilities: member -> p_m, of all members; equal shares of the chosen ones without an MLP.
    """

    primary: str
    peers: tuple[str, ...]
    weights: tuple[float, ...]
    probabilities: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Draw:
    """Active members of the rows of a batch.

    Attributes:
        order: (B, K) positions of the active members, the primary first, peers by falling perturbed score.
        weights: (B, M) w_m: 1 for active members and 0 for others, with the gradient of p_m.
    """

    order: Tensor
    weights: Tensor

    @property
    def primary(self) -> Tensor:
        """(B,) position of the primary of each row."""
        return self.order[:, 0]

    @property
    def log_weights(self) -> Tensor:
        """(B, M) log w_m, bounded below; the gradient of a member that is not active is 0."""
        return self.weights.clamp_min(_LEAST_WEIGHT).log()


class MotRouter(nn.Module):
    """Scores of M members from embeddings, and choices of K of them.

    Args:
        n_members: M. k: active members, the primary included.
        dim: length of an embedding.
        hidden: width of the hidden layer.

    Raises:
        ConfigError: fewer than two members, or more than 64; K below 1 or above M.
    """

    def __init__(self, n_members: int, k: int, dim: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        check_k(n_members, k)
        if not 0 < dim <= _MOST_DIM:
            raise ConfigError(f"embeddings have 1 to {_MOST_DIM} dimensions, not {dim}")
        self.n_members, self.k, self.dim = n_members, k, dim
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, n_members))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Scores (B, M) of embeddings (B, dim)."""
        scores: Tensor = self.layers(embeddings)
        return scores

    def draw(
        self, scores: Tensor, noise: Tensor | None = None, tau: float = 1.0, primary: Tensor | None = None
    ) -> Draw:
        """Choose K members of each row.

        Args:
            scores: (B, M).
            noise: (B, M) Gumbel(0, 1) numbers (`gumbel`); None chooses by the scores alone.
            tau: factor of the noise.
            primary: (B,) positions of primaries that are given; then only the peers are drawn.
        """
        perturbed = scores.detach() if noise is None else scores.detach() + tau * noise
        if primary is not None:
            perturbed = perturbed.scatter(1, primary[:, None], torch.inf)
        # Stable, so that equal scores choose the same members on every machine.
        order = perturbed.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        active = torch.zeros_like(scores).scatter(1, order, 1.0)
        p = scores.softmax(dim=1)
        return Draw(order, active + (p - p.detach()))

    def tensors(self) -> dict[str, Tensor]:
        """The weights by their names in an artifact."""
        return {PREFIX + name: tensor.detach() for name, tensor in self.layers.state_dict().items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], n_members: int, k: int) -> Self:
        """The router whose weights are among the tensors of an artifact.

        Raises:
            WeightsError: weights are missing, of other shapes, or not finite.
            ConfigError: K above M.
        """
        found = {name.removeprefix(PREFIX): each for name, each in tensors.items() if name.startswith(PREFIX)}
        first = found.get("0.weight")
        if first is None or first.ndim != 2 or max(first.shape) > _MOST_DIM or not all(first.shape):
            raise WeightsError(f"the artifact has no matrix {PREFIX}0.weight, of a router, of at most {_MOST_DIM} rows")
        router = cls(n_members, k, first.shape[1], first.shape[0])
        shapes = {name: tuple(each.shape) for name, each in router.layers.state_dict().items()}
        if (stored := {name: tuple(each.shape) for name, each in found.items()}) != shapes:
            raise WeightsError(f"the router of {n_members} members needs tensors of the shapes {shapes}, not {stored}")
        if not all(bool(each.isfinite().all()) for each in found.values()):
            raise WeightsError("the router has weights that are not finite: train it again")
        router.layers.load_state_dict({name: each.float() for name, each in found.items()})
        return router.eval()


def check_k(n_members: int, k: int) -> None:
    """Raises ConfigError unless 2 <= M <= 64 and 1 <= K <= M."""
    if not 2 <= n_members <= _MOST_MEMBERS:
        raise ConfigError(f"a mixture of thoughts has 2 to {_MOST_MEMBERS} members, not {n_members}")
    if not 1 <= k <= n_members:
        raise ConfigError(f"k, the number of active members, is {k}; it is 1 to {n_members}, the number of members")


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gumbel(0, 1) numbers: -log(-log u), u uniform in (0, 1)."""
    # The exponential distribution excludes 0 and is -log u.
    return -torch.empty(shape, dtype=torch.float32).exponential_(generator=generator).log()


def temperature(step: int, steps: int, first: float = 1.0, last: float = 0.1) -> float:
    """tau at a step of `steps`, which are counted from 0: from `first` to `last`, geometrically."""
    return float(first * (last / first) ** (step / max(1, steps - 1)))


class MemberChooser(Protocol):
    """Chooses the members of a composed expert that answer a prompt."""

    def choose(self, prompt: str, embedding: NDArray[Any] | None = None) -> Chosen:
        """The primary and its peers.

        Blocks: for 10 ms, and on first use until the encoder is loaded.

        Args:
            prompt: text of the last user message.
            embedding: (dim,) of the prompt, if known; then the text is not read.

        Raises:
            WeightsError: the encoder cannot be used.
        """
        ...


@dataclass(frozen=True, slots=True)
class FirstMembers:
    """The first K members in their order, whatever the prompt."""

    members: Sequence[str]
    k: int

    def choose(self, prompt: str, embedding: NDArray[Any] | None = None) -> Chosen:
        """See `MemberChooser.choose`."""
        active = self.members[: self.k]
        shares = dict.fromkeys(self.members, 0.0) | dict.fromkeys(active, 1 / self.k)
        return Chosen(active[0], tuple(active[1:]), (1.0,) * (self.k - 1), shares)


@dataclass(frozen=True, slots=True)
class ScoredMembers:
    """The K members of the largest scores."""

    members: Sequence[str]
    router: MotRouter
    encoder: Encoder

    def choose(self, prompt: str, embedding: NDArray[Any] | None = None) -> Chosen:
        """See `MemberChooser.choose`."""
        if embedding is None:
            try:
                [embedding] = embed(self.encoder, [prompt])
            except RouterError as error:
                raise WeightsError(f"the router of the composition cannot read the prompt: {error}") from error
        if embedding.shape != (self.router.dim,):
            raise WeightsError(f"the router reads embeddings of {self.router.dim} numbers, not {embedding.shape}")
        with torch.inference_mode():
            scores = self.router(torch.from_numpy(embedding).float()[None])
            draw = self.router.draw(scores)
            shares: list[float] = scores.softmax(dim=1)[0].tolist()
        primary, *peers = (self.members[position] for position in draw.order[0].tolist())
        return Chosen(primary, tuple(peers), (1.0,) * len(peers), dict(zip(self.members, shares, strict=True)))


def read_chooser(
    members: Sequence[str],
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    encoder: Encoder | None = None,
) -> MemberChooser:
    """What chooses the members, from an artifact.

    Args:
        members: names, in the order of the artifact.
        settings: of the artifact: `router`, `k`, and of a latent router `encoder` with `name` and `digest`.
        tensors: of the artifact.
        encoder: to be used, if it is the one that the router was trained with; None makes one.

    Raises:
        ConfigError: K above the number of members, or an unknown router.
        WeightsError: the weights do not fit, or the router was trained with another encoder.
    """
    kind, k = settings.get("router", FIRST), settings.get("k", len(members))
    if kind not in ROUTERS:
        raise ConfigError(f"router {kind!r} is not known; there are: {', '.join(ROUTERS)}")
    if not isinstance(k, int) or isinstance(k, bool):
        raise ConfigError(f"k, the number of active members, is an integer, not {k!r}")
    if len(set(members)) < len(members):
        raise ConfigError(f"members are different experts, not {', '.join(members)}")
    check_k(len(members), k)
    if kind == FIRST:
        return FirstMembers(tuple(members), k)
    router = MotRouter.of_tensors(tensors, len(members), k)
    return ScoredMembers(tuple(members), router, _same_encoder(settings.get("encoder"), router.dim, encoder))


def encoder_facts(encoder: Encoder) -> dict[str, str]:
    """What the settings of an artifact state of the encoder."""
    return {"name": encoder.name, "digest": encoder.digest}


def _same_encoder(stated: Any, dim: int, encoder: Encoder | None) -> Encoder:
    """The encoder that the router was trained with. Raises WeightsError if it is not here."""
    if not isinstance(stated, Mapping) or not all(isinstance(stated.get(key), str) for key in ("name", "digest")):
        raise WeightsError("the settings of the artifact lack `encoder` with `name` and `digest`")
    if encoder is None or encoder.digest != stated["digest"]:
        try:
            encoder = build_encoder(stated["name"])
        except RouterError as error:
            raise WeightsError(f"the encoder of the composition's router is not here: {error}") from error
    if encoder.digest != stated["digest"] or encoder.dim != dim:
        raise WeightsError(
            f"the composition's router was trained with another encoder {stated['name']!r} ({shown(stated['digest'])}, "
            f"{dim} dimensions; now {shown(encoder.digest)}, {encoder.dim}): install that one, or train again"
        )
    return encoder
