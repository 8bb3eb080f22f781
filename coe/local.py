"""The whole system in one process, without Ray or a server: for `coe ask`, notebooks and scripts.

async with open_local(load_config("service.yaml")) as system:
    print(await system.ask("Which orders are over 100 euros?"))
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coe.compose import Composition, Latent, build_composition, named_experts
from coe.config import Config, PolicyConfig, load_config
from coe.errors import ConfigError
from coe.experts import open_snapshot
from coe.host import Host
from coe.hosting import open_host
from coe.orchestrator import Orchestrator, Reply
from coe.policy import AUTO, Always, Policy
from coe.signals.features import Filled, Signals
from coe.types import GenerateRequest
from registry.errors import UnknownExpert
from registry.spec import STAGED_ARCHITECTURES
from registry.storage import sha256_file
from registry.store import Snapshot
from routers.artifacts import ArtifactMeta, load
from routers.base import Message, Query, Router
from routers.constraints import CHAT
from routers.decision import Utility


@dataclass(frozen=True, slots=True)
class System:
    """A host that holds weights, and an orchestrator that routes requests to it."""

    host: Host
    orchestrator: Orchestrator

    def answer(self, request: GenerateRequest, *, model: str = AUTO, query: Query | None = None) -> Reply:
        """Route a request now; iterate `reply.chunks` for the answer. See `Orchestrator.answer`."""
        return self.orchestrator.answer(request, model=model, query=query)

    def answers(self, requests: Sequence[GenerateRequest], *, model: str = AUTO) -> list[Reply]:
        """Route many requests at once; iterate the replies side by side. See `Orchestrator.answers`."""
        return self.orchestrator.answers(requests, model=model)

    async def ask(self, text: str, *, model: str = AUTO, max_tokens: int | None = None) -> str:
        """The complete answer to one user message."""
        return await self.answer(
            GenerateRequest(messages=(Message("user", text),), max_tokens=max_tokens), model=model
        ).text()


@asynccontextmanager
async def open_local(config: Config | Path | str) -> AsyncIterator[System]:
    """Open the experts and policies of a configuration; an expert loads on its first request.

    Raises:
        ConfigError: the configuration is wrong, or a policy names an expert that is not registered.
        RegistryError, RouterError: the registry or a trained router cannot be opened.
    """
    config = config if isinstance(config, Config) else load_config(config)
    snapshot = (await asyncio.to_thread(open_snapshot, config)).with_versions()
    async with open_host(config, snapshot) as host:
        signals = Signals(host.snapshot, config.engines)
        try:
            yield System(
                host,
                Orchestrator(
                    host.snapshot,
                    build_policies(config.policies, host.snapshot, signals),
                    ask=host.ask,
                    default_policy=config.default_policy,
                    load_s=host.load_s,
                ),
            )
        finally:
            await asyncio.to_thread(signals.close)


def build_policies(
    policies: Mapping[str, PolicyConfig], snapshot: Snapshot, signals: Signals | None = None
) -> dict[str, Policy]:
    """The configured policies by name, their routers loaded and checked against the registered experts.

    Args:
        signals: reads the features that routers require; by default from the experts, with default engine settings.

    Raises:
        ConfigError: a policy or its composition names an expert that is not registered or cannot chat, or an unknown
            composition; or its router requires a signal that no registered expert provides.
        RouterError: a trained router cannot be loaded.
    """
    shared = signals or Signals(snapshot)  # policies that need signals of the same expert load it once
    return {name: _policy(name, policy, snapshot, shared) for name, policy in policies.items()}


def describe_policy(policy: PolicyConfig, built: Policy) -> dict[str, Any]:
    """What the answers of a policy depend on besides the experts: its settings, and digests of its router and files."""
    return {
        **policy.model_dump(mode="json", exclude={"router", "plugins"}),
        "router": built.router_digest,
        "files": [sha256_file(path) for path in policy.composition.files],
    }


def _policy(name: str, policy: PolicyConfig, snapshot: Snapshot, signals: Signals) -> Policy:
    router, meta = _router(name, policy, snapshot, signals)
    solved = 0.0 if meta is None else meta.cost_weight
    return Policy(
        name,
        router=router,
        composition=_composition(name, policy, snapshot),
        utility=Utility(
            cost_weight=solved if policy.cost_weight is None else policy.cost_weight,
            latency_weight=policy.latency_weight,
            switch_weight=policy.switch_weight,
        ),
        reads=policy.reads,
        select=policy.selector,
        fallback=policy.fallback,
        router_digest=None if meta is None else meta.digest,
        folder=policy.router,
        trained=meta,
    )


def _composition(name: str, policy: PolicyConfig, snapshot: Snapshot) -> Composition:
    """The composition of a policy. Experts that it names must be registered and able to chat."""
    kind = policy.composition.kind
    try:
        composition = build_composition(kind, policy.composition.settings)
    except ConfigError as error:
        raise ConfigError(f"policy {name!r}: {error}") from error
    for expert in named_experts(composition):
        if expert not in snapshot.experts:
            raise ConfigError(f"{kind} of policy {name!r}: {UnknownExpert(expert, snapshot.experts)}")
        if CHAT not in snapshot.experts[expert].capabilities:
            raise ConfigError(f"{kind} of policy {name!r}: {expert!r} cannot {CHAT}, so it cannot answer")
        if isinstance(composition, Latent) and not snapshot.experts[expert].is_staged:
            raise ConfigError(
                f"{kind} of policy {name!r}: {expert!r} reads no notes: name a composed expert of the architecture "
                f"{' or '.join(sorted(STAGED_ARCHITECTURES))} (docs/latent.md)"
            )
    return composition


def _router(
    name: str, policy: PolicyConfig, snapshot: Snapshot, signals: Signals
) -> tuple[Router, ArtifactMeta | None]:
    """The router of a policy, and the metadata of its artifact."""
    if policy.router is None:
        assert policy.expert is not None  # PolicyConfig takes exactly one of the two
        if policy.expert not in snapshot.experts:
            raise ConfigError(f"expert of policy {name!r}: {UnknownExpert(policy.expert, snapshot.experts)}")
        return Always(policy.expert), None
    digests = {e: spec.digest for e, spec in snapshot.experts.items()}
    digests = {**dict.fromkeys(snapshot.removed), **digests}  # a router may know those: the constraints rule them out
    loaded = load(policy.router, experts=digests, plugins=policy.plugins)
    router = loaded.router
    if not router.requires:
        return router, loaded.meta
    try:
        signals.check(router.requires)
    except ConfigError as error:
        raise ConfigError(f"the router of policy {name!r} requires an unavailable feature: {error}") from error
    return Filled(router, signals), loaded.meta
