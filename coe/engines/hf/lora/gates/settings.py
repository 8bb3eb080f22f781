"""Settings of a mixture of LoRA adapters: which gate weighs them, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from coe.errors import ConfigError

MOST_MEMBERS: Final = 64
"""Most adapters of one mixture."""
MOST_TEXT: Final = 4096
"""Most characters of an instruction."""
TRAINED: Final = frozenset({"phatgoose", "glider", "trained", "fixed"})
"""Gates with trained weights, which an artifact holds."""

Text = Annotated[str, Field(min_length=1, max_length=MOST_TEXT)]
Weight = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)


class EntropyRule(_Settings):
    """How many adapters a token uses, by the Tsallis entropy of the gate's probabilities (DynMoLE, arXiv 2504.00661).

    H = (1 - sum p^q) / (q - 1). Where H > tau, all adapters are mixed; else adapters are added by falling probability
    until their sum passes p.
    """

    q: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] = 1.1
    """Index of the entropy; 1 is Shannon's."""
    tau: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    """Above this entropy all adapters are mixed. The entropy of n equal probabilities is (1 - n^(1 - q)) / (q - 1)."""
    p: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Sum of probabilities to pass."""
    coefficient: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Weight of the mean entropy in the training loss."""


class Balance(_Settings):
    """A training loss on how the tokens of a batch are spread over the adapters."""

    kind: Literal["switch", "localized"] = "switch"
    """`switch`: the number of adapters times the sum over adapters of (share of tokens) x (mean probability), as in
    LLaVA-MoLE (arXiv 2401.16160). `localized`: variance / mean of the importances, which are weighted by group, as in
    LoRAMoE (arXiv 2312.09979)."""
    coefficient: Annotated[float, Field(ge=0, le=10)] = 0.01
    """Weight of the loss."""
    sign: Literal[1, -1] = 1
    """1 pushes to balance; -1 pushes each layer to few adapters (LoRA-Mixer, arXiv 2507.00029)."""
    groups: Annotated[Mapping[str, Text], Field(max_length=MOST_MEMBERS)] = {}
    """Member -> its group, for `localized`; rows of training data name their group in `group`."""
    delta: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """`localized`: importances of adapters of the row's group weigh 1 + delta, of others 1 - delta."""

    @model_validator(mode="after")
    def _groups_fit_the_kind(self) -> Self:
        if (self.kind == "localized") != bool(self.groups):
            raise ValueError("balance.groups are for balance.kind 'localized', which needs them: member -> group")
        return self


class MixSettings(_Settings):
    """`settings` of a composed expert of architecture `lora-mix`."""

    gate: Literal["arrow", "phatgoose", "glider", "trained", "fixed"] = "arrow"
    """What weighs the adapters; all but `arrow` are trained by `coe latent train` (preset `lora-mix`), `fixed` may also
    state its `weights`."""
    top_k: Annotated[int, Field(ge=1, le=MOST_MEMBERS)] | None = 2
    """Adapters that a token uses in a layer; null mixes all of them."""
    temperature: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Divides the logits before the softmax."""
    scale: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """`glider`: weight of the cosine of the expert's and the query's embedding."""
    encoder: Text = "minilm"
    """`glider`: the encoder of instructions and queries (docs/encoders.md)."""
    instructions: Annotated[Mapping[str, Text], Field(max_length=MOST_MEMBERS)] = {}
    """`glider`: member -> what it does, in one or two sentences; default: the `description` of the expert."""
    weights: Annotated[Mapping[str, Weight], Field(max_length=MOST_MEMBERS)] = {}
    """`fixed`: member -> its weight for every token; members not named have 0."""
    experts_per_layer: Annotated[Sequence[Annotated[int, Field(ge=1, le=MOST_MEMBERS)]], Field(max_length=1024)] = ()
    """Adapters that equal groups of layers may use, first layers first, such as [2, 4, 6, 8] (MoLA, arXiv 2402.08562):
    in each layer those whose update has the largest norm."""
    entropy: EntropyRule | None = None
    """Takes the place of `top_k`."""
    balance: Balance | None = None
    """Read in training only."""
    noise: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Standard deviation of the noise on the logits, in training only."""

    @model_validator(mode="after")
    def _fit_the_gate(self) -> Self:
        if self.weights and self.gate != "fixed":
            raise ValueError(f"`weights` are for the gate 'fixed', not {self.gate!r}")
        if self.instructions and self.gate != "glider":
            raise ValueError(f"`instructions` are for the gate 'glider', not {self.gate!r}")
        if self.gate != "trained" and (self.balance or self.noise):
            raise ValueError(f"`balance` and `noise` are for the gate 'trained', not {self.gate!r}")
        return self

    @property
    def is_trained(self) -> bool:
        """Whether the gate needs an artifact."""
        return self.gate in TRAINED and not self.weights

    @classmethod
    def read(cls, settings: Mapping[str, Any], members: Sequence[str], *, expert: str) -> Self:
        """The settings of a composed expert, checked against its members.

        Raises:
            ConfigError: a setting does not exist, has a wrong value, or names an expert that is not a member.
        """
        try:
            read = cls.model_validate(dict(settings))
        except ValidationError as error:
            problems = "; ".join(_problem(each) for each in error.errors(include_url=False, include_input=False))
            raise ConfigError(f"settings of the composed expert {expert!r}: {problems}") from None
        groups = read.balance.groups if read.balance else {}
        named = {*read.weights, *read.instructions, *groups}
        if strange := sorted(named - set(members)):
            raise ConfigError(
                f"settings of the composed expert {expert!r} name {', '.join(map(repr, strange))}, which are not among "
                f"its members: {', '.join(members)}"
            )
        if read.top_k is not None and "top_k" in read.model_fields_set and read.top_k > len(members):
            raise ConfigError(
                f"settings of the composed expert {expert!r}: top_k is {read.top_k}, and it has {len(members)} members"
            )
        return read


def needs_training(expert: str, gate: str) -> str:
    """The message about a trained gate without an artifact."""
    return (
        f"the composed expert {expert!r} has the gate {gate!r}, whose weights are trained: train it with "
        "`coe latent train` (preset: lora-mix), and register its folder as `source`"
    )


def _problem(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    text = str(error["msg"]).removeprefix("Value error, ")
    return f"{place}: {text}" if place else text
