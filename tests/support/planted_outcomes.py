"""Outcome tables with planted structure: topics with distinct words, and an expert for each."""

from __future__ import annotations

import numpy as np

from routers.outcomes.table import OutcomeTable

WORDS = {
    "cooking": ["oven", "flour", "butter", "recipe", "simmer", "garlic", "roast", "whisk", "dough", "saucepan"],
    "geometry": [
        "triangle",
        "angle",
        "radius",
        "circle",
        "polygon",
        "tangent",
        "perimeter",
        "vertex",
        "hypotenuse",
        "diameter",
    ],
    "law": [
        "tenant",
        "contract",
        "plaintiff",
        "statute",
        "liability",
        "court",
        "appeal",
        "verdict",
        "clause",
        "lawsuit",
    ],
    "music": ["violin", "chord", "melody", "tempo", "orchestra", "soprano", "rhythm", "sonata", "guitar", "harmony"],
}
FILLER = ["please", "tell", "me", "about", "the", "and", "then", "how", "which", "my", "with", "for"]
OOD = [
    "zxqv wvut kjhg 9981 %%%% qqq",
    "le chat dort sur le canapé rouge",
    "segfault at 0x7ffe kernel panic irq stack dump",
    "猫は屋根の上で寝ています",
    "asdkjh qwoeiu zmxncb 10101010",
]


def prompt(topic: str, rng: np.random.Generator) -> str:
    words = [*rng.choice(WORDS[topic], 5), *rng.choice(FILLER, 3)]
    return " ".join(rng.permutation(words))


def planted_table(
    n: int = 240,
    *,
    topics: tuple[str, ...] = ("cooking", "geometry", "law", "music"),
    seed: int = 0,
    costs: bool = True,
    domains: bool = True,
    good: float = 0.9,
    bad: float = 0.3,
) -> OutcomeTable:
    """Expert i is right with probability `good` in topic i, `bad` in others; the generalist with 0.6 in all."""
    rng = np.random.default_rng(seed)
    of = [topics[i % len(topics)] for i in range(n)]
    experts = (*(f"{topic}-expert" for topic in topics), "generalist")
    p = np.array([[good if topic == name.split("-")[0] else bad for name in experts] for topic in of])
    p[:, -1] = 0.6
    return OutcomeTable(
        query_ids=tuple(f"q{seed}-{i}" for i in range(n)),
        prompts=tuple(f"{prompt(topic, rng)} {i}" for i, topic in enumerate(of)),
        experts=experts,
        scores=(rng.random(p.shape) < p).astype(float),
        costs_usd=np.tile(np.arange(1.0, len(experts) + 1) * 1e-3, (n, 1)) if costs else None,
        domains=tuple(of) if domains else None,
    )
