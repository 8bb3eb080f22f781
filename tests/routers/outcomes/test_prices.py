import json

import pytest

from registry.spec import Price
from routers.errors import RouterError
from routers.outcomes.prices import read_prices


def written(tmp_path, value):
    path = tmp_path / "prices.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def price(cost_in, cost_out):
    return Price(input_usd_per_mtok=cost_in, output_usd_per_mtok=cost_out)


@pytest.mark.parametrize(
    "document",
    [
        {"m": {"input_price": 0.2, "output_price": 0.6}},
        {"m": {"input_usd_per_mtok": 0.2, "output_usd_per_mtok": 0.6}},
        {"unit": "USD per 1M tokens", "models": {"m": {"size": "8B", "input_price": 0.2, "output_price": 0.6}}},
        {"unit": "USD", "one": {"m": [0.2, 0.6]}, "two": {"m": [0.2, 0.6]}},
    ],
)
def test_the_forms_a_price_may_take(tmp_path, document):
    assert read_prices(written(tmp_path, document)) == {"m": price(0.2, 0.6)}


def test_one_number_is_both_prices(tmp_path):
    assert read_prices(written(tmp_path, {"m": 0.5, "free": 0})) == {"m": price(0.5, 0.5), "free": price(0, 0)}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("{", "cannot read prices from"),
        ([], "holds no price"),
        ({"note": "none", "on": True}, "holds no price"),
        ({"m": [1, 2, 3]}, "price of 'm': expected an input and an output price, got \\[1, 2, 3\\]"),
        ({"m": [1, -2]}, "price of 'm': Input should be greater than or equal to 0"),
        ({"m": {"input_price": 1}}, "price of 'm': Input should be a valid number"),
        ({"a": {"m": [1, 1]}, "b": {"m": [1, 2]}}, "'m' has two different prices"),
    ],
)
def test_bad_price_files_are_refused(tmp_path, document, expected):
    with pytest.raises(RouterError, match=expected):
        read_prices(written(tmp_path, document))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RouterError, match=r"nowhere\.json"):
        read_prices(tmp_path / "nowhere.json")
