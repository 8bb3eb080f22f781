"""Speeds and answer lengths that a batch is planned with: from flags, an earlier run, or the registry's profiles."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from coe.cli.flags import rate_of_text

if TYPE_CHECKING:
    from coe.batch.planning.rates import Rates
    from coe.config import Config


def known_rates(
    config: Config, like: str | None, load_rate: str | None = None, tokens_per_s: float | None = None
) -> Rates:
    """The rates of the flags, else those of an earlier run, else those of profiles."""
    from coe.batch.planning.rates import Rates, profiled_tokens, rates_of_run
    from coe.experts import fill, open_registry

    with open_registry(config) as registry:
        fill(registry, config.experts)
        profiled = profiled_tokens(registry.profiles())
        rates = Rates() if like is None else rates_of_run(like, registry.snapshot())
    rates = replace(rates, mean_tokens={**profiled, **rates.mean_tokens})
    if load_rate is not None:
        rates = replace(rates, load_bytes_per_s=rate_of_text(load_rate, "--load-rate"))
    if tokens_per_s:
        rates = replace(rates, tokens_per_s=tokens_per_s, by_residency={})
    return rates
