"""The `settings` of the preset `mot` in a file of `coe latent train`."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from coe.engines.latent.mot_router import check_k
from coe.engines.latent.shape import MOST_DEPTHS, MOST_INTERACTIONS, MOST_WIDTH
from routers.encoders.build import DEFAULT_ENCODER

DEFAULT_ACTIVE: Final = 3
_Factor = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
_Temperature = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class MotLosses(_Section):
    """Weights of the losses beside cross-entropy; 0 leaves one out."""

    entropy: _Factor = 0.01
    """l_e of minus the entropy of the batch's mean probabilities: different primaries in different rows."""
    balance: _Factor = 0.01
    """l_b of the share of rows of a primary times its mean probability: no member is the primary of all rows."""
    consistency: _Factor = 0.05
    """l_c of the divergence of two predictions with the same primary and other peers."""
    consistency_temperature: _Temperature = 2.0
    """T of both predictions."""
    regret: _Factor = 1.0
    """l_r of the expected loss that the router's primary has above that of the best member."""

    def factors(self) -> dict[str, float]:
        """Name of a term -> its weight."""
        return {name: getattr(self, name) for name in ("entropy", "balance", "consistency", "regret")}


class MotSettings(_Section):
    """How the members of a mixture of thoughts are combined."""

    reads: Literal["together"] = "together"
    """Peers read the prompt, and the answer while the primary writes it."""
    k: Annotated[int, Field(ge=1, le=64)] | None = None
    """K, the active members of a prompt, the primary included; null is 3, or all of fewer members."""
    router: Literal["latent", "first"] = "latent"
    """What chooses them. "latent": an MLP over the prompt's embedding, trained with the rest. "first": the first K
    members in their order, the first one answers."""
    encoder: str = DEFAULT_ENCODER
    """Of the latent router: what `coe router train --encoder` takes."""
    interactions: Annotated[int, Field(ge=1, le=MOST_INTERACTIONS)] = 4
    """Q, the cross-attentions of a primary; its layers are cut into Q + 1 stacks."""
    layers: Literal["same", "deep"] = "same"
    """"same": interaction q reads the peers at the same depth. "deep": all interactions read the last layers."""
    depths: Annotated[int, Field(ge=1, le=min(4, MOST_DEPTHS))] = 1
    """Of layers "deep": how many of 100, 83, 67 and 50% of a peer's depth."""
    shared_width: Annotated[int, Field(ge=1, le=MOST_WIDTH)] = 128
    """Width of a note."""
    heads: Annotated[int, Field(ge=1, le=1024)] = 8
    """Heads of a cross-attention."""
    null_note: bool = True
    """Whether a learned note without content competes with those of the peers."""
    spans: bool = True
    """Whether notes on the characters that a token stands for are favoured."""
    temperatures: tuple[_Temperature, _Temperature] = (1.0, 0.1)
    """tau of the Gumbel noise at the first and the last step."""
    router_learning_rate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """Highest learning rate of the router; null is that of the training."""
    compare: Annotated[tuple[str, ...], Field(max_length=8)] = ("quality",)
    """Kinds of router (docs/routers) that are fitted on the losses of the bare members, to compare the choice of the
    primary with: `settings.primary` of the artifact. It takes half a minute; [] compares with none."""
    losses: MotLosses = MotLosses()
    """Weights of the losses."""
    saved: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the matrices in the artifact."""

    def active(self, n_members: int) -> int:
        """K of so many members. Raises ConfigError if it is above their number."""
        k = min(DEFAULT_ACTIVE, n_members) if self.k is None else self.k
        check_k(n_members, k)
        return k
