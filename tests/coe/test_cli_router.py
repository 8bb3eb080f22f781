import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from coe.cli.route import route
from coe.cli.router import app as router_app
from registry.spec import ExpertSpec
from registry.store import Registry
from routers.artifacts import load
from routers.errors import InvalidOutcomes, InvalidSettings, UnknownRouterKind
from routers.evaluate import stratified_folds
from routers.outcomes import OutcomeTable

app = typer.Typer()
app.add_typer(router_app, name="router")
app.command("route")(route)

WORDS = {
    "food": "oven flour butter garlic",
    "shapes": "triangle angle radius circle",
    "law": "tenant court clause appeal",
}
KEYS = {
    "router", "kind", "n_queries", "n_experts", "accuracy", "best_single", "dataset_oracle", "oracle",
    "gain_over_best_single", "gain_ci95_low", "gain_ci95_high", "gap_recovered", "mean_cost", "best_single_cost",
    "route_ms_p50", "baselines",
}  # fmt: skip
MORE_KEYS = {
    "baseline_costs", "cost_saved", "cost_saved_ci95_low", "cost_saved_ci95_high", "perf_gain", "aiq", "aiq_experts",
    "c_min", "c_max", "ece", "apgr", "cpt50", "cpt80", "dials", "target", "top_k", "composition", "calls", "abstained",
    "truncated", "expert_use", "by_domain",
}  # fmt: skip


def planted(n, seed, **changes):
    """Each of three experts is good at one topic."""
    rng = np.random.default_rng(seed)
    topics = [list(WORDS)[i % 3] for i in range(n)]
    p = np.array([[0.9 if topic == of else 0.2 for of in WORDS] for topic in topics])
    arguments = {
        "query_ids": [f"{seed}-{i}" for i in range(n)],
        "prompts": [f"{' '.join(rng.choice(WORDS[topic].split(), 3))} number {i}" for i, topic in enumerate(topics)],
        "experts": [f"{topic}-expert" for topic in WORDS],
        "scores": (rng.random(p.shape) < p).astype(float),
        "domains": topics,
        "folds": stratified_folds(topics, 3),
    }
    return OutcomeTable(**{**arguments, **changes})


def run(*arguments, ok=True):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert not ok or result.exit_code == 0, (result.output, result.exception)
    return result


@pytest.fixture
def files(tmp_path):
    planted(150, 0).write(tmp_path / "train.parquet")
    planted(90, 1).write(tmp_path / "test.jsonl")
    (tmp_path / "prices.json").write_text(json.dumps({f"{topic}-expert": [1, 2] for topic in WORDS}))
    return tmp_path


@pytest.fixture
def trained(files):
    run("router", "train", "--outcomes", files / "train.parquet", "--kind", "category", "--out", files / "r",
        "--encoder", "hashing:128", "--prices", files / "prices.json")  # fmt: skip
    return files / "r"


def test_train_saves_a_router_that_says_how_it_was_made(files):
    options = ["--encoder", "hashing:64", "--set", "k=9", "--experts", "law-expert,food-expert", "--json", "-"]
    result = run(
        "router", "train", "--outcomes", files / "train.parquet", "--kind", "knn", "--out", files / "r", *options
    )
    document = json.loads(result.stdout)
    meta = load(files / "r").meta
    assert document["digest"] == meta.digest
    assert (document["kind"], document["n_queries"], document["experts"]) == ("knn", 150, ["law-expert", "food-expert"])
    assert load(files / "r").router.k == 9
    assert meta.encoder.name == "hashing:64"
    assert "trained a knn router on 150 queries of 2 experts" in result.stderr


def test_train_records_prices_and_the_digests_of_registered_experts(files, coe_home):
    with Registry() as store:
        store.add(ExpertSpec(name="law-expert", kind="model", source="/m", digest="sha256:law"))
    command = ["router", "train", "--outcomes", files / "train.parquet", "--kind", "best-single", "--out", files / "r"]
    result = run(*command, "--prices", files / "prices.json")
    meta = load(files / "r").meta
    assert meta.experts["law-expert"] == "sha256:law"
    assert meta.experts["food-expert"] is None
    assert meta.prices["law-expert"] == {"input_usd_per_mtok": 1, "output_usd_per_mtok": 2}
    assert meta.digest in result.stdout


