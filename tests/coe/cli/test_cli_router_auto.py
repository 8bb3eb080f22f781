import json

import numpy as np
from test_cli_router import files, planted, run  # noqa: F401  # a fixture

CANDIDATES = json.dumps(
    [{"kind": "knn", "settings": {"k": 15}}, {"kind": "category"}, {"kind": "knn", "settings": {"k": 5000}}]
)


def command(files, *more):  # noqa: F811
    return ["router", "train", "--outcomes", files / "train.parquet", "--kind", "auto", "--out", files / "auto",
            "--set", f"candidates={CANDIDATES}", *more]  # fmt: skip


def test_auto_shows_what_it_tried_chose_and_expects(files):  # noqa: F811
    result = run(*command(files, "--encoders", "hashing:128,hashing:32"), "--json", files / "auto.json")
    document = json.loads((files / "auto.json").read_text())
    tried = [row["candidate"] for row in document["scoreboard"]]
    assert tried[0] == "best-single"
    assert any("hashing:32" in name for name in tried)
    assert any(row["skipped"] for row in document["scoreboard"])
    assert document["expected"]["gain_ci95_low"] > 0
    shown = " ".join(result.stdout.split())
    for part in ("on inner folds", "skipped", f"chosen: {document['choice']['reason'][:20]}", "expected on new"):
        assert part in shown
    assert "no router beats" not in shown
    assert "tried best-single" in result.stderr


def test_auto_says_plainly_when_the_best_single_expert_is_kept(files):  # noqa: F811
    coins = np.random.default_rng(0).random((150, 3)) < [0.5, 0.6, 0.5]
    planted(150, 0, scores=coins.astype(float)).write(files / "train.parquet")
    shown = " ".join(run(*command(files, "--encoder", "hashing:64")).stdout.split())
    assert "no router beats the best single expert on this table by more than chance" in shown
    routed = run("route", "anything at all", "--router", files / "auto").stdout.strip()
    assert routed == "shapes-expert"


def test_the_flags_of_auto_are_refused_by_other_kinds(files):  # noqa: F811
    options = ["--outcomes", files / "train.parquet", "--kind", "best-single", "--out", files / "r"]
    refused = run("router", "train", *options, "--budget-minutes", "1", ok=False)
    assert "a best-single router has no setting 'budget_minutes'" in str(refused.exception)
