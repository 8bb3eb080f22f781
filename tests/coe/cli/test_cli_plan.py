"""`coe plan` from the command line: the figures, their sources, and an exit status that checks memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from coe.cli.plan import plan
from coe.runs.errors import RunFolderError
from registry.digest import identity
from registry.profiles import Measure, ProfileRow
from registry.spec import ExpertSpec
from registry.store import Registry

PRICE = {"input_usd_per_mtok": 1.0, "output_usd_per_mtok": 2.0}
EXPERTS: list[dict[str, Any]] = [
    {"name": name, "kind": "model", "source": "fake://upper", "size_bytes": 2**20, "price": PRICE}
    for name in ("a", "b")
]
SERVICE = """
experts: [experts.yaml]
host: {budget: 2MiB}
policies:
  default: {expert: a}
"""
app = typer.Typer()
app.command()(plan)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("experts.yaml").write_text(json.dumps({"experts": EXPERTS}))
    Path("service.yaml").write_text(SERVICE)
    rows = [{"prompt": "x" * 40, "max_tokens": 50, "model": model} for model in ("a", "a", "b")]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{oops\n")
    return tmp_path


def coe_plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["--config", "service.yaml", "--input", "in.jsonl", *arguments])


def test_a_budget_shows_the_assignment_and_its_options_need_it(place: Path) -> None:
    result = coe_plan("--budget-usd", "0.001", "--json", "-")
    assert result.exit_code == 0, result.output
    joint = json.loads(result.stdout)["joint"]
    assert joint["rows"] == 3 and joint["rows_with_choice"] == 0 and joint["priced_by_limit"] == ["a", "b"]
    assert joint["price_usd"] == pytest.approx(3 * (15 * 1 + 50 * 2) / 1e6)
    shown = coe_plan("--budget-usd", "0.001").stdout
    assert "Assigned jointly within 0.001 USD" in shown and "What budgets buy" in shown
    weighed = coe_plan("--budget-usd", "0.001", "--load-weight", "300").stdout
    joint = json.loads(coe_plan("--budget-usd", "0.001", "--load-weight", "300", "--json", "-").stdout)["joint"]
    net = joint["quality"] - joint["load_cost"]
    assert joint["load_cost"] > 0 and net <= joint["upper_bound"] + 1e-9
    assert f"{net:,.1f} less the cost of loads. No assignment reaches more than" in " ".join(weighed.split())
    assert "another USD buys nothing" in shown and "With 1 MiB more" not in shown  # both fit already
    for options in (("--capacity", "a=3"), ("--load-weight", "1")):
        refused = coe_plan(*options)
        assert refused.exit_code == 2 and "needs --budget-usd" in refused.output
    logged = CliRunner().invoke(app, ["--config", "service.yaml", "--from-log", "x", "--budget-usd", "1"])
    assert logged.exit_code == 2 and "is for a batch" in logged.output
    assert "is not EXPERT=ROWS" in coe_plan("--budget-usd", "1", "--capacity", "a=x").output


def test_it_says_who_is_asked_what_is_moved_and_what_is_not_known(place: Path) -> None:
    result = coe_plan()
    assert result.exit_code == 0, result.output
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines()]
    assert ["a", "", "2", "1", "1 MiB", "~30", "≤ 100", "≤ 0.00023"] in lines
    assert "Total: 3 calls, 2 loads, 2 MiB moved, about 45 prompt tokens, new tokens ≤ 150" in result.stdout
    assert "seconds unknown" in result.stdout and "1 rows will fail before any call" in result.stdout
    assert "1 of 2 loads fit beside the expert that works before them" in result.stdout
    assert (
        "Unknown: the rate of loading (--load-rate), the rate of generation (--tokens-per-s), "
        "the length of answers; --like takes them from an earlier run."
    ) in result.stdout
    assert sorted(path.name for path in place.iterdir()) == ["experts.yaml", "in.jsonl", "service.yaml"]


def test_rates_give_seconds_and_json_goes_alone_to_stdout(place: Path) -> None:
    result = coe_plan("--load-rate", "512KiB", "--tokens-per-s", "50", "--json", "-")
    totals = json.loads(result.stdout)["totals"]
    assert totals["seconds_at_most"] == 2 + 2 + 1 and totals["seconds"] is None  # `b` loads while `a` works
    assert totals["cost_usd_at_most"] == pytest.approx((45 + 150 * 2) / 1e6)


def test_profiles_of_the_registry_tell_how_long_answers_get(place: Path) -> None:
    url = f"sqlite:///{place}/registry.db"
    with Registry(url) as registry:
        specs = {each["name"]: ExpertSpec.model_validate(each) for each in EXPERTS}
        registry.change(add=specs.values())
        rows = [
            ProfileRow(name, identity(spec, specs), "task", "sha256:0", "any", Measure(1.0, 2, 40.0))
            for name, spec in specs.items()
        ]
        registry.record(rows)
    Path("service.yaml").write_text(SERVICE.replace("experts: [experts.yaml]", f"registry: {url}"))
    result = coe_plan()
    assert "new tokens ~60 (≤ 150), USD ~0.00016 (≤ 0.00035)" in result.stdout
    assert "how long answers" not in result.stdout


def test_an_expert_that_fits_no_host_is_an_error_before_anything_runs(place: Path) -> None:
    Path("service.yaml").write_text(SERVICE.replace("2MiB", "1000000"))
    result = coe_plan()
    assert result.exit_code == 1
    shown = " ".join(result.stderr.split())
    assert "'a', 'b' need up to 1 MiB each, pins included; a host's budget is 1,000,000 B" in shown
    assert shown.count("error:") == 1
    rows = Path("in.jsonl").read_text().splitlines(keepends=True)
    Path("in.jsonl").write_text("".join(row for row in rows if '"b"' not in row))
    assert "error: 'a' needs 1 MiB, pins included" in " ".join(coe_plan().stderr.split())


def test_wrong_arguments_are_refused_in_words(place: Path) -> None:
    result = coe_plan("--load-rate", "fast")
    assert result.exit_code == 2 and "'fast' is no number of bytes above 0" in " ".join(result.stderr.split())
    result = coe_plan("--load-rate", "500")
    assert result.exit_code == 2 and "did you mean 500GB/s?" in " ".join(result.stderr.replace("│", " ").split())
    assert isinstance(coe_plan("--like", "nowhere").exception, RunFolderError)