def test_seed_and_label_column_reach_the_kinds_that_have_them(files):
    table = planted(150, 0)
    table = planted(150, 0, domains=None, frame=table.to_frame()[["domain"]].rename(columns={"domain": "topic"}))
    table.write(files / "labelled.parquet")
    command = [
        "router",
        "train",
        "--outcomes",
        files / "labelled.parquet",
        "--out",
        files / "r",
        "--encoder",
        "hashing",
    ]
    run(*command, "--kind", "category", "--label-column", "topic", "--seed", "7")
    router = load(files / "r").router
    assert (router.seed, router.label_column) == (7, "topic")
    assert sorted(router.model.categories) == sorted(WORDS)
    refused = run(*command, "--kind", "knn", "--label-column", "topic", ok=False)
    assert isinstance(refused.exception, InvalidSettings)


def test_cv_reports_every_kind_and_the_marks(files):
    command = ["router", "cv", "--outcomes", files / "train.parquet", "--encoder", "hashing:128"]
    kinds = ["--kind", "category", "--kind", "knn", "--kind", "best-single", "--set", "k=15"]
    reports = json.loads(run(*command, *kinds, "--json", "-").stdout)
    assert [report["router"] for report in reports] == ["category", "knn", "best-single"]
    assert all(KEYS | MORE_KEYS == set(report) for report in reports)
    category, knn, single = reports
    assert category["gain_ci95_low"] > 0
    assert single["gain_over_best_single"] == 0
    assert set(category["baselines"]) == {"random", "best_single", "dataset_oracle", "oracle", "knn"}
    assert "knn" not in knn["baselines"]
    assert category["mean_cost"] is None

    target = files / "cv.json"
    shown = run(*command, *kinds, "--json", target, "--prices", files / "prices.json").stdout
    assert "train.parquet, 3 folds: 150 queries, 3 experts" in shown
    for name in ("category", "best single", "dataset oracle", "random", "asked"):
        assert name in shown
    assert json.loads(target.read_text())[0]["mean_cost"] == pytest.approx(500 * 3e-6)


def test_cv_with_other_folds(files):
    table = planted(60, 2, folds=None)
    table.write(files / "t.parquet")
    command = ["router", "cv", "--outcomes", files / "t.parquet", "--kind", "random", "--json", "-"]
    drawn = run(*command, "--folds", "4", "--seed", "3")
    assert "drawing 4, stratified by domain, with seed 3" in drawn.stderr
    by_domain = run(*command, "--fold-column", "domain")
    assert json.loads(by_domain.stdout)[0]["n_queries"] == 60
    assert isinstance(run(*command, "--fold-column", "part", ok=False).exception, InvalidOutcomes)


def test_eval_scores_saved_routers_on_other_rows(files, trained):
    command = ["router", "eval", trained, "--outcomes", files / "test.jsonl"]
    (report,) = json.loads(run(*command, "--json", "-").stdout)
    assert set(report) == KEYS | MORE_KEYS
    assert (report["router"], report["kind"], report["n_queries"]) == (str(trained), "category", 90)
    assert report["accuracy"] > report["best_single"]
    assert "knn" not in report["baselines"]
    (with_train,) = json.loads(run(*command, "--train-outcomes", files / "train.parquet", "--json", "-").stdout)
    assert with_train["accuracy"] == report["accuracy"]
    assert with_train["best_single"] == report["best_single"]
    assert with_train["baselines"]["knn"] > report["best_single"]
    assert "dataset oracle" in run(*command).stdout


def test_eval_on_part_of_the_experts_and_several_routers(files, trained):
    run("router", "train", "--outcomes", files / "train.parquet", "--kind", "random", "--out", files / "other")
    command = ["router", "eval", trained, files / "other", "--outcomes", files / "test.jsonl"]
    reports = json.loads(run(*command, "--experts", "law-expert,food-expert", "--json", "-").stdout)
    assert [report["n_experts"] for report in reports] == [2, 2]
    missing = run(*command, "--experts", "lawyer", ok=False)
    assert isinstance(missing.exception, InvalidOutcomes)
    assert "did you mean 'law-expert'" in str(missing.exception)


def test_routers_measured_by_different_marks_are_shown_apart(files, trained):
    planted(150, 5, scores=1 - planted(150, 5).scores).write(files / "reverse.parquet")
    run("router", "train", "--outcomes", files / "reverse.parquet", "--kind", "best-single", "--out", files / "other")
    shown = run("router", "eval", trained, files / "other", "--outcomes", files / "test.jsonl").stdout
    assert shown.count("dataset oracle") == 2


