import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from coe.cli.route.command import route
from coe.cli.router.app import app as router_app
from coe.config import PolicyConfig
from registry.spec import ExpertSpec
from registry.store import Registry
from routers.artifacts import load
from routers.decision import decide
from routers.errors import InvalidOutcomes, InvalidSettings, UnknownRouterKind
from routers.evaluation.cross_validation import stratified_folds
from routers.outcomes.table import OutcomeTable
from routers.selectors import Dynamic

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
    "c_min", "c_max", "ece", "apgr", "cpt50", "cpt80", "cost_weights", "target", "top_k", "composition", "calls",
    "abstained", "truncated", "refused", "expert_use", "by_domain", "consistency", "consistency_whole",
    "consistency_by_variant",
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
    assert load(files / "r").router.settings.k == 9
    assert meta.encoder.name == "hashing:64"
    assert "trained knn on 150 queries of 2 experts" in result.stderr


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
    assert (router.settings.seed, router.settings.label_column) == (7, "topic")
    assert sorted(router.model.categories) == sorted(WORDS)
    refused = run(*command, "--kind", "knn", "--label-column", "topic", ok=False)
    assert isinstance(refused.exception, InvalidSettings)


def test_cv_reports_every_kind_and_the_marks(files):
    command = ["router", "cv", "--outcomes", files / "train.parquet", "--encoder", "hashing:128"]
    kinds = ["--kind", "category", "--kind", "knn", "--kind", "best-single", "--set", "k=15"]
    reports = json.loads(run(*command, *kinds, "--json", "-").stdout)
    assert [report["router"] for report in reports] == ["category", "knn", "best-single"]
    assert all(set(report) == KEYS | MORE_KEYS for report in reports)
    category, knn, single = reports
    assert category["gain_ci95_low"] > 0
    assert single["gain_over_best_single"] == 0
    baselines = {"random", "best_single", "dataset_oracle", "oracle", "knn", "category"}
    assert all(set(report["baselines"]) == baselines for report in reports)
    assert category["baselines"]["category"] == category["accuracy"]
    assert knn["baselines"]["knn"] != knn["accuracy"]  # the baseline keeps its default k
    assert category["mean_cost"] is None

    target = files / "cv.json"
    shown = run(*command, *kinds, "--json", target, "--prices", files / "prices.json").stdout
    assert "train.parquet, 3 folds: 150 queries, 3 experts" in shown
    for name in ("category", "best single", "dataset oracle", "random", "asked"):
        assert name in shown
    assert json.loads(target.read_text())[0]["mean_cost"] == pytest.approx(500 * 3e-6)


def priced(files):
    """A price for each expert; the law expert's is by far the highest."""
    prices = {f"{topic}-expert": [price, price] for topic, price in zip(WORDS, (1, 2, 30), strict=True)}
    (files / "unlike.json").write_text(json.dumps(prices))
    return ["--prices", files / "unlike.json"]


def test_cv_shows_baselines_for_kinds_that_read_no_text_where_an_encoder_is_given(files):
    command = ["router", "cv", "--outcomes", files / "train.parquet", "--kind", "best-single", "--json", "-"]
    (plain,) = json.loads(run(*command).stdout)
    (encoded,) = json.loads(run(*command, "--encoder", "hashing:128").stdout)
    assert set(encoded["baselines"]) - set(plain["baselines"]) == {"knn", "category"}


