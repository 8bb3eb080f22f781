"""Updated routers equal newly trained ones and encode only new prompts."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from planted_outcomes import OOD, planted_table

from routers.artifacts import load, save
from routers.base import Query
from routers.encoders.build import HashingEncoder
from routers.errors import InvalidOutcomes, InvalidSettings, RouterError
from routers.factory import build
from routers.outcomes.reference import Reference
from routers.outcomes.table import OutcomeTable
from routers.update import add_expert, add_rows, remove_expert, updatable

WHOLE = planted_table(160)
OLD, NEW = WHOLE.select(np.arange(120)), WHOLE.select(np.arange(120, 160))
QUERIES = [*planted_table(40, seed=1).queries(), *(Query.of(text) for text in OOD)]
SETTINGS = {"knn": {"k": 9}, "cluster": {"n_clusters": 6}, "category": {}, "pilot": {}}
KINDS = list(SETTINGS)


class CountingEncoder(HashingEncoder):
    """Records the texts it encodes."""

    def __init__(self, dim=128):
        super().__init__(dim)
        self.asked = []

    def encode(self, texts):
        self.asked.extend(texts)
        return super().encode(texts)


def trained(kind, table, encoder=None, **settings):
    return build(kind, encoder or CountingEncoder(), SETTINGS[kind] | settings).fit(table)


def assert_same(router, other):
    assert router.experts == other.experts
    ours, theirs = router.state(), other.state()
    assert json.dumps(ours.settings) == json.dumps(theirs.settings)
    assert ours.arrays.keys() == theirs.arrays.keys()
    for name, array in ours.arrays.items():
        np.testing.assert_array_equal(array, theirs.arrays[name], err_msg=name)
    np.testing.assert_array_equal(router.estimate(QUERIES).quality, other.estimate(QUERIES).quality)


@pytest.mark.parametrize("kind", KINDS)
def test_only_new_prompts_are_encoded(kind):
    encoder = CountingEncoder()
    router = trained(kind, OLD, encoder)
    encoder.asked.clear()
    extended = add_rows(router, NEW)
    assert encoder.asked == list(NEW.prompts)
    encoder.asked.clear()
    add_expert(remove_expert(extended, "generalist"), WHOLE.with_experts(["generalist"]))
    assert encoder.asked == []


@pytest.mark.parametrize("kind", ["knn", "category", "pilot"])
def test_added_rows_give_the_router_of_all_rows(kind):
    assert_same(add_rows(trained(kind, OLD), NEW), trained(kind, WHOLE))


def test_a_category_router_of_clusters_or_of_another_column_finds_the_same_again():
    plain = replace(WHOLE, domains=None)
    clustered = trained("category", plain.select(np.arange(120)), n_clusters=4)
    assert_same(add_rows(clustered, plain.select(np.arange(120, 160))), trained("category", plain, n_clusters=4))
    topics = WHOLE.to_frame().rename(columns={"domain": "topic"})
    labelled = OutcomeTable.from_frame(topics)
    router = trained("category", labelled.select(np.arange(120)), label_column="topic")
    more = labelled.select(np.arange(120, 160))
    assert_same(add_rows(router, more), trained("category", labelled, label_column="topic"))
    with pytest.raises(InvalidOutcomes, match="no column 'topic' in the table"):
        add_rows(router, replace(more, frame=None))


def test_a_category_router_keeps_the_vectors_of_the_ood_prompts_it_was_tuned_on(tmp_path):
    router = trained("category", OLD, ood_prompts=OOD)
    save(router, tmp_path / "r", table=router.rows.reference(), encoder=router.encoder)
    loaded = load(tmp_path / "r").router
    expected = trained("category", WHOLE, ood_prompts=OOD)
    assert add_rows(loaded, NEW).model.thresholds == expected.model.thresholds


def test_a_cluster_router_keeps_its_clusters_and_counts_the_new_rows_in_them():
    router = trained("cluster", OLD, shrinkage=0, nearest=1)
    extended = add_rows(router, NEW)
    np.testing.assert_array_equal(extended.state().arrays["centres"], router.state().arrays["centres"])
    x, centres = HashingEncoder(128).encode(WHOLE.prompts), extended.state().arrays["centres"]
    of = (x @ centres.T).argmax(axis=1)
    query = Query.of(NEW.prompts[0])
    expected = WHOLE.scores[of == of[120]].mean(axis=0)
    np.testing.assert_allclose(extended.estimate([query]).quality[0], expected)
    np.testing.assert_allclose(router.estimate([query]).quality[0], OLD.scores[of[:120] == of[120]].mean(axis=0))


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_removed_and_added_again_leaves_the_router_as_if_trained_so(kind):
    router = trained(kind, WHOLE)
    fewer = remove_expert(router, "law-expert")
    names = [name for name in WHOLE.experts if name != "law-expert"]
    assert_same(fewer, trained(kind, WHOLE.with_experts(names)))
    measured = WHOLE.with_experts(["law-expert"]).select(np.random.default_rng(0).permutation(len(WHOLE)))
    assert_same(add_expert(fewer, measured), trained(kind, WHOLE.with_experts([*names, "law-expert"])))
    assert router.experts == WHOLE.experts  # the old one stays as it is


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_router_can_be_updated_and_its_artifact_tells_of_all_rows(kind, tmp_path):
    router = trained(kind, OLD)
    save(router, tmp_path / "r", table=router.rows.reference(), encoder=router.encoder)
    loaded = load(tmp_path / "r").router
    updated, expected = remove_expert(add_rows(loaded, NEW), "law-expert"), add_rows(router, NEW)
    assert_same(updated, remove_expert(expected, "law-expert"))
    save(updated, tmp_path / "u", table=updated.rows.reference(), encoder=updated.encoder)
    meta = load(tmp_path / "u").meta
    whole = Reference.of(WHOLE.with_experts(updated.experts))
    assert (meta.n_queries, tuple(meta.experts)) == (160, updated.experts)
    assert meta.training_ids_digest == whole.ids_digest()
    assert meta.reference.seen(WHOLE.query_ids).all()
    np.testing.assert_array_equal(meta.reference.mean_scores, whole.mean_scores)
    assert {d: m.tolist() for d, m in meta.reference.by_domain.items()} == {
        d: m.tolist() for d, m in whole.by_domain.items()
    }


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (WHOLE.select([3, 119, 130]), "2 of 3 rows were trained on before: leave out the query ids 'q0-3', 'q0-119'"),
        (replace(NEW, costs_usd=None), "the router has costs, but the table has none"),
        (replace(NEW, domains=None), "the router has the domains .* add a column `domain`"),
        (NEW.with_experts(NEW.experts[1:]), "no scores of 'cooking-expert'"),
        (replace(NEW, experts=("a", *NEW.experts[1:])), "'a': not among the experts of the router"),
    ],
)
def test_rows_that_cannot_be_added(table, problem):
    with pytest.raises(InvalidOutcomes, match=problem):
        add_rows(trained("knn", OLD), table)


def test_rows_in_another_order_of_the_experts_are_put_in_order():
    assert_same(add_rows(trained("knn", OLD), NEW.with_experts(NEW.experts[::-1])), trained("knn", WHOLE))


def test_costs_and_domains_that_a_router_does_not_know_are_left_out():
    old, new = replace(OLD, costs_usd=None, domains=None), NEW
    assert_same(add_rows(trained("knn", old), new), trained("knn", replace(WHOLE, costs_usd=None, domains=None)))


def test_experts_that_cannot_be_added_or_removed():
    router = trained("knn", OLD)
    with pytest.raises(InvalidOutcomes, match="already experts of the router: 'law-expert'"):
        add_expert(router, WHOLE.with_experts(["law-expert"]))
    fewer = remove_expert(router, "law-expert")
    with pytest.raises(InvalidOutcomes, match="no scores of 'law-expert' on 20 of the 120 training queries"):
        add_expert(fewer, WHOLE.with_experts(["law-expert"]).select(np.arange(20, 160)))
    with pytest.raises(InvalidOutcomes, match="the router has costs, but the table has none"):
        add_expert(fewer, replace(WHOLE, costs_usd=None).with_experts(["law-expert"]))
    with pytest.raises(InvalidSettings, match="does not know 'poet'; its experts are cooking-expert"):
        remove_expert(router, "poet")
    with pytest.raises(InvalidSettings, match="'law-expert' is the only expert of the router"):
        remove_expert(trained("knn", OLD.with_experts(["law-expert"])), "law-expert")
    with pytest.raises(InvalidSettings, match="'generalist' is the router's generalist"):
        remove_expert(trained("category", OLD, general="generalist"), "generalist")
    assert "law-expert" not in remove_expert(trained("category", OLD, general="generalist"), "law-expert").experts


def test_kinds_that_keep_nothing_of_their_table_say_so():
    with pytest.raises(RouterError, match="a best-single router keeps no training rows"):
        updatable(build("best-single").fit(OLD))
    assert updatable(router := trained("knn", OLD)) is router
