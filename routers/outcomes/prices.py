"""Price files: JSON with the price of each expert in USD per million tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from registry.json_text import loads
from registry.spec import Price
from routers.errors import RouterError

_INPUT = ("input_usd_per_mtok", "input_price", "input")
_OUTPUT = ("output_usd_per_mtok", "output_price", "output")


def read_prices(path: Path | str) -> dict[str, Price]:
    """The prices in a JSON file: expert -> price, at the top level or one level below (`{"models": {...}}`).

    A price is `{"input_price": 0.2, "output_price": 0.6}` (or `input_usd_per_mtok`, `output_usd_per_mtok`),
    `[0.2, 0.6]`, or one number for both. If several groups name an expert, their prices must agree.

    Raises:
        RouterError: the file cannot be read or holds no price, or a price is negative or contradicts another.
    """
    try:
        document = loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RouterError(f"cannot read prices from {path}: {error}") from error
    prices: dict[str, Price] = {}
    for name, value in _pairs(document):
        price = _price(value, f"{path}: price of {name!r}")
        if prices.setdefault(name, price) != price:
            raise RouterError(f"{path}: {name!r} has two different prices: keep one")
    if not prices:
        raise RouterError(f'{path} holds no price; expected {{"expert": {{"input_price": 0.2, "output_price": 0.6}}}}')
    return prices


def _pairs(document: Any) -> list[tuple[str, Any]]:
    if not isinstance(document, Mapping):
        return []
    pairs: list[tuple[str, Any]] = []
    for name, value in document.items():
        if _looks_priced(value):
            pairs.append((name, value))
        elif isinstance(value, Mapping):
            pairs += [(inner, price) for inner, price in value.items() if _looks_priced(price)]
    return pairs


def _looks_priced(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(name in value for name in (*_INPUT, *_OUTPUT))
    return isinstance(value, int | float | list) and not isinstance(value, bool)


def _price(value: Any, place: str) -> Price:
    if isinstance(value, Mapping):
        pair = [next((value[name] for name in names if name in value), None) for names in (_INPUT, _OUTPUT)]
    else:
        pair = value if isinstance(value, list) else [value, value]
    try:
        cost_in, cost_out = pair
        return Price.model_validate({"input_usd_per_mtok": cost_in, "output_usd_per_mtok": cost_out})
    except (ValueError, TypeError) as error:
        what = (
            error.errors()[0]["msg"] if isinstance(error, ValidationError) else "expected an input and an output price"
        )
        raise RouterError(f"{place}: {what}, got {value!r}") from error