def test_cv_solves_a_cost_weight_in_each_fold(files):
    command = ["router", "cv", "--outcomes", files / "train.parquet", "--encoder", "hashing:128", "--kind", "knn"]
    command += ["--set", "k=15", *priced(files), "--json", files / "cv.json"]
    shown = run(*command, "--budget-usd", "0.004").stdout
    (report,) = json.loads((files / "cv.json").read_text())
    assert "cost weight solved in each fold: " in " ".join(shown.split())
    assert len(report["cost_weights"]) == 3
    assert report["target"]["name"] == "budget"
    assert {fold["target"]["usd"] for fold in report["target"]["folds"]} == {0.004}
    assert all(fold["mean_cost"] <= 0.004 for fold in report["target"]["folds"])
    run(*command)
    assert report["mean_cost"] < json.loads((files / "cv.json").read_text())[0]["mean_cost"]
    run(*command, "--save-cost", "--margin", "0")
    (saved,) = json.loads((files / "cv.json").read_text())
    assert saved["target"]["folds"][0]["target"] == {"name": "save-cost", "margin": 0}
    assert saved["accuracy"] >= saved["best_single"]
    assert 0 < saved["aiq"] <= 1
    assert saved["c_min"] == pytest.approx(1e-3)
    assert saved["c_max"] == pytest.approx(3e-2)


def test_targets_that_contradict_each_other(files):
    command = ["router", "cv", "--outcomes", files / "train.parquet", "--kind", "best-single"]
    for wrong in (["--save-cost", "--budget-usd", "1"], ["--margin", "1"], ["--save-cost", "--cost-weight", "1"]):
        assert run(*command, *wrong, ok=False).exit_code == 2
    missing = run(*command, "--save-cost", ok=False)
    assert "the table has none: add `cost::<expert>` columns, or give --prices" in str(missing.exception)
    unknown = run("router", "cv", "--outcomes", files / "train.parquet", "--kind", "knn", "--cost-weight", "1",
                  "--encoder", "hashing:64", "--set", "k=9", ok=False)  # fmt: skip
    assert "this router knows no costs" in str(unknown.exception)


def test_a_router_is_trained_for_a_target_and_keeps_its_cost_weight(files):
    command = ["router", "train", "--outcomes", files / "train.parquet", "--kind", "knn", "--encoder", "hashing:128"]
    command += ["--set", "k=15", *priced(files), "--out", files / "r"]
    result = run(*command, "--budget-usd", "0.004", "--json", files / "train.json")
    solved = json.loads((files / "train.json").read_text())["solved"]
    meta = load(files / "r").meta
    assert meta.solved == solved
    assert meta.cost_weight == solved["cost_weight"] > 0
    assert solved["mean_cost"] <= 0.004
    assert f"cost weight {solved['cost_weight']:.4g}: out of fold" in result.stderr
    test = ["--outcomes", files / "test.jsonl", *priced(files), "--json", "-"]
    (kept,) = json.loads(run("router", "eval", files / "r", *test).stdout)
    (free,) = json.loads(run("router", "eval", files / "r", *test, "--cost-weight", "0").stdout)
    assert kept["cost_weights"] == [solved["cost_weight"]]
    assert kept["mean_cost"] < free["mean_cost"]
    assert load(trained_without(files)).meta.cost_weight == 0
    low = run(*command, "--budget-usd", "0.0005")
    assert "no cost weight reaches this budget" in " ".join(low.stderr.split())


def trained_without(files):
    run("router", "train", "--outcomes", files / "train.parquet", "--kind", "best-single", "--out", files / "plain")
    return files / "plain"


def test_training_says_which_experts_are_not_registered(files, coe_home):
    command = ["router", "train", "--outcomes", files / "train.parquet", "--kind", "best-single", "--out", files / "r"]
    assert "not registered" not in run(*command).stderr  # there is no registry
    with Registry() as store:
        store.add(ExpertSpec(name="law-expert", kind="model", source="/m", digest="sha256:law"))
    result = run(*command, "--json", "-")
    assert "not registered: food-expert, shapes-expert" in " ".join(result.stderr.split())
    assert json.loads(result.stdout)["unregistered"] == ["food-expert", "shapes-expert"]


