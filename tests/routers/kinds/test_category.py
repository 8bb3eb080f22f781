"""CategoryRouter on planted topics: the map, the budget, abstention out of distribution, and saving."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from planted_outcomes import OOD, WORDS, planted_table

from routers.base import GENERAL, Query, RouterState
from routers.decision import Utility, decide
from routers.encoders.build import HashingEncoder
from routers.errors import InvalidArtifact, InvalidOutcomes, InvalidSettings, RouterError
from routers.kinds.category.model import choose
from routers.kinds.category.router import CategoryRouter
from routers.numeric.classifiers import probabilities

ENCODER = HashingEncoder(256)
TRAIN, TEST = planted_table(240), planted_table(120, seed=1)
TEST_QUERIES = [Query.of(prompt) for prompt in TEST.prompts]
CLASSIFIERS = ("logistic", "linear-svm", "knn")


def category_map(router):
    model = router.model
    return {name: model.experts[k] for name, k in zip(model.categories, model.expert_of, strict=True)}


@pytest.fixture(scope="module", params=CLASSIFIERS)
def trained(request):
    return CategoryRouter(ENCODER, classifier=request.param).fit(TRAIN)


def test_queries_go_to_the_expert_of_their_topic(trained):
    estimate = trained.estimate(TEST_QUERIES)
    decisions = decide(estimate)
    sure = [i for i, d in enumerate(decisions) if not d.abstained]
    assert len(sure) >= 0.9 * len(decisions)
    right = [decisions[i].experts == (f"{TEST.domains[i]}-expert",) for i in sure]
    assert np.mean(right) >= 0.95
    assert [decisions[i].label for i in sure[:4]] == [TEST.domains[i] for i in sure[:4]]
    assert category_map(trained) == {topic: f"{topic}-expert" for topic in WORDS}


def test_ood_prompts_go_to_the_generalist_with_the_numbers(trained):
    decisions = decide(trained.estimate([Query.of(text) for text in OOD]))
    assert all(d.abstained and d.label == GENERAL and d.experts == ("generalist",) for d in decisions)
    assert all("unsure, so the generalist generalist:" in d.reason and ">" in d.reason for d in decisions)


def test_out_of_distribution_prompts_score_high(trained):
    familiar = trained.estimate(TEST_QUERIES).ood
    outside = trained.estimate([Query.of(text) for text in OOD]).ood
    assert outside.min() >= 0.99
    assert familiar.min() >= 0 and familiar.max() <= 1
    assert 0.3 < familiar.mean() < 0.7  # a share of held-out queries, so about uniform on similar ones


def test_quality_confidence_and_cost_are_expectations(trained):
    estimate = trained.estimate(TEST_QUERIES)
    sure = ~estimate.abstained
    of_topic = np.array([TRAIN.experts.index(f"{topic}-expert") for topic in TEST.domains])
    rows = np.arange(len(TEST))
    assert estimate.quality[rows, of_topic][sure].mean() == pytest.approx(0.9, abs=0.1)
    assert estimate.quality[sure, -1].mean() == pytest.approx(0.6, abs=0.1)
    assert estimate.cost_usd == pytest.approx(TEST.costs_usd)
    assert ((estimate.confidence >= 0) & (estimate.confidence <= 1)).all()
    assert estimate.confidence[sure].mean() > 0.8
    assert estimate.eligible.sum(axis=1).tolist() == [1] * len(TEST)


def test_a_saved_router_answers_identically_to_the_bit(trained):
    state = trained.state()
    settings = json.loads(json.dumps(state.settings, allow_nan=False))
    restored = CategoryRouter.from_state(RouterState(dict(state.arrays), settings), HashingEncoder(256))
    queries = [*TEST_QUERIES, *(Query.of(text) for text in OOD)]
    before, after = trained.estimate(queries), restored.estimate(queries)
    for name in ("quality", "cost_usd", "ood", "eligible", "abstained", "confidence"):
        assert np.array_equal(getattr(before, name), getattr(after, name))
    assert (before.labels, before.reasons, before.experts) == (after.labels, after.reasons, after.experts)
    assert restored.state().settings == state.settings


def test_training_twice_gives_the_same_router():
    first, second = (CategoryRouter(ENCODER, seed=3).fit(TRAIN).state() for _ in range(2))
    assert first.settings == second.settings
    assert all(np.array_equal(first.arrays[name], second.arrays[name]) for name in first.arrays)


def test_probabilities_are_calibrated_on_held_out_queries():
    """Topics overlap here, so that the classifier is often wrong and must be unsure."""
    rng = np.random.default_rng(0)
    words = [*WORDS["law"], *WORDS["music"]]

    def blurred(n, seed):
        table = planted_table(n, topics=("law", "music"), seed=seed)
        prompts = [f"{p} {' '.join(rng.choice(words, 8))} {i}" for i, p in enumerate(table.prompts)]
        return table.__class__(**{**table.__dict__, "prompts": tuple(prompts)})

    train, test = blurred(400, 0), blurred(400, 1)
    for classifier in CLASSIFIERS:
        router = CategoryRouter(ENCODER, classifier=classifier).fit(train)
        confidence, correct = [], []
        for decision, domain in zip(
            decide(router.estimate([Query.of(p) for p in test.prompts])), test.domains, strict=True
        ):
            if not decision.abstained:
                confidence.append(decision.confidence)
                correct.append(decision.label == domain)
        order = np.argsort(confidence)
        bins = [abs(np.mean(np.array(confidence)[b]) - np.mean(np.array(correct)[b])) for b in np.array_split(order, 8)]
        assert 0.6 < np.mean(correct) < 0.98
        assert np.mean(bins) < 0.08, classifier


def test_doubt_can_be_tuned_on_given_ood_prompts_which_are_not_kept():
    router = CategoryRouter(ENCODER, ood_prompts=OOD[:3]).fit(TRAIN)
    assert all(d.abstained for d in decide(router.estimate([Query.of(text) for text in OOD[3:]])))
    state = router.state()
    assert "zxqv" not in json.dumps(state.settings)
    assert CategoryRouter.from_state(state, ENCODER).settings.ood_prompts == ()


def test_familiar_queries_hardly_abstain():
    for share in (0.0, 0.02, 0.1):
        router = CategoryRouter(ENCODER, max_abstain=share).fit(TRAIN)
        assert router.estimate(TEST_QUERIES).abstained.mean() <= share + 0.06
    # With a bad generalist, only queries farther away than all training queries may abstain.
    router = CategoryRouter(ENCODER, general="law-expert", max_abstain=0.5).fit(TRAIN)
    assert router.estimate(TEST_QUERIES).abstained.mean() <= 0.1


@pytest.mark.parametrize("budget_kind", ["cumulative", "average-active"])
def test_a_budget_of_parameters_changes_the_map(budget_kind):
    footprints = {
        "cooking-expert": 8e9,
        "geometry-expert": 8e9,
        "law-expert": 1e9,
        "music-expert": 1e9,
        "generalist": 2e9,
    }
    settings = {"budget_kind": budget_kind, "footprints": footprints}
    free = CategoryRouter(ENCODER, **settings, budget=1e12).fit(TRAIN)
    assert set(category_map(free).values()) == {f"{topic}-expert" for topic in WORDS}
    tight = CategoryRouter(ENCODER, **settings, budget=4e9 if budget_kind == "cumulative" else 1.5e9).fit(TRAIN)
    assert category_map(tight) == {
        "cooking": "generalist",
        "geometry": "generalist",
        "law": "law-expert",
        "music": "music-expert",
    }
    assert tight.model.experts[tight.model.general] == (
        "generalist" if budget_kind == "cumulative" else "law-expert"
    ) or (footprints[tight.model.experts[tight.model.general]] <= 2e9)
    restored = CategoryRouter.from_state(tight.state(), ENCODER)
    assert restored.state().settings == tight.state().settings
    with pytest.raises(RouterError, match=r"smallest that can be met is 1e\+09"):
        CategoryRouter(ENCODER, **settings, budget=5e8).fit(TRAIN)


def test_a_budget_without_footprints_is_one_of_cost():
    router = CategoryRouter(ENCODER, budget=1e-3).fit(TRAIN)  # only the cheapest expert fits
    assert set(category_map(router).values()) == {"cooking-expert"}
    assert router.model.experts[router.model.general] == "cooking-expert"
    with pytest.raises(InvalidSettings, match="a budget needs the footprint of every expert"):
        CategoryRouter(ENCODER, budget=1e-3).fit(planted_table(80, costs=False))
    with pytest.raises(InvalidSettings, match="no footprint of geometry-expert, law-expert"):
        CategoryRouter(ENCODER, footprints={"cooking-expert": 1, "music-expert": 1, "generalist": 1}).fit(TRAIN)


def test_without_labels_it_finds_clusters():
    router = CategoryRouter(ENCODER, n_clusters=4).fit(planted_table(240, domains=False, costs=False))
    decisions = decide(router.estimate(TEST_QUERIES))
    right = np.mean([d.experts[0] == f"{topic}-expert" for d, topic in zip(decisions, TEST.domains, strict=True)])
    assert right >= 0.8
    assert {d.label for d in decisions} <= {f"cluster-{i:03d}" for i in range(4)} | {GENERAL}
    assert router.estimate(TEST_QUERIES[:1]).cost_usd is None
    with pytest.raises(RouterError, match="4 clusters asked of 3 training queries"):
        CategoryRouter(ENCODER, n_clusters=4).fit(planted_table(3, domains=False))


def test_a_label_column_takes_the_place_of_the_domains():
    frame = TRAIN.to_frame()
    frame["skill"] = ["numbers" if domain == "geometry" else "words" for domain in TRAIN.domains]
    table = TRAIN.from_frame(frame)
    router = CategoryRouter(ENCODER, label_column="skill").fit(table)
    assert router.model.categories == ("numbers", "words")
    with pytest.raises(InvalidOutcomes, match="did you mean 'skill'"):
        CategoryRouter(ENCODER, label_column="skil").fit(table)


def test_a_query_never_brings_its_own_label():
    plain = Query.of(TEST.prompts[0])
    features = Query.of(TEST.prompts[0], features={"domain": np.array([1.0])}, id="law")
    router = CategoryRouter(ENCODER).fit(TRAIN)
    assert decide(router.estimate([plain])) == decide(router.estimate([features]))
    assert router.requires == frozenset()


def test_rare_categories_lean_on_the_whole_table():
    rows = [0, *(i for i in range(len(TRAIN)) if TRAIN.domains[i] != "cooking")]  # a single cooking query
    table = TRAIN.select(rows)
    means = table.scores.mean(axis=0)
    raw, leaning = (CategoryRouter(ENCODER, shrinkage=s).fit(table).model for s in (0.0, 1000.0))
    cooking = raw.categories.index("cooking")
    assert np.abs(raw.scores[cooking] - table.scores[0]).max() < 0.2  # little more than that one query
    assert leaning.scores[cooking] == pytest.approx(means, abs=0.01)


def test_an_unclear_category_is_answered_by_the_expert_of_its_likely_categories():
    """Three categories at 0.4, 0.3 and 0.3: the map's expert of the first is bad at the other two."""
    p, expert_of, kept = np.array([[0.4, 0.3, 0.3]]), np.array([0, 1, 1]), np.ones(3, dtype=bool)
    scores = np.array([[0.9, 0.8, 0.95], [0.1, 0.7, 0.95], [0.1, 0.7, 0.95]])  # expert 2 is not in the map
    assert choose(p, expert_of, scores, "category", kept).tolist() == [0]
    assert choose(p, expert_of, scores, "expected", kept).tolist() == [1]
    assert choose(p, expert_of, scores, "soft", kept).tolist() == [2]
    assert choose(p, expert_of, scores, "soft", np.array([True, True, False])).tolist() == [1]
    sure = np.array([[0.98, 0.01, 0.01]])
    assert choose(sure, expert_of, scores, "expected", kept).tolist() == [0]


