import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from coe.cli.outcomes import app
from coe.compose.option_prior import OptionPrior
from routers.errors import InvalidOutcomes
from routers.outcomes.table import OutcomeTable

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
    assert "no costs (add them with `--prices` in `coe router`)" in run("check", out).stdout


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


def test_check_shows_the_share_of_refusals_of_each_expert(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [
        {
            "query_id": "a",
            "prompt": "?",
            "score::m": 1,
            "answer::m": "Paris",
            "score::n": 0,
            "answer::n": "I don't know.",
        },
        {"query_id": "b", "prompt": "!", "score::m": 0, "answer::m": "Rome", "score::n": 1, "answer::n": "Oslo"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("check", path, "--json", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["refusal_share"] == {"m": 0.0, "n": 0.5}
    assert "refusals" in result.stdout and "50.0%" in result.stdout


@pytest.mark.parametrize("mapping", ["question", "=prompt", "question="])
def test_a_map_has_two_sides(csv_file, tmp_path, mapping):
    result = run("import", csv_file, "--out", tmp_path / "t.parquet", "--map", mapping)
    assert result.exit_code == 2
    assert "is not THEIRS=OURS" in result.stderr
    assert not (tmp_path / "t.parquet").exists()


def test_prior_learns_the_habits_of_the_questions_and_says_what_they_are_worth(tmp_path):
    longest = "The right option is the long one with a full stop."
    prompts = [f"Question {i}?\nA. {longest if i % 2 else 'no'}\nB. {'no' if i % 2 else longest}" for i in range(40)]
    table = OutcomeTable(
        query_ids=[f"q{i}" for i in range(40)],
        prompts=prompts,
        experts=("a",),
        scores=[[1.0]] * 40,
        frame=pd.DataFrame({"answer": ["A" if i % 2 else "B" for i in range(40)]}),
    )
    table.write(tmp_path / "t.parquet")
    result = run("prior", tmp_path / "t.parquet", "--out", tmp_path / "prior.json", "--json", "-")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["n_questions"], document["accuracy"], document["chance"]) == (40, 1.0, 0.5)
    told = OptionPrior.read(tmp_path / "prior.json").log_prior(f"New?\nA. no\nB. {longest}\nC. perhaps")
    assert max(told, key=told.__getitem__) == "B"


def test_prior_refuses_a_table_whose_prompts_list_no_options(tmp_path, csv_file):
    out = tmp_path / "t.parquet"
    run("import", csv_file, "--out", out, "--map", "id=query_id", "--map", "question=prompt", "--scale", "100")
    result = run("prior", out, "--out", tmp_path / "prior.json")
    assert isinstance(result.exception, InvalidOutcomes) and "no column 'answer'" in str(result.exception)
    assert not (tmp_path / "prior.json").exists()
