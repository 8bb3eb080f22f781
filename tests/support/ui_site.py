"""A service with the page `/ui`, for its tests and pictures: a trained router over fake experts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
from api_server import Gateway, HostWeights, expert, gateway

from coe.policy import Always, Policy
from coe.serve.http.metrics import Metrics
from registry.spec import ExpertSpec, Kind, Price
from routers.artifacts import load, save
from routers.decision import Utility
from routers.encoders.build import build_encoder
from routers.evaluation.cost_weight import out_of_fold
from routers.evaluation.saved_curve import save_curve, saved_curve
from routers.factory import build
from routers.outcomes.table import OutcomeTable

MIB = 2**20
ASKED = {
    "sql": ("Which orders are over 100 euros?", "List all customers from Oslo.", "Count the orders of each customer."),
    "shell": ("Delete the file old.log.", "Show the ten largest files here.", "Count the lines of notes.txt."),
    "dates": ("Which day is the third of May 2024?", "Write 5 Jan 2023 as a date.", "Which date is Christmas 2022?"),
    "math": ("Add 17 and 25.", "Ada has 12 apples and eats 5.", "How much is 6 times 7?"),
}
ANSWERS = {  # the first key of a conversation wins: what pictures ask last stands first
    "apples": "12 - 5 = 7",
    "over 100": "```sql\nSELECT id, total\nFROM orders\nWHERE total > 100;\n```",
    "oslo": "```sql\nSELECT name FROM customers WHERE city = 'Oslo';\n```",
    "orders of each": "```sql\nSELECT customer, count(*)\nFROM orders\nGROUP BY customer;\n```",
    "old.log": "rm old.log",
    "largest": "du -a . | sort -nr | head -n 10",
    "notes.txt": "wc -l notes.txt",
    "third of may": "2024-05-03",
    "5 jan": "2023-01-05",
    "christmas": "2022-12-25",
    "17 and 25": "17 + 25 = 42",
    "6 times": "6 × 7 = 42",
}
LONG = "A query over orders needs the total of each row. " * 8
WEATHER = '@call:get_weather:{"city":"Rome"}'
USD = {"sql": 0.06, "shell": 0.06, "dates": 0.06, "math": 0.08, "general": 0.1, "large": 1.2}  # per million tokens


def script(**more: str) -> str:
    return "fake://script?" + urlencode({**ANSWERS, **more})


def zoo() -> list[ExpertSpec]:
    """Four specialists on one base, a generalist, and a large one that costs 12 times as much."""

    def priced(name: str, source: str, **fields: Any) -> ExpertSpec:
        price = Price(input_usd_per_mtok=USD[name], output_usd_per_mtok=3 * USD[name])
        return expert(name, source, price=price, **fields)

    specialist: dict[str, Any] = {"size_bytes": 24 * MIB, "context_length": 4096}
    able = frozenset({"chat", "tools"})
    return [
        priced("sql", script(default=ANSWERS["over 100"]), **specialist, description="Questions over a table, to SQL."),
        priced("shell", script(default="ls -l"), **specialist, description="What someone wants done, to one command."),
        priced("dates", script(default="2024-01-01"), **specialist, ttl_s=900, description="Days, to ISO 8601."),
        priced("math", script(default="42"), **specialist, description="Arithmetic stories, to the sum."),
        priced(
            "general",
            script(default="I can help with that.", weather=WEATHER),
            size_bytes=96 * MIB,
            capabilities=able,
        ),
        priced("large", script(default=LONG, weather=WEATHER), size_bytes=288 * MIB, capabilities=able),
        expert("broken", "fake://fail"),
        expert("vectors", kind=Kind.EMBEDDING),
    ]


def table(n: int = 240, seed: int = 0) -> OutcomeTable:
    """Questions of four topics with the scores and costs of six experts."""
    rng = np.random.default_rng(seed)
    topics = [(*ASKED,)[i % len(ASKED)] for i in range(n)]
    experts = (*ASKED, "general", "large")
    right = np.array([[0.88 if name == topic else 0.12 for name in experts] for topic in topics])
    right[:, -2], right[:, -1] = 0.5, 0.86
    scores = (rng.random(right.shape) < right).astype(float)
    tokens = rng.uniform(40, 90, (n, 1))
    return OutcomeTable(
        query_ids=tuple(f"q{seed}-{i}" for i in range(n)),
        prompts=tuple(f"{rng.choice(ASKED[topic])} {i}" for i, topic in enumerate(topics)),
        experts=experts,
        scores=scores,
        costs_usd=tokens * np.array([[3 * USD[name] for name in experts]]) * 1e-6,
        domains=tuple(topics),
    )


def trained(folder: Path, *, with_curve: bool = True) -> Policy:
    """A policy whose router is trained, saved and loaded as a service does."""
    encoder, rows = build_encoder("hashing:1024"), table()
    router = build("knn", encoder, {"k": 12}).fit(rows)
    digest = save(router, folder, table=rows, encoder=encoder)
    if with_curve:
        routing = out_of_fold(lambda: build("knn", encoder, {"k": 12}), rows, np.arange(len(rows)) % 5)
        sweep = routing.sweep(rows)
        assert sweep is not None
        save_curve(saved_curve(sweep, rows, router=digest, measured="out of fold", name="outcomes.parquet"), folder)
    loaded = load(folder)
    return Policy(
        "default",
        router=loaded.router,
        utility=Utility(cost_weight=400.0),
        fallback="general",
        router_digest=loaded.meta.digest,
        folder=folder,
        trained=loaded.meta,
    )


class PoolWeights(HostWeights):
    """The whole state of a host, as an expert host of a pool reports it."""

    async def states(self) -> list[dict[str, Any]]:
        [state] = await super().states()
        cache = self.host.cache
        copies = {"experts": ["shell", "dates"], "used_bytes": 48 * MIB, "budget_bytes": 256 * MIB}
        more = {"process": "host-1", "busy": self.host.busy, "loads": dict(self.host.loads), "copies": copies}
        return [{**state, **more, "used_bytes": cache.used_bytes}]


@asynccontextmanager
async def site(folder: Path, experts: Sequence[ExpertSpec] = (), **options: Any) -> AsyncIterator[Gateway]:
    """The service, listening; `options` as of `api_server.gateway`.

    Args:
        folder: of the router. experts: beside those of the zoo.
    """
    policies = {"default": trained(folder), "largest": Policy("largest", router=Always("large"))}
    weights: list[PoolWeights] = []

    async def states() -> Sequence[Any]:
        return await weights[0].states()

    metrics = Metrics("gateway-1", in_flight=lambda: there.service.in_flight, hosts=states)
    given = {"metrics": metrics, "policies": policies, "token_delay_s": 0.002, **options}
    async with gateway(experts=[*zoo(), *experts], budget_bytes=512 * MIB, **given) as there:
        weights.append(PoolWeights(there.host))
        there.service.weights = weights[0]
        yield there