def test_the_soft_choice_lets_every_expert_answer_by_its_expected_score():
    router = CategoryRouter(ENCODER, choice="soft").fit(TRAIN)
    estimate, model = router.estimate(TEST_QUERIES), router.model
    sure = ~estimate.abstained
    p = probabilities(model.classifier.logits(ENCODER.encode(TEST.prompts)), model.temperature)
    assert estimate.quality[sure] == pytest.approx((p @ model.scores)[sure])
    assert estimate.eligible[sure].all()
    assert estimate.confidence is None
    decisions = decide(estimate, k=3)
    assert [len(decision.experts) for decision in decisions] == [3 if s else 1 for s in sure]
    first = next(decision for decision, s in zip(decisions, sure, strict=True) if s)
    assert first.experts[0] == "cooking-expert"
    assert first.confidence == first.scores[0]
    assert "over all categories cooking-expert is expected to do best" in first.reason
    thrifty = decide(estimate, utility=Utility(cost_weight=1e4))
    assert {d.experts[0] for d, s in zip(thrifty, sure, strict=True) if s} == {"cooking-expert"}  # the cheapest
    doubtful = decide(router.estimate([Query.of(text) for text in OOD]), k=3)
    assert all(decision.experts == ("generalist",) for decision in doubtful)


def test_the_soft_choice_keeps_to_what_a_cumulative_budget_keeps():
    footprints = dict.fromkeys(TRAIN.experts, 1.0)
    router = CategoryRouter(ENCODER, choice="soft", budget=2.0, budget_kind="cumulative", footprints=footprints)
    estimate = router.fit(TRAIN).estimate(TEST_QUERIES)
    kept = {router.model.experts[k] for k in router.model.expert_of}
    assert len(kept) == 2
    assert {name for decision in decide(estimate, k=3) for name in decision.experts} == kept
    restored = CategoryRouter.from_state(router.state(), ENCODER)
    assert np.array_equal(restored.estimate(TEST_QUERIES).eligible, estimate.eligible)
    with pytest.raises(InvalidSettings, match="an average-active budget is met by the map alone"):
        CategoryRouter(ENCODER, choice="soft", budget=1.0)


