"""Reference: the summary of a training table that a later evaluation needs for its baselines."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from routers.outcomes.table import OutcomeTable


@dataclass(frozen=True, slots=True)
class Reference:
    """Mean scores of the experts on a training table, and hashes of its query ids.

    Attributes:
        experts: m names.
        mean_scores: (m,) over all n training queries.
        by_domain: domain -> (m,) over its training queries; empty if the table has no domains.
        ids: (n,) sorted uint64 hashes of the training query ids, to detect overlap without storing the ids.
    """

    experts: tuple[str, ...]
    mean_scores: NDArray[np.float64]
    by_domain: Mapping[str, NDArray[np.float64]]
    ids: NDArray[np.uint64]

    @classmethod
    def of(cls, table: OutcomeTable) -> Self:
        """The reference of a training table."""
        return cls.of_scores(table.experts, table.scores, table.domains, hashed_ids(table.query_ids))

    @classmethod
    def of_scores(
        cls,
        experts: tuple[str, ...],
        scores: NDArray[np.float64],
        domains: Sequence[str] | None,
        ids: NDArray[np.uint64],
    ) -> Self:
        """The same from (n, m) scores, n domains or `None`, and the (n,) `hashed_ids` of the queries."""
        by_domain: dict[str, NDArray[np.float64]] = {}
        if domains is not None:
            of = np.array(domains, dtype=object)
            by_domain = {domain: scores[of == domain].mean(axis=0) for domain in sorted(set(domains))}
        return cls(experts, scores.mean(axis=0), by_domain, np.sort(ids))

    def with_experts(self, names: Sequence[str]) -> Self:
        """The reference for these experts, in this order; all must be among `experts`."""
        columns = [self.experts.index(name) for name in names]
        by_domain = {domain: means[columns] for domain, means in self.by_domain.items()}
        return replace(self, experts=tuple(names), mean_scores=self.mean_scores[columns], by_domain=by_domain)

    def seen(self, query_ids: Sequence[str]) -> NDArray[np.bool_]:
        """(k,) bool: which of k queries were trained on."""
        return np.isin(hashed_ids(query_ids), self.ids)

    def ids_digest(self) -> str:
        """`sha256:...` over `ids`: equal for the same queries in any order."""
        return f"sha256:{hashlib.sha256(self.ids.astype('<u8').tobytes()).hexdigest()}"

    def to_json(self) -> dict[str, Any]:
        """Everything except `ids`, as JSON values, from which `from_json` rebuilds the reference."""
        by_domain = {domain: means.tolist() for domain, means in self.by_domain.items()}
        return {"experts": list(self.experts), "mean_scores": self.mean_scores.tolist(), "by_domain": by_domain}

    @classmethod
    def from_json(cls, document: Mapping[str, Any], ids: NDArray[np.uint64]) -> Self:
        """Inverse of `to_json`."""
        by_domain = {domain: np.array(means) for domain, means in document["by_domain"].items()}
        return cls(tuple(document["experts"]), np.array(document["mean_scores"]), by_domain, ids)


def hashed_ids(ids: Sequence[str]) -> NDArray[np.uint64]:
    """(n,) a 64-bit hash of each query id."""
    digests = (hashlib.blake2b(i.encode("utf-8", "surrogatepass"), digest_size=8).digest() for i in ids)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
