"""Blocks of features: their values, their stability, and equal treatment of training rows and new ones."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from planted_outcomes import planted_table

from routers.encoders.build import HashingEncoder
from routers.kinds.quality.features import DIMS, Features, Texts, fit_features
from routers.kinds.quality.lexical import fit_lexical, terms
from routers.kinds.quality.surface import NAMES, surface

ENCODER = HashingEncoder(64)
TABLE, NEW = planted_table(200), planted_table(100, seed=1)


def texts_of(table, signals=None):
    return Texts(table.prompts, ENCODER.encode(table.prompts), signals or {})


def test_surface_marks_by_hand():
    text = "Which is 3 + 4?\n\nA) 7\nB) 12 _"
    found = dict(zip(NAMES, surface([text])[0], strict=True))
    assert found["log characters"] == pytest.approx(np.log1p(len(text)))
    assert found["log lines"] == pytest.approx(np.log1p(4))
    assert found["digits"] == pytest.approx(5 / len(text))
    assert found["log numbers"] == pytest.approx(np.log1p(4))
    assert found["log options"] == pytest.approx(np.log1p(2))
    assert (found["which"], found["what"], found["underscore"], found["not ascii"]) == (1, 0, 1, 0)
    assert found["ends in a question mark"] == 0


@pytest.mark.parametrize("text", ["", " ", "猫は屋根の上で寝ています", "\ud800", "x" * 100_000])
def test_no_text_is_too_strange(text):
    features, _ = fit_features(texts_of(TABLE), [TABLE.domains], lexical=True, surface_marks=True, seed=0)
    seen = features.transform(Texts([text], ENCODER.encode([text]), {}))
    assert np.isfinite(seen.x).all()
    assert np.isfinite(seen.p).all()
    assert surface([text]).shape == (1, len(NAMES))


def test_lexical_reads_a_text_as_it_did_in_training():
    lexical, reduced = fit_lexical(TABLE.prompts, 16, seed=0)
    np.testing.assert_allclose(lexical.transform(TABLE.prompts), reduced, atol=1e-5)
    assert not lexical.transform([""]).any()


def test_scripts_without_blanks_between_words_are_read_by_character():
    assert terms("中国 GDP_2 增长!") == [
        "中",
        "国",
        "gdp_2",
        "增",
        "长",
        "!",
        "中 国",
        "国 gdp_2",
        "gdp_2 增",
        "增 长",
        "长 !",
    ]
    assert terms("한국어 ภาษา")[:5] == ["한국어", "ภ", "า", "ษ", "า"]  # Korean sets blanks
    questions = [f"郁金香真正的原产地是{place}" for place in "荷土法意德英"] * 4
    answers = [f"经济的性质如何{part}" for part in "甲乙丙丁戊己"] * 4
    _, reduced = fit_lexical([*questions, *answers], 2, seed=0)
    near = reduced @ reduced.T
    assert near[:24, :24].min() > near[:24, 24:].max()


def test_lexical_buckets_are_those_of_every_process():
    code = (
        "import numpy as np; from routers.kinds.quality.lexical import _counts; "
        "print(_counts('The cat, the hat')[0].tolist())"
    )
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(runs) == 1


def test_every_block_has_the_same_weight():
    features, seen = fit_features(texts_of(TABLE), [], lexical=True, surface_marks=True, seed=0)
    assert list(features.blocks) == ["embedding", "lexical", "surface"]
    widths = [block.weights.shape[1] for block in features.blocks.values()]
    assert max(widths) <= DIMS
    for columns in np.split(seen.x, np.cumsum(widths)[:-1], axis=1):
        assert columns.var(axis=0).sum() == pytest.approx(1.0, abs=1e-3)
    assert seen.p is None


def test_training_rows_are_not_told_their_own_category():
    rng = np.random.default_rng(0)
    labels = [f"label-{i}" for i in rng.integers(4, size=len(TABLE))]  # the prompts do not show which
    _, seen = fit_features(texts_of(TABLE), [labels], lexical=True, surface_marks=True, seed=0)
    names = np.unique(labels)
    assert np.mean(names[seen.p.argmax(axis=1)] == labels) < 0.4
    np.testing.assert_allclose(seen.p.sum(axis=1), 1.0)


def test_categories_of_new_queries_are_found():
    features, _ = fit_features(texts_of(TABLE), [TABLE.domains], lexical=True, surface_marks=True, seed=0)
    seen = features.transform(texts_of(NEW))
    names = np.array(features.categories[0].names)
    assert np.mean(names[seen.p.argmax(axis=1)] == np.array(NEW.domains)) > 0.95


def test_a_category_of_a_single_query_does_no_harm():
    labels = ["rare", *TABLE.domains[1:]]
    features, seen = fit_features(texts_of(TABLE), [labels], lexical=False, surface_marks=True, seed=0)
    assert "rare" in features.categories[0].names
    assert np.isfinite(seen.p).all()


def test_every_column_of_labels_counts_alike():
    halves = [str(domain in ("law", "music")) for domain in TABLE.domains]
    features, seen = fit_features(texts_of(TABLE), [TABLE.domains, halves], lexical=True, surface_marks=True, seed=0)
    assert [len(column.names) for column in features.categories] == [4, 2]
    np.testing.assert_allclose(seen.p[:, :4].sum(axis=1), 0.5)
    np.testing.assert_allclose(seen.p[:, 4:].sum(axis=1), 0.5)
    found = features.transform(texts_of(NEW))
    told = np.array(features.categories[1].names)[found.p[:, 4:].argmax(axis=1)]
    assert np.mean(told == [str(domain in ("law", "music")) for domain in NEW.domains]) > 0.95
    again = Features.restored(features.arrays(), features.settings()).transform(texts_of(NEW))
    np.testing.assert_array_equal(again.x, found.x)
    np.testing.assert_array_equal(again.p, found.p)


def test_one_category_is_none():
    features, seen = fit_features(texts_of(TABLE), [["all"] * len(TABLE)], lexical=False, surface_marks=False, seed=0)
    assert features.categories == ()
    assert seen.p is None


def test_wide_signals_are_reduced_and_outliers_cut():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(len(TABLE), 300))
    features, seen = fit_features(texts_of(TABLE, {"states": states}), [], lexical=False, surface_marks=False, seed=0)
    assert features.blocks["signal.states"].weights.shape == (300, DIMS)
    wild = features.transform(Texts(["x"], ENCODER.encode(["x"]), {"states": np.full((1, 300), 1e9)}))
    assert np.abs(wild.x).max() < 100 * np.abs(seen.x).max()


def test_features_come_back_from_their_arrays():
    features, _ = fit_features(texts_of(TABLE), [TABLE.domains], lexical=True, surface_marks=True, seed=0)
    back = Features.restored(features.arrays(), features.settings())
    np.testing.assert_array_equal(back.transform(texts_of(NEW)).x, features.transform(texts_of(NEW)).x)
