"""Policies beside experts in an evaluation: `coe/<policy>` is asked and scored as one more expert.

    policies = build_policies(config.policies, snapshot)
    plan = plan_run(snapshot.experts, tasks, ["sql", "coe/symbolic"], policies=columns(config, policies, snapshot))
    async with asking(host, policies) as ask:
        report = await run(plan, folder, ask)

What a composition of live answers is worth (`aggregate`, `chain`, `self-consistency`) cannot be replayed from recorded
ones; it is measured here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

from coe.config import Config
from coe.errors import InvalidRequest
from coe.evaluation.plan import PolicyColumn
from coe.host import Host
from coe.local import describe_policy
from coe.orchestrator import AskExpert, Orchestrator, query_of
from coe.policy import Policy
from coe.serve.http.micro_batch import MicroBatch
from coe.types import Chunk, GenerateRequest
from registry.digest import identity
from registry.spec import RESERVED_PREFIX
from registry.store import Snapshot
from routers.errors import RouterError


def columns(config: Config, policies: Mapping[str, Policy], snapshot: Snapshot) -> dict[str, PolicyColumn]:
    """The policies by the names under which they are asked: `coe/<policy>`.

    A column is another one when the policy, its router, a file of its composition, or any expert has changed: a policy
    may choose any of them.
    """
    experts = {name: identity(spec, snapshot.experts) for name, spec in sorted(snapshot.experts.items())}
    found = {}
    for name, policy in policies.items():
        said = json.dumps([describe_policy(config.policies[name], policy), experts], sort_keys=True)
        digest = f"sha256:{hashlib.sha256(said.encode()).hexdigest()}"
        found[RESERVED_PREFIX + name] = PolicyColumn(RESERVED_PREFIX + name, digest)
    return found


@asynccontextmanager
async def asking(host: Host, policies: Mapping[str, Policy]) -> AsyncIterator[AskExpert]:
    """How to ask an expert by its name, or a policy by `coe/<policy>`: routed as a gateway routes, on a thread.

    The last chunk of a policy's answer has the usage and the cost of everybody who was asked.
    """
    orchestrator, batch = Orchestrator(host.snapshot, policies, ask=host.ask, load_s=host.load_s), MicroBatch()

    async def through(model: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        try:
            routed = await batch.route(orchestrator, query_of(request), model)
        except RouterError as error:
            raise InvalidRequest(str(error)) from error
        reply = orchestrator.reply(replace(request, stream=False), routed)
        async with aclosing(reply.chunks) as chunks:
            async for chunk in chunks:
                yield chunk

    def ask(name: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        return through(name, request) if name.startswith(RESERVED_PREFIX) else host.ask(name, request)

    try:
        yield ask
    finally:
        batch.close()