def test_compositions_are_replayed_from_recorded_answers(files):
    table = planted(90, 1)
    answers = {name: tuple("AB"[int(s)] for s in table.scores[:, m]) for m, name in enumerate(table.experts)}
    planted(90, 1, answers=answers).write(files / "answered.parquet")
    run("router", "train", "--outcomes", files / "train.parquet", "--kind", "knn", "--encoder", "hashing:128",
        "--set", "k=15", "--out", files / "k")  # fmt: skip
    command = ["router", "eval", files / "k", "--outcomes", files / "answered.parquet"]
    (vote,) = json.loads(run(*command, "--top-k", "3", "--compose", "vote", "--json", "-").stdout)
    assert (vote["top_k"], vote["composition"], vote["calls"]) == (3, "vote", 3)
    assert vote["accuracy"] == pytest.approx((table.scores.sum(axis=1) >= 2).mean())
    shown = run(*command, "--top-k", "3", "--compose", "vote").stdout
    assert "vote of 3.00 experts per query" in " ".join(shown.split())
    weighted = run(
        *command, "--top-k", "3", "--select", "dynamic,p=0.0", "--compose", "weighted-vote,options=2", "--json", "-"
    )
    assert json.loads(weighted.stdout)[0]["calls"] == 1  # the first alone is right with a probability of 0 or more
    wrong = run(*command, "--compose", "weighted-vote,optoins=2", ok=False)
    assert str(wrong.exception).startswith("composition 'weighted-vote' has no setting optoins; it has: key, options")
    assert "'options' is not KEY=VALUE" in run(*command, "--compose", "vote,options", ok=False).stderr
    alone = run(*command, "--top-k", "3", ok=False)
    assert alone.exit_code == 2
    assert "--compose" in alone.stderr