def test_an_unclear_choice_is_explained():
    router = CategoryRouter(ENCODER).fit(TRAIN)
    model = router.model
    scores = np.full_like(model.scores, 0.1)
    scores[:, model.expert_of[0]] = 0.5  # for every category, the expert of the first is expected to do better
    queries = [q for q, topic in zip(TEST_QUERIES, TEST.domains, strict=True) if topic == model.categories[1]]
    decisions = decide(replace(model, scores=scores).estimate(ENCODER.encode([q.text for q in queries])))
    told = next(d for d in decisions if not d.abstained)
    assert told.experts == (model.experts[model.expert_of[0]],)
    assert "but over all categories cooking-expert is expected to do better: 0.500 > 0.100" in told.reason
    assert told.confidence < 0.5


def test_an_average_active_budget_keeps_to_the_map():
    def chosen(**settings):
        return CategoryRouter(ENCODER, **settings).settings.choice

    assert chosen() == chosen(budget=1.0, budget_kind="cumulative")
    assert chosen(budget=1.0) == "category"
    assert chosen(budget=np.inf) == "expected"  # no budget at all
    with pytest.raises(InvalidSettings, match="needs choice 'category'"):
        CategoryRouter(ENCODER, budget=1.0, choice="expected")


def test_a_single_category_works_as_best_single_and_warns():
    table = planted_table(60, topics=("law",))
    with pytest.warns(UserWarning, match="always chooses its best single expert"):
        router = CategoryRouter(ENCODER).fit(table)
    decisions = decide(router.estimate([Query.of(p) for p in table.prompts[:5]]))
    assert {d.experts[0] for d in decisions} == {table.experts[table.scores.mean(axis=0).argmax()]}


