"""Every kind with an encoder reports which queries it did not read to the end."""

from __future__ import annotations

import numpy as np
import pytest
from planted_outcomes import planted_table

from routers.base import Query
from routers.decision import decide
from routers.encoders.build import HashingEncoder
from routers.factory import KINDS, build, reads_text

TABLE = planted_table(120)


class ShortSighted(HashingEncoder):
    """Reads eight words."""

    max_tokens = 8

    def encode(self, texts):
        return super().encode([" ".join(text.split()[:8]) for text in texts])

    def truncated(self, texts):
        return np.array([len(text.split()) > 8 for text in texts], dtype=bool)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if reads_text(kind)])
def test_a_long_prompt_is_told_from_the_estimate_to_the_decision(kind):
    short = "triangle radius circle"
    queries = [Query.of(short), Query.of(" ".join([short] * 3))]
    estimate = build(kind, ShortSighted(64)).fit(TABLE).estimate(queries)
    assert estimate.truncated.tolist() == [False, True]
    assert [decision.truncated for decision in decide(estimate)] == [False, True]