def test_evaluating_on_training_rows_is_said(files, trained):
    result = run("router", "eval", trained, "--outcomes", files / "train.parquet")
    assert "warning: 150 of 150 queries were trained on" in result.stderr


def test_required_figures_decide_the_exit_status(files, trained):
    command = ["router", "eval", trained, "--outcomes", files / "test.jsonl", "--require"]
    assert run(*command, "gain_ci95_low:0").exit_code == 0
    low = run(*command, "accuracy:0.999", ok=False)
    assert low.exit_code == 1
    assert "not >= 0.999" in low.stderr
    for wrong, expected in {"beauty:1": "is not FIGURE:LOW", "accuracy:high": "is not a number"}.items():
        result = run(*command, wrong, ok=False)
        assert result.exit_code == 2
        assert expected in result.stderr


def test_a_figure_that_is_not_known_fails_what_requires_it(files):
    table = planted(60, 2)
    table.write(files / "t.parquet")
    result = run(
        "router", "cv", "--outcomes", files / "t.parquet", "--kind", "random", "--require", "mean_cost:0", ok=False
    )
    assert result.exit_code == 1
    assert "mean_cost is None" in result.stderr


def test_route_names_the_expert(trained):
    assert run("route", "triangle radius circle number 7", "--router", trained).stdout.strip() == "shapes-expert"
    assert run("route", "court tenant clause number 8", "--router", trained).stdout.strip() == "law-expert"
    only = run("route", "court tenant clause number 8", "--router", trained, "--allowed", "food-expert, shapes-expert")
    assert only.stdout.strip() in {"food-expert", "shapes-expert"}


def test_route_explains_itself(trained):
    shown = run("route", "triangle radius circle number 7", "--router", trained, "--explain").stdout
    assert shown.splitlines()[0] == "shapes-expert"
    for fact in (
        "category: shapes",
        "confidence: ",
        "unlike training: ",
        "expected score",
        "law-expert",
        "not eligible",
    ):
        assert fact in shown
    document = json.loads(run("route", "triangle radius circle number 7", "--router", trained, "--json", "-").stdout)
    assert document["expert"] == document["experts"][0] == "shapes-expert"
    assert document["label"] == "shapes" and document["truncated"] is False
    assert set(document["quality"]) == {f"{topic}-expert" for topic in WORDS}
    assert document["cost_usd"]["law-expert"] == pytest.approx(500 * 3e-6)


def test_route_with_a_router_that_reads_no_text(files):
    run("router", "train", "--outcomes", files / "train.parquet", "--kind", "best-single", "--out", files / "r")
    shown = run("route", "anything", "--router", files / "r", "--explain").stdout
    assert "category" not in shown
    assert json.loads(run("route", "x", "--router", files / "r", "--json", "-").stdout)["ood"] is None


def test_wrong_command_lines(files):
    command = ["router", "train", "--outcomes", files / "train.parquet", "--out", files / "r", "--encoder", "hashing"]
    assert isinstance(run(*command, "--kind", "categroy", ok=False).exception, UnknownRouterKind)
    wrong = run(*command, "--kind", "knn", "--set", "k", ok=False)
    assert wrong.exit_code == 2
    assert "is not KEY=VALUE" in wrong.stderr
    assert isinstance(run(*command, "--kind", "knn", "--set", "k=few", ok=False).exception, InvalidSettings)
    assert not (files / "r").exists()


@pytest.mark.integration
def test_minilm_routes_what_no_word_of_training_names_and_says_what_it_cuts(files):
    table = planted(90, 0)
    long = [f"{prompt} {'and so on ' * 150}" if i == 0 else prompt for i, prompt in enumerate(table.prompts)]
    planted(90, 0, prompts=long).write(files / "long.parquet")
    command = ["router", "train", "--outcomes", files / "long.parquet", "--kind", "knn", "--set", "k=15"]
    result = run(*command, "--out", files / "r")
    assert "1 of 90 prompts are longer than the 256 tokens" in " ".join(result.stderr.split())
    routed = run("route", "How do I bake bread and cook pasta?", "--router", files / "r")
    assert routed.stdout.strip() == "food-expert"
