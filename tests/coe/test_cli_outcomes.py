import json

import pytest
from typer.testing import CliRunner

from coe.cli.outcomes import app
from routers.errors import InvalidOutcomes
from routers.outcomes import OutcomeTable

LONG = (
    "id,question,expert,score,cost\n1,what?,gpt,100,0.2\n1,what?,llama,0,0.1\n2,who?,gpt,50,0.2\n2,who?,llama,100,0.1\n"
)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)


@pytest.fixture
def csv_file(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(LONG)
    return path


def test_import_writes_a_table_that_check_accepts(tmp_path, csv_file):
    out = tmp_path / "t.parquet"
    result = run("import", csv_file, "--out", out, "--map", "id=query_id", "--map", "question=prompt", "--scale", "100")
    assert result.exit_code == 0, result.output
    table = OutcomeTable.read(out)
    assert (table.experts, table.scores.tolist()) == (("gpt", "llama"), [[1, 0], [0.5, 1]])

    checked = run("check", out)
    assert checked.exit_code == 0
    assert "2 queries, 2 experts, no domains, no folds, no answers, costs known" in checked.stdout
    assert "gpt" in checked.stdout
    assert "0.7500" in checked.stdout

    document = json.loads(run("check", out, "--json", "-").stdout)
    assert (document["valid"], document["problems"], document["n_queries"]) == (True, [], 2)
    assert document["mean_score"] == {"gpt": 0.75, "llama": 0.5}
    assert document["mean_cost_usd"]["gpt"] == pytest.approx(0.2)


def test_wide_scores_by_column_name(tmp_path):
    (tmp_path / "t.csv").write_text("prompt,gpt,llama\na,1,0\nb,0,1\n")
    out = tmp_path / "t.jsonl"
    result = run("import", tmp_path / "t.csv", "--out", out, "--score-columns", "gpt, llama", "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["mean_cost_usd"] is None
    assert OutcomeTable.read(out).experts == ("gpt", "llama")
    assert "no costs (`--prices` gives them)" in run("check", out).stdout


def test_check_tells_every_problem(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"query_id": "a", "score::m": 2}\n{"query_id": "a", "score::m": 1}\n')
    target = tmp_path / "problems.json"
    result = run("check", path, "--json", target)
    assert result.exit_code == 1
    assert isinstance(result.exception, InvalidOutcomes)
    document = json.loads(target.read_text())
    assert not document["valid"]
    assert document["problems"] == ["there is no column 'prompt'", "duplicate query id: 'a' (rows 1, 2)"]


@pytest.mark.parametrize("mapping", ["question", "=prompt", "question="])
def test_a_map_has_two_sides(csv_file, tmp_path, mapping):
    result = run("import", csv_file, "--out", tmp_path / "t.parquet", "--map", mapping)
    assert result.exit_code == 2
    assert "is not THEIRS=OURS" in result.stderr
    assert not (tmp_path / "t.parquet").exists()
