"""Every reader of JSON reports a whole number with too many digits by its place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MOST = sys.get_int_max_str_digits()
LONG = "1" * (MOST + 1)
WHAT = rf"a whole number of {MOST + 1:,} digits; at most {MOST:,} are read: shorten it, or put it in quotes as text"


def file(folder: Path, text: str) -> Path:
    path = folder / "file.json"
    path.write_text(text, encoding="utf-8")
    return path


def body(folder: Path, text: str) -> object:
    from coe.serve.http.json_body import parse_json

    return parse_json(text.encode())


def large_body(folder: Path, text: str) -> object:
    return body(folder, f'{{"pad": "{"x" * 2_000_000}", "n": {text}}}')


def prices(folder: Path, text: str) -> object:
    from routers.outcomes.prices import read_prices

    return read_prices(file(folder, text))


def outcomes(folder: Path, text: str) -> object:
    from routers.outcomes.table import OutcomeTable

    path = folder / "rows.jsonl"
    path.write_text(f'{{"query_id": "1", "prompt": "a", "score::e": {text}}}\n', encoding="utf-8")
    return OutcomeTable.read(path)


def config_of_a_model(folder: Path, text: str) -> object:
    from registry.headers import read_json

    return read_json(file(folder, text))


def decision(folder: Path, text: str) -> object:
    from coe.serve.decisions.entry import decode

    return decode(text.encode(), "log:1")


def option_prior(folder: Path, text: str) -> object:
    from coe.compose.option_prior import OptionPrior

    return OptionPrior.read(file(folder, text))


def batch_row(folder: Path, text: str) -> object:
    from coe.batch.rows import _fields

    return _fields(text.encode())


def task_row(folder: Path, text: str) -> object:
    from coe.evaluation.tasks import _row

    return _row(text, None)


def answer_log(folder: Path, text: str) -> object:
    from coe.evaluation.answer_log import read_log

    return read_log(file(folder, f"{text}\n"), "run")


READERS = [
    body,
    large_body,
    prices,
    outcomes,
    config_of_a_model,
    decision,
    option_prior,
    batch_row,
    task_row,
    answer_log,
]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("text", [LONG, f'{{"n": {LONG}}}'])
def test_every_reader_says_what_is_wrong(tmp_path: Path, read: Callable[[Path, str], object], text: str) -> None:
    with pytest.raises(Exception, match=WHAT) as error:
        read(tmp_path, text)
    assert "set_int_max_str_digits" not in str(error.value)
    assert type(error.value).__module__.startswith(("coe.", "routers.", "registry."))
    if text != LONG:
        assert "n: a whole number" in str(error.value)
