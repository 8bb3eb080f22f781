"""Composed experts of architecture `lora-mix`: adapters of one base, which every token mixes as a gate weighs them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from coe.engines.base import Adapter, Member
from coe.engines.hf.lora.gates.settings import MixSettings, needs_training
from coe.engines.hf.lora.mixture import Mixture
from coe.engines.hf.members import adapters_of_one_base
from coe.errors import ConfigError
from coe.types import Chunk, GenerateRequest
from registry.spec import ExpertSpec

if TYPE_CHECKING:
    from routers.encoders.base import Encoder, Vectors

MOST_QUERY: Final = 20_000
"""Most characters of a query that the encoder reads; MiniLM takes some 1,000."""


class LoraMix:
    """Answers as one adapter does, in the same batch; it takes the memory of one base.

    Raises:
        Unsupported: a member is not an adapter, on another base, or on another engine.
        ConfigError: a setting is wrong.
    """

    def __init__(self, spec: ExpertSpec, members: Mapping[str, Member], path: Path | None) -> None:
        self.spec = spec
        self._base, adapters = adapters_of_one_base(spec, members)
        self.capacity = self._base.capacity
        self._settings = MixSettings.read(spec.settings, [adapter.spec.name for adapter in adapters], expert=spec.name)
        self._mixture = Mixture.of(spec, adapters, self._settings, path)

    @staticmethod
    def check(spec: ExpertSpec) -> None:
        """Raises ConfigError for a setting that is wrong, or a gate that needs an artifact."""
        settings = MixSettings.read(spec.settings, spec.members, expert=spec.name)
        if settings.is_trained and not spec.source:
            raise ConfigError(needs_training(spec.name, settings.gate))

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncGenerator[Chunk, None]:
        """Yield the answer as it is generated; see `Expert.generate`."""
        mixture = self._mixture
        if self._settings.gate == "glider" and self._settings.scale:
            [query] = await asyncio.to_thread(embed, self._settings.encoder, [text_of(request)])
            mixture = replace(mixture, query=query)
        answer = cast("AsyncGenerator[Chunk, None]", self._base.generate(request, mixture))
        async with aclosing(answer) as chunks:
            async for chunk in chunks:
                yield chunk


def text_of(request: GenerateRequest) -> str:
    """What a gate that reads the query embeds: the start of the last user message, or of the raw prompt."""
    if request.prompt is not None:
        return request.prompt[:MOST_QUERY]
    return next((m.content for m in reversed(request.messages) if m.role == "user"), "")[:MOST_QUERY]


def embed(encoder: str, texts: Sequence[str]) -> Vectors:
    """Unit vectors of texts, (n_texts, n) float32.

    Raises:
        ConfigError: there is no such encoder.
    """
    return _encoder(encoder).encode(texts)


@lru_cache(maxsize=2)
def _encoder(name: str) -> Encoder:
    from routers.encoders.build import build_encoder
    from routers.errors import InvalidEncoder

    try:
        return build_encoder(name)
    except InvalidEncoder as error:
        raise ConfigError(f"setting `encoder` of the gate glider: {error}") from error
