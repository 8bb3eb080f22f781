"""Composed experts of architecture `logits`: members of one tokenizer, whose scores of every token are combined."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from coe.engines.base import Adapter, Member
from coe.engines.hf.composed.token_scores import OnlyWhereItPays, contrast, mean, proxy
from coe.engines.hf.in_step.lockstep import Lockstep
from coe.engines.hf.members import HFMember, check_same_vocabulary, hf_members
from coe.errors import ConfigError
from coe.types import Chunk, GenerateRequest
from registry.documents import dotted, message_of
from registry.spec import ExpertSpec

if TYPE_CHECKING:
    from torch import Tensor

    from coe.engines.latent.token_gate import TokenGate

_N_MEMBERS: Mapping[str, tuple[int, int]] = {"mean": (2, 16), "contrast": (2, 2), "proxy": (2, 3), "gate": (2, 16)}
_USED_BY: Mapping[str, tuple[str, ...]] = {
    "weights": ("mean",),
    "beta": ("contrast",),
    "plausibility": ("contrast",),
    "alpha": ("proxy",),
    "quality": ("gate",),
    "certain": ("mean", "gate"),
}


class LogitsSettings(BaseModel):
    """Settings of the architecture `logits`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    mode: Literal["mean", "contrast", "proxy", "gate"]
    """How the scores are combined. `contrast`: members are an expert and an amateur. `proxy`: A, B and the base of B,
    which may be left out if B is an adapter. `gate`: learned; needs an artifact."""
    weights: Mapping[str, Annotated[float, Field(ge=0, le=1000)]] = {}
    """mean: weight of each member, 1 by default."""
    beta: Annotated[float, Field(ge=0, le=100)] = 0.5
    """contrast: how much of the amateur is subtracted; 0 is the expert."""
    plausibility: Annotated[float, Field(ge=0, le=1)] = 0.1
    """contrast: least probability of a token, as a share of the expert's largest one."""
    alpha: Annotated[float, Field(ge=-100, le=100)] = 1.0
    """proxy: how much of the difference between B and its base is added; 0 is A."""
    quality: Mapping[str, Annotated[float, Field(ge=0, le=1)]] = {}
    """gate: a feature of each member, such as its measured accuracy; 0.5 by default."""
    certain: Annotated[float, Field(ge=0, le=1)] = 0.95
    """mean and gate: scores are combined only where the most likely tokens differ and no member gives its own more than
    this probability; 1 combines wherever they differ."""

    @model_validator(mode="after")
    def _fields_fit_the_mode(self) -> Self:
        for name in sorted(self.model_fields_set & _USED_BY.keys()):
            if self.mode not in _USED_BY[name]:
                raise ValueError(f"`{name}` is of mode {' and '.join(_USED_BY[name])}, not of {self.mode!r}")
        return self

    @classmethod
    def of(cls, spec: ExpertSpec) -> LogitsSettings:
        """The settings of a composed expert. Raises ConfigError that names every wrong field."""
        try:
            found = cls.model_validate(dict(spec.settings))
        except ValidationError as error:
            problems = [f"{dotted(each['loc'])}: {message_of(each)}".lstrip(": ") for each in error.errors()[:10]]
            raise ConfigError(f"settings of {spec.name!r}: {'; '.join(problems)}") from None
        least, most = _N_MEMBERS[found.mode]
        if not least <= len(spec.members) <= most:
            counts = str(least) if least == most else f"{least} to {most}"
            raise ConfigError(
                f"settings of {spec.name!r}: mode {found.mode!r} has {counts} members, not {len(spec.members)}"
            )
        for name in ("weights", "quality"):
            if unknown := sorted(getattr(found, name).keys() - {*spec.members}):
                raise ConfigError(f"settings of {spec.name!r}: {name}.{unknown[0]} is not one of its members")
        if not any(found.weights.get(name, 1.0) for name in spec.members):
            raise ConfigError(f"settings of {spec.name!r}: all weights are 0")
        return found


class Logits:
    """Answers token by token with all members in step; see `LogitsSettings`.

    The answer has the chat template and the end tokens of the first member. Members that are adapters of one base take
    the memory of one base, and are rows of one forward.

    Raises:
        Unsupported: a member is on another engine.
        ConfigError: a setting is wrong.
    """

    def __init__(self, spec: ExpertSpec, members: Mapping[str, Member], path: Path | None) -> None:
        self.spec, self._path = spec, path
        self._settings = LogitsSettings.of(spec)
        self._members = hf_members(spec, members)
        self.capacity = min(member.expert.capacity for member in self._members)

    @staticmethod
    def check(spec: ExpertSpec) -> None:
        """Raises ConfigError for wrong settings."""
        LogitsSettings.of(spec)

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncGenerator[Chunk, None]:
        """Yield the answer as it is generated; see `Expert.generate`.

        Raises:
            Unsupported: the members have different vocabularies, or the request wants something else than text.
        """
        tokenizers = {member.name: member.expert.loaded.tokenizer for member in self._members}
        await asyncio.to_thread(check_same_vocabulary, self.spec.name, tokenizers)
        combine = await asyncio.to_thread(self._combine)
        lockstep = Lockstep(self._in_step(), combine, name=self.spec.name)
        answer = cast("AsyncGenerator[Chunk, None]", lockstep.answer(request))
        async with aclosing(answer) as chunks:
            async for chunk in chunks:
                if chunk.finish_reason is not None and isinstance(combine, OnlyWhereItPays):
                    chunk = replace(chunk, notes=(*chunk.notes, _share(combine)))
                yield chunk

    def _in_step(self) -> list[HFMember]:
        """The members, and the base of B in mode `proxy` if it is left out."""
        members = list(self._members)
        if self._settings.mode == "proxy" and len(members) == 2:
            tuned = members[1]
            if tuned.adapter is None:
                raise ConfigError(
                    f"settings of {self.spec.name!r}: {tuned.name!r} is not an adapter, so the third member must be "
                    "the model that it was trained from"
                )
            members.append(HFMember(tuned.expert.spec.name, tuned.expert))
        return members

    def _combine(self) -> Callable[[Tensor], Tensor]:
        settings, names = self._settings, self.spec.members
        if settings.mode == "contrast":
            return partial(contrast, beta=settings.beta, plausibility=settings.plausibility)
        if settings.mode == "proxy":
            return partial(proxy, alpha=settings.alpha)
        if settings.mode == "mean":
            combine = partial(mean, weights=[settings.weights.get(name, 1.0) for name in names])
        else:
            combine = partial(_gated, self._gate(), [settings.quality.get(name, 0.5) for name in names])
        return OnlyWhereItPays(combine, settings.certain)

    def _gate(self) -> TokenGate:
        if self._path is None:
            raise ConfigError(
                f"{self.spec.name!r}: mode 'gate' needs `source`, the folder that `coe latent train` wrote"
            )
        read = partial(_read_gate, self._path)
        key = "gate", Adapter(self.spec, self._path).key()
        return self._members[0].expert.artifacts.get(key, read)


def _read_gate(path: Path) -> TokenGate:
    from coe.engines.latent.artifact import Artifact
    from coe.engines.latent.token_gate import TokenGate

    return TokenGate.of_tensors(Artifact.read(path).tensors())


def _gated(gate: TokenGate, quality: list[float], logits: Any) -> Any:
    return gate.to(logits.device).scores(logits.log_softmax(dim=-1), logits.new_tensor(quality))


def _share(used: OnlyWhereItPays) -> str:
    return (
        f"scores were combined for {used.n_combined} of {used.n_tokens} tokens; for the others the members agreed, or "
        "one was certain"
    )
