"""Policies in an evaluation: `coe/<policy>` is scored like one more expert.

    policies = build_policies(config.policies, snapshot)
    plan = plan_run(snapshot.experts, tasks, ["sql", "coe/symbolic"], policies=columns(config, policies, snapshot))
    async with asking(host, policies) as ask:
        report = await run(plan, folder, ask)

Compositions that build on live answers (`aggregate`, `chain`, `self-consistency`) cannot be replayed from recorded
ones; they are measured here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

from coe.config import Config
from coe.errors import InvalidRequest
from coe.evaluation.digest import json_digest
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
    """Columns of the policies by name, `coe/<policy>`.

    The digest of a column changes with the policy, its router, a file of its composition, and any expert, since a
    policy may choose any.
    """
    experts = {name: identity(spec, snapshot.experts) for name, spec in sorted(snapshot.experts.items())}
    found = {}
    for name, policy in policies.items():
        digest = json_digest([describe_policy(config.policies[name], policy), experts])
        found[RESERVED_PREFIX + name] = PolicyColumn(RESERVED_PREFIX + name, digest)
    return found


@asynccontextmanager
async def asking(host: Host, policies: Mapping[str, Policy]) -> AsyncIterator[AskExpert]:
    """A function that calls an expert by its name, or a policy by `coe/<policy>`, routed on a thread as in a gateway.

    The last chunk of a policy's answer has the usage and cost of all its expert calls.
    """
    orchestrator, batch = Orchestrator(host.snapshot, policies, ask=host.ask, load_s=host.load_s), MicroBatch()

    async def through(model: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        try:
            query = query_of(request)
            routed = await batch.route(orchestrator, query, model, long=orchestrator.may_count(query))
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
