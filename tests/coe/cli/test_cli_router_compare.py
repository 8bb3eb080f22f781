import json

import pytest
from test_cli_router import files, planted, run, trained  # noqa: F401  # fixtures


@pytest.fixture
def reported(files):  # noqa: F811
    """A report of two routers, with their picks."""
    target = files / "cv.json"
    run("router", "cv", "--outcomes", files / "train.parquet", "--encoder", "hashing:128", "--kind", "best-single",
        "--kind", "category", "--with-picks", "--json", target)  # fmt: skip
    return target


def test_routers_of_a_report_are_compared_with_its_first(files, reported):  # noqa: F811
    command = ["router", "compare", reported, "--outcomes", files / "train.parquet"]
    (found,) = json.loads(run(*command, "--json", "-").stdout)
    single, category = json.loads(reported.read_text())
    assert (found["reference"], found["router"]) == ("cv: best-single", "cv: category")
    assert found["gain"] == pytest.approx(category["accuracy"] - single["accuracy"])
    assert found["gain_ci95_low"] == pytest.approx(category["gain_ci95_low"], abs=0.01)
    assert found["wins"] + found["losses"] + found["ties"] == found["n_queries"] == 150
    assert found["cost_gain"] is None
    shown = run(*command).stdout
    assert "150 queries, compared with cv: best-single" in shown
    assert f"{found['wins']} : {found['losses']}" in shown


def test_saved_routers_are_compared_on_another_table(files, trained):  # noqa: F811
    run("router", "train", "--outcomes", files / "train.parquet", "--kind", "random", "--out", files / "dice")
    command = ["router", "compare", files / "dice", trained, "--outcomes", files / "test.jsonl"]
    (found,) = json.loads(run(*command, "--json", "-", "--prices", files / "prices.json").stdout)
    (alone,) = json.loads(run("router", "eval", trained, "--outcomes", files / "test.jsonl", "--json", "-").stdout)
    assert found["accuracy"] == alone["accuracy"]
    assert found["gain_ci95_low"] > 0
    assert found["cost_gain"] == pytest.approx(0)
    assert run(*command, "--require", "gain_ci95_low:0").exit_code == 0
    refused = run(*command, "--require", "gain:0.9", ok=False)
    assert refused.exit_code == 1
    assert "gain is" in refused.stderr
    assert run(*command, "--require", "aiq:0", ok=False).exit_code == 2
    flattered = run("router", "compare", files / "dice", trained, "--outcomes", files / "train.parquet").stderr
    assert "150 of 150 queries were trained on" in " ".join(flattered.split())


def test_what_cannot_be_compared(files, reported):  # noqa: F811
    table = ["--outcomes", files / "train.parquet"]
    run("router", "cv", *table, "--kind", "random", "--json", files / "bare.json")
    (files / "broken.json").write_text("{]")
    for source, expected in {
        files / "bare.json": "write it with --with-picks",
        files / "broken.json": "is no report",
        files / "none.json": "is no report",
    }.items():
        result = run("router", "compare", reported, source, *table, ok=False)
        assert result.exit_code == 2
        assert expected in " ".join(result.stderr.replace("│", " ").split())
    one = json.loads(reported.read_text())[:1]
    (files / "one.json").write_text(json.dumps(one))
    assert "only one router" in run("router", "compare", files / "one.json", *table, ok=False).stderr
    other = run("router", "compare", reported, "--outcomes", files / "test.jsonl", ok=False)
    assert "has no pick for 90 of 90 queries" in str(other.exception)