def test_plots_are_drawn(files):
    command = ["router", "cv", "--outcomes", files / "train.parquet", "--encoder", "hashing:128", "--kind", "category"]
    result = run(*command, *priced(files), "--plot", files / "out.png")
    assert (files / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "drew" in result.stderr


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


def test_eval_shows_whether_other_wordings_get_the_same_expert(files, trained):
    prompts = [row["prompt"] for row in map(json.loads, (files / "test.jsonl").read_text().splitlines()[:4])]
    rows = [
        {"group": i, "variant": label, "prompt": prompt}
        for i, prompt in enumerate(prompts)
        for label, prompt in (("en", prompt), ("twice", f"{prompt} {prompt}"), ("none", "zzz"))
    ]
    (files / "variants.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["router", "eval", trained, "--outcomes", files / "test.jsonl", "--variants", files / "variants.jsonl"]
    (report,) = json.loads(run(*command, "--json", "-").stdout)
    assert report["consistency_by_variant"]["twice"] == 1.0 > report["consistency_by_variant"]["none"]
    assert report["consistency"] == sum(report["consistency_by_variant"].values()) / 2
    assert report["consistency_whole"] == report["consistency_by_variant"]["none"], "the only one that differs"
    shown = " ".join(run(*command).stdout.split())
    assert f"same expert for {100 * report['consistency']:.1f}% of the variants (twice 100.0%, none" in shown
    failed = run(*command, "--require", "consistency:1", ok=False)
    assert failed.exit_code == 1 and "consistency is" in failed.stderr
    (files / "variants.jsonl").write_text('{"prompt": "x"}\n')
    assert "no column 'group'" in str(run(*command, ok=False).exception)


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
        "out of distribution: ",
        "expected score",
        "law-expert",
        "not eligible",
    ):
        assert fact in shown
    document = json.loads(run("route", "triangle radius circle number 7", "--router", trained, "--json", "-").stdout)
    assert document["experts"][0] == "shapes-expert"
    assert document["label"] == "shapes" and document["truncated"] is False
    assert set(document["estimate"]) == {f"{topic}-expert" for topic in WORDS}
    assert document["estimate"]["law-expert"]["cost_usd"] == pytest.approx(500 * 3e-6)


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


def test_train_solves_a_selector_for_a_mean_number_of_experts(files):
    command = ["router", "train", "--outcomes", files / "train.parquet", "--kind", "knn", "--out", files / "r"]
    options = ["--encoder", "hashing:128", "--set", "k=15", "--json", "-"]
    assert json.loads(run(*command, *options).stdout)["policy"] is None
    assert load(files / "r").meta.policy is None
    solved = run(*command, *options, "--max-calls", "1.5", "--top-k", "3")
    policy = json.loads(solved.stdout)["policy"]
    select = policy["select"]
    assert list(policy) == ["select"] and select["kind"] == "dynamic" and select["k"] == 3 and 0 < select["p"] < 1
    assert f"set select: {{kind: dynamic, p: {select['p']}, k: 3}} in the policy" in " ".join(solved.stderr.split())
    assert load(files / "r").meta.policy == policy
    assert PolicyConfig.model_validate({"expert": "a", **policy}).selector == Dynamic(p=select["p"], k=3)
    estimate = load(files / "r").router.estimate(planted(300, 2).queries())
    asked = [len(d.experts) for d in decide(estimate, select=Dynamic(p=select["p"], k=3))]
    assert 1.2 < np.mean(asked) < 1.8  # on queries outside the comparison
    assert run(*command, *options, "--max-calls", "0.5", ok=False).exit_code == 2


def test_train_solves_the_confidence_of_a_cascade(files):
    def alike(n, seed):  # experts of similar quality, so that two of them can outvote the best
        scores = (np.random.default_rng(seed).random((n, 3)) < [0.65, 0.6, 0.55]).astype(float)
        answers = {
            f"{topic}-expert": tuple("AB"[int(score)] for score in scores[:, m]) for m, topic in enumerate(WORDS)
        }
        return planted(n, seed, scores=scores, answers=answers)

    alike(150, 0).write(files / "answered.parquet")
    alike(300, 2).write(files / "new.parquet")
    command = ["router", "train", "--outcomes", files / "answered.parquet", "--kind", "knn", "--out", files / "r"]
    options = ["--encoder", "hashing:128", "--set", "k=100", "--max-calls", "1.5", "--top-k", "3", "--json", "-"]
    policy = json.loads(run(*command, *options, "--compose", "cascade,options=10").stdout)["policy"]
    assert policy["select"] == {"kind": "top-k", "k": 3} and load(files / "r").meta.policy == policy
    composition = policy["composition"]
    assert (composition["kind"], composition["options"]) == ("cascade", 10) and 0 < composition["confidence"] < 1
    evaluate = ["router", "eval", files / "r", "--outcomes", files / "new.parquet", "--top-k", "3", "--json", "-"]
    solved, certain = (
        json.loads(run(*evaluate, "--compose", f"cascade,options=10,confidence={value}").stdout)[0]["calls"]
        for value in (composition["confidence"], 1)
    )
    assert solved < 1.8 < certain
    refused = run(*command, *options, "--compose", "vote", ok=False)
    assert refused.exit_code == 2 and "only `cascade`" in refused.stderr


def test_the_curve_is_kept_where_it_was_measured_on_other_rows(files):
    def curve(folder):
        path = folder / "curve.json"
        return json.loads(path.read_text()) if path.exists() else None

    router, prices = files / "router", ["--prices", files / "prices.json"]
    encoder = ["--encoder", "hashing:64"]
    run("router", "train", "--outcomes", files / "train.parquet", "--kind", "knn", "--out", router, *encoder)
    assert curve(router) is None, "nothing was measured"
    evaluate = ["router", "eval", router, "--outcomes", files / "test.jsonl"]
    run(*evaluate, *prices)
    assert curve(router) is None, "a folder is changed on request only"
    told = run(*evaluate, "--save-curve")
    assert "no curve is saved: it needs costs" in " ".join(told.output.split()) and curve(router) is None
    solved = [*encoder, *prices, "--save-cost", "--margin", "0"]
    run("router", "train", "--outcomes", files / "train.parquet", "--kind", "knn", "--out", router, *solved)
    found = curve(router)
    assert (found["measured"], found["rows"], found["table"]) == ("out of fold", 150, "train.parquet")
    assert found["router"] == load(router).meta.digest
    run(*evaluate, *prices, "--save-curve")
    assert (curve(router)["measured"], curve(router)["rows"]) == ("held out", 90)