def test_the_smallest_tables_do_not_break_it():
    pair = planted_table(2, topics=("law", "music"))
    router = CategoryRouter(ENCODER).fit(pair)
    assert decide(router.estimate([Query.of(pair.prompts[0])]))[0].label in {"law", GENERAL}
    with pytest.warns(UserWarning, match="best single"):
        CategoryRouter(ENCODER).fit(pair.select([0]))
    assert len(router.estimate([])) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classifier": "forest"}, "no classifier 'forest'; there are: logistic, linear-svm, knn"),
        ({"c": 0.0}, "c must be positive"),
        ({"k": 0}, "k must be at least 1"),
        ({"n_clusters": 0}, r"n_clusters must be at least 1"),
        ({"shrinkage": -1.0}, "shrinkage must be at least 0, got -1.0"),
        ({"max_abstain": 1.5}, r"max_abstain must lie in \[0, 1\], got 1.5"),
        ({"budget": -1.0}, "a number >= 0"),
        ({"choice": "lottery"}, "choice must be one of expected, category, soft, got 'lottery'"),
        ({"budget": 1.0, "budget_kind": "weekly"}, "budget kind 'weekly' does not exist"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(InvalidSettings, match=message):
        CategoryRouter(ENCODER, **settings)


def test_what_cannot_be_trained_or_asked_is_said():
    with pytest.raises(RouterError, match="not trained"):
        CategoryRouter(ENCODER).estimate(TEST_QUERIES)
    with pytest.raises(RouterError, match="k=15 neighbours asked of 8 training queries"):
        CategoryRouter(ENCODER, classifier="knn", k=15).fit(planted_table(8))
    with pytest.raises(InvalidSettings, match="the generalist 'nobody' is not in the table"):
        CategoryRouter(ENCODER, general="nobody").fit(TRAIN)
    assert CategoryRouter(ENCODER).experts == ()


def test_a_state_that_does_not_fit_is_refused(trained):
    state = trained.state()
    with pytest.raises(InvalidArtifact, match="trained on embeddings of 256 dimensions"):
        CategoryRouter.from_state(state, HashingEncoder(128))
    arrays = {name: array for name, array in state.arrays.items() if name != "scores"}
    with pytest.raises(InvalidArtifact, match="lacks 'scores'"):
        CategoryRouter.from_state(RouterState(arrays, state.settings), ENCODER)
