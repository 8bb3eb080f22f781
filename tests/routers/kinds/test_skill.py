"""Recruiting by planted skills: the recruits, the explanation, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from planted_outcomes import FILLER, OOD, WORDS, planted_table

from routers.artifacts import load, save
from routers.base import GENERAL, Query, RouterState
from routers.decision import Utility, decide
from routers.encoders.build import HashingEncoder, build_encoder
from routers.errors import InvalidArtifact, InvalidOutcomes, InvalidSettings, RouterError
from routers.kinds.skill.router import SkillRouter
from routers.outcomes.table import OutcomeTable
from routers.selectors import Recruit, TopK

ENCODER = HashingEncoder(256)
TOPICS = ("cooking", "geometry", "law", "music")
EXPERTS = tuple(f"{topic}-expert" for topic in TOPICS)
FEATURE = "keywords/teacher"
TWO = {"cooking": "knives", "geometry": "shapes", "law": "courts", "music": "sounds"}


def needing(n: int, *, seed: int = 0, topics: tuple[str, ...] = TOPICS, per_query: int = 2) -> OutcomeTable:
    """n queries of two topics each; the expert of a topic is correct exactly on queries that need it."""
    rng = np.random.default_rng(seed)
    needed = [tuple(rng.permutation(topics)[:per_query].tolist()) for _ in range(n)]
    prompts = [
        " ".join(rng.permutation([*(word for topic in of for word in rng.choice(WORDS[topic], 4)), *FILLER[:3]]))
        for of in needed
    ]
    scores = np.array([[float(topic in of) for topic in TOPICS] for of in needed])
    columns = {f"score::{name}": scores[:, i] for i, name in enumerate(EXPERTS)}
    costs = {f"cost::{name}": np.full(n, (i + 1) * 1e-3) for i, name in enumerate(EXPERTS)}
    ids = [f"q{seed}-{i}" for i in range(n)]
    frame = {"query_id": ids, "prompt": prompts, "skills": [", ".join(of) for of in needed]}
    return OutcomeTable.from_frame(pd.DataFrame({**frame, **columns, **costs}))


def with_words(table: OutcomeTable) -> OutcomeTable:
    """The keywords of each query from a keyword expert: its skills in other words."""
    assert table.frame is not None
    named = [tuple(TWO[topic] for topic in row.split(", ")) for row in table.frame["skills"]]
    return replace(table, features={FEATURE: named})


TRAIN, TEST = needing(200), needing(60, seed=1)
BY_TEXT = SkillRouter(ENCODER, skill_column="skills").fit(TRAIN)
BY_WORDS = SkillRouter(ENCODER, skills=FEATURE).fit(with_words(TRAIN))


def words(*given: str) -> Query:
    return Query.of("whatever", features={FEATURE: given})


def test_the_experts_of_the_skills_that_a_text_needs_are_recruited():
    assert TEST.frame is not None
    right = 0
    for decision, needed in zip(
        decide(BY_TEXT.estimate(TEST.queries()), select=Recruit(2)), TEST.frame["skills"], strict=True
    ):
        right += set(decision.experts) == {f"{topic}-expert" for topic in needed.split(", ")}
    assert right >= 0.9 * len(TEST)


def test_the_experts_of_the_words_that_a_query_brings_are_recruited():
    table = with_words(TEST)
    assert table.frame is not None
    made = decide(BY_WORDS.estimate(table.queries()), select=Recruit(2))
    assert [set(decision.experts) for decision in made] == [
        {f"{topic}-expert" for topic in needed.split(", ")} for needed in table.frame["skills"]
    ]


def test_domains_are_skills_where_no_column_is_named():
    train, test = planted_table(240), planted_table(120, seed=1)
    estimate = SkillRouter(ENCODER).fit(train).estimate(test.queries())
    assert np.mean([label == topic for label, topic in zip(estimate.labels, test.domains, strict=True)]) > 0.9
    best = [decision.experts[0] for decision in decide(estimate)]
    assert np.mean([name == f"{topic}-expert" for name, topic in zip(best, test.domains, strict=True)]) > 0.9
    # only these two experts are more often right than wrong there
    recruits = [set(decision.experts) for decision in decide(estimate, select=Recruit(2))]
    expected = [{f"{topic}-expert", "generalist"} for topic in test.domains]
    assert np.mean([ours == theirs for ours, theirs in zip(recruits, expected, strict=True)]) > 0.9


@pytest.mark.parametrize(("reserve", "calls"), [(True, 3), (False, 2)])
def test_a_reserve_is_recruited_where_too_few_are_suitable(reserve, calls):
    train, test = planted_table(240, bad=0.1), planted_table(120, seed=1)
    estimate = SkillRouter(ENCODER, reserve=reserve, trim=0.0).fit(train).estimate(test.queries())
    assert np.mean([len(decision.experts) == calls for decision in decide(estimate, select=Recruit(3))]) > 0.9


def test_a_high_temperature_leaves_the_choice_to_the_skills():
    train, test = planted_table(240), planted_table(120, seed=1)

    def first(temperature: float) -> list[str]:
        estimate = SkillRouter(ENCODER, temperature=temperature).fit(train).estimate(test.queries())
        return [decision.experts[0] for decision in decide(estimate, select=Recruit(3))]

    assert np.mean([name == "generalist" for name in first(0.5)]) > 0.9  # the only one with more right than wrong
    assert np.mean([name == f"{topic}-expert" for name, topic in zip(first(100.0), test.domains, strict=True)]) > 0.9


def test_profile_and_quality_by_hand():
    # right, right and wrong where knives are needed; wrong where sounds are
    prompts = ["a", "b", "c", "d"]
    scores = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    named = [("knives",), ("knives", "sounds"), ("knives",), ("sounds",)]
    table = OutcomeTable(tuple(prompts), tuple(prompts), ("m", "o"), scores, features={FEATURE: named})
    router = SkillRouter(ENCODER, skills=FEATURE, shrinkage=1.0, trim=0.0).fit(table)
    told = router.explain(words("knives", "sounds"))
    m = next(standing for standing in told.experts if standing.expert == "m")
    o = next(standing for standing in told.experts if standing.expert == "o")
    assert [skill.name for skill in told.skills] == ["knives", "sounds"]
    assert (m.profile, o.profile) == ((1.0, 0.0), (-1.0, 0.0))
    assert (m.suitability, o.suitability) == (1.0, -1.0)
    assert (m.competency, o.competency) == pytest.approx((9 / 10, 1 / 10))  # sums 1 and -1, shifted to 3 and 1
    assert (m.weight, o.weight) == pytest.approx((1.0, 1e-6))
    # accuracy with shares: (1 + 0.5 + 0 + 1 * 0.5) / 3.5 in knives, (0.5 + 0 + 0.5) / 2.5 in sounds
    assert m.quality == pytest.approx((2.0 / 3.5 + 1.0 / 2.5) / 2)
    assert told.reason == "needs knives 50%, sounds 50%: m has the most weight, suitability 1.0 x competency 0.90"


def test_a_word_that_is_named_twice_has_twice_the_share():
    told = BY_WORDS.explain(words("sounds", "courts", "Sounds"))
    assert [(skill.name, skill.share) for skill in told.skills] == [
        ("sounds", pytest.approx(2 / 3)),
        ("courts", pytest.approx(1 / 3)),
    ]


def test_it_explains_how_each_skill_was_found():
    told = BY_WORDS.explain(words("Shapes", "good sounds", "zzzz"))
    shapes, sounds = told.skills
    assert (shapes.name, shapes.found, shapes.word, shapes.cosine) == ("shapes", "exact", "shapes", 1.0)
    assert (sounds.name, sounds.found, sounds.word) == ("sounds", "nearest", "good sounds") and 0.3 <= sounds.cosine < 1
    assert told.unknown == ("zzzz",)
    assert {told.experts[0].expert, told.experts[1].expert} == {"geometry-expert", "music-expert"}
    assert sum(standing.weight for standing in told.experts) == pytest.approx(1.0)
    assert [standing.weight for standing in told.experts] == sorted((s.weight for s in told.experts), reverse=True)


def test_it_explains_what_a_text_was_taken_for():
    query = Query.of("violin chord sonata court verdict clause")
    told, estimate = BY_TEXT.explain(query), BY_TEXT.estimate([query])
    assert {skill.name for skill in told.skills[:2]} == {"music", "law"}
    assert {skill.found for skill in told.skills} == {"read"} and told.skills[0].word is None
    assert sum(skill.share for skill in told.skills) == pytest.approx(1.0)
    assert told.reason == estimate.reasons[0] and told.skills[0].name == estimate.labels[0]
    by_name = {standing.expert: standing for standing in told.experts}
    assert [by_name[name].weight for name in EXPERTS] == estimate.weights[0].tolist()
    assert [by_name[name].quality for name in EXPERTS] == estimate.quality[0].tolist()
    assert by_name["law-expert"].suitability == pytest.approx(
        sum(s.share * p for s, p in zip(told.skills, by_name["law-expert"].profile, strict=True))
    )


@pytest.mark.parametrize("router", [BY_TEXT, BY_WORDS], ids=["text", "words"])
def test_a_batch_equals_single_queries(router):
    queries = [*with_words(TEST).queries(), words(), words("zzzz", "opticks")]
    batch = router.estimate(queries)
    for i, query in enumerate(queries):
        alone = router.estimate([query])
        for name in ("quality", "cost_usd", "weights", "ood"):
            assert getattr(alone, name)[0] == pytest.approx(getattr(batch, name)[i], abs=1e-5), name
        assert (alone.labels[0], alone.reasons[0]) == (batch.labels[i], batch.reasons[i])


@pytest.mark.parametrize("router", [BY_TEXT, BY_WORDS], ids=["text", "words"])
def test_a_saved_router_estimates_and_explains_the_same(router, tmp_path):
    table = with_words(TRAIN)
    save(router, tmp_path / "router", table=table, encoder=ENCODER)
    again = load(tmp_path / "router").router
    queries = [*with_words(TEST).queries(), words("good sounds", "zzzz")]
    ours, theirs = router.estimate(queries), again.estimate(queries)
    for name in ("quality", "cost_usd", "weights", "ood"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    assert (ours.labels, ours.reasons) == (theirs.labels, theirs.reasons)
    assert again.explain(queries[-1]) == router.explain(queries[-1])
    assert again.requires == router.requires
    text = (tmp_path / "router" / "router.json").read_text()
    assert not any(prompt in text for prompt in TRAIN.prompts)


@pytest.mark.parametrize("skills", [None, FEATURE])
def test_the_order_of_the_experts_has_no_influence(skills):
    column = "skills" if skills is None else None
    order = [2, 0, 3, 1]
    names = [EXPERTS[i] for i in order]
    train, queries = with_words(TRAIN), with_words(TEST).queries()
    ours = SkillRouter(ENCODER, skills=skills, skill_column=column).fit(train).estimate(queries)
    theirs = SkillRouter(ENCODER, skills=skills, skill_column=column).fit(train.with_experts(names)).estimate(queries)
    assert theirs.weights == pytest.approx(ours.weights[:, order])
    assert theirs.quality == pytest.approx(ours.quality[:, order])


def test_weights_sum_to_one_and_costs_are_those_of_the_skills():
    estimate = BY_TEXT.estimate(TEST.queries())
    assert estimate.weights.sum(axis=1) == pytest.approx(np.ones(len(TEST)))
    assert estimate.cost_usd == pytest.approx(np.tile([1e-3, 2e-3, 3e-3, 4e-3], (len(TEST), 1)))
    cheap = decide(estimate, utility=Utility(cost_weight=1e3))[0]
    assert cheap.experts == ("cooking-expert",)


def test_quality_is_calibrated_on_new_queries():
    train, test = planted_table(1200), planted_table(400, seed=1)
    quality = SkillRouter(ENCODER).fit(train).estimate(test.queries()).quality
    high = quality > 0.7
    assert high.any() and abs(test.scores[high].mean() - quality[high].mean()) < 0.05


def test_out_of_distribution_queries_score_high():
    estimate = BY_TEXT.estimate([*TEST.queries()[:5], *map(Query.of, OOD)])
    assert estimate.ood[:5].max() < estimate.ood[5:].min() == pytest.approx(1.0, abs=0.02)
    assert BY_WORDS.estimate([words("sounds", "zzzz")]).ood[0] == 0.5


def test_who_is_seldom_recruited_never_is():
    table = planted_table(240, bad=0.1)
    scores = table.scores.copy()
    scores[:, -1] = (np.arange(240) % 10 == 0).astype(float)  # the generalist is bad at everything
    table = replace(table, scores=scores)
    query = Query.of("zxqv")
    kept = SkillRouter(ENCODER, trim=0.1, trim_k=1).fit(table).explain(query)
    assert [s.expert for s in kept.experts if s.trimmed] == ["generalist"]
    assert next(s for s in kept.experts if s.trimmed).weight == 0.0
    untrimmed = SkillRouter(ENCODER, trim=0.0, trim_k=1).fit(table)
    assert not any(s.trimmed for s in untrimmed.explain(query).experts)


def test_the_decision_does_not_depend_on_which_queries_stand_beside_it():
    queries = TEST.queries()
    alone = [decide(BY_TEXT.estimate([query]), select=Recruit(3))[0].experts for query in queries]
    assert [decision.experts for decision in decide(BY_TEXT.estimate(queries), select=Recruit(3))] == alone


# Errors


def test_a_query_without_words_is_answered_by_competency():
    [estimate] = [BY_WORDS.estimate([words()])]
    told = BY_WORDS.explain(words())
    assert estimate.labels == (GENERAL,) and estimate.ood[0] == 1.0
    assert estimate.quality[0] == pytest.approx(TRAIN.scores.mean(axis=0))
    assert told.skills == () and told.experts[0].expert == EXPERTS[int(estimate.weights[0].argmax())]
    assert [s.weight for s in told.experts] == pytest.approx([s.competency for s in told.experts])
    assert told.reason.startswith(f"no skill is known: {told.experts[0].expert} has the highest competency")


def test_a_query_without_words_may_be_answered_by_anybody():
    router = SkillRouter(ENCODER, skills=FEATURE, without_skills="uniform").fit(with_words(TRAIN))
    assert router.estimate([words()]).weights[0].tolist() == [0.25] * 4
    drawn = {
        decide(router.estimate([words()]), select=Recruit(1, "replacement", seed))[0].experts for seed in range(40)
    }
    assert len(drawn) == 4


def test_unknown_words_only_are_said():
    told = BY_WORDS.explain(words("zzzz", "qqqq", "zzzz"))
    assert told.unknown == ("zzzz", "qqqq") and told.skills == ()
    assert "none of 'zzzz', 'qqqq' is a known skill" in told.reason


def test_if_no_expert_is_right_more_often_than_wrong_the_least_bad_is_recruited():
    table = planted_table(400)
    table = replace(table, scores=(np.random.default_rng(0).random((400, 5)) < [0.3, 0.2, 0.1, 0.1, 0.2]).astype(float))
    router = SkillRouter(ENCODER, trim=0.0).fit(table)
    query = planted_table(4, seed=1).queries()[0]
    told = router.explain(query)
    assert all(standing.suitability < 0 for standing in told.experts)
    assert told.experts[0].expert == table.experts[0]
    assert "though it is not right more often than wrong" in told.reason
    assert len(decide(router.estimate([query]), select=Recruit(3))[0].experts) == 3


def test_empty_cells_teach_levels_but_no_skill():
    frame = TRAIN.to_frame()
    frame.loc[::2, "skills"] = ""
    frame.loc[1::4, "skills"] = None
    router = SkillRouter(ENCODER, skill_column="skills").fit(OutcomeTable.from_frame(frame))
    assert set(router.model.vocabulary.names) == set(TOPICS)
    told = router.explain(Query.of("violin chord sonata melody"))
    assert told.skills[0].name == "music"
    assert max(told.experts, key=lambda standing: standing.suitability).expert == "music-expert"
    frame["skills"] = ""
    with pytest.raises(InvalidOutcomes, match="no row names a skill"):
        SkillRouter(ENCODER, skill_column="skills").fit(OutcomeTable.from_frame(frame))


def test_a_table_without_labels_is_refused():
    with pytest.raises(InvalidOutcomes, match="which skills it needs"):
        SkillRouter(ENCODER).fit(planted_table(40, domains=False))


def test_one_skill_only_is_warned_of_and_works():
    table = planted_table(40, topics=("law",))
    with pytest.warns(UserWarning, match="needs 'law' and nothing else"):
        router = SkillRouter(ENCODER).fit(table)
    made = decide(router.estimate(table.queries()), select=Recruit(1))
    assert {decision.experts for decision in made} == {("law-expert",)}


def test_more_recruits_than_experts_are_all_of_some_weight():
    router = SkillRouter(ENCODER, skill_column="skills", trim_k=9).fit(TRAIN)
    made = decide(router.estimate([Query.of("violin chord court verdict")]), select=Recruit(9))[0]
    assert set(made.experts) >= {"music-expert", "law-expert"} and len(set(made.experts)) == len(made.experts) <= 4
    assert sum(made.weights) == pytest.approx(1.0)
    assert len(decide(router.estimate([Query.of("violin")]), select=TopK(9))[0].experts) == 4


def test_one_training_query_and_no_query_at_all():
    router = SkillRouter(ENCODER, skill_column="skills").fit(TRAIN.select([0]))
    assert router.estimate([Query.of("violin")]).weights.shape == (1, 4)
    assert len(router.estimate([])) == len(BY_WORDS.estimate([])) == 0


def test_a_query_that_lacks_the_feature_is_named():
    with pytest.raises(RouterError, match=f"query 2 of 2 lacks the feature '{FEATURE}'"):
        BY_WORDS.estimate([words("law"), Query.of("x")])
    with pytest.raises(RouterError, match="is not words but array"):
        BY_WORDS.estimate([Query.of("x", features={FEATURE: np.zeros(2)})])
    with pytest.raises(RouterError, match="is not words but 'law'"):
        BY_WORDS.estimate([Query.of("x", features={FEATURE: "law"})])
    with pytest.raises(RouterError, match=f"features that the table does not have: {FEATURE}"):
        SkillRouter(ENCODER, skills=FEATURE).fit(TRAIN)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skills": FEATURE, "skill_column": "skills"}, "not both"),
        ({"neighbours": 0}, r"neighbours must be at least 1, got 0"),
        ({"sharpness": -1.0}, "sharpness must be at least"),
        ({"shrinkage": np.inf}, "shrinkage must be finite"),
        ({"temperature": 0.0}, "temperature must be at least"),
        ({"merge": 1.5}, r"merge must lie in \[0, 1\], got 1.5"),
        ({"floor": np.nan}, r"floor must lie in \[-1, 1\], got nan"),
        ({"trim": 2.0}, r"trim must lie in \[0, 1\]"),
        ({"trim_k": 0}, r"trim_k must be at least 1"),
        ({"without_skills": "anybody"}, "without_skills must be one of competency, uniform, got 'anybody'"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(InvalidSettings, match=message):
        SkillRouter(ENCODER, **settings)


def test_a_text_that_is_longer_than_what_is_read_is_told():
    class ShortSighted(HashingEncoder):
        max_tokens = 8

        def truncated(self, texts):
            return np.array([len(text.split()) > 8 for text in texts], dtype=bool)

    short = "violin chord court"
    queries = [Query.of(short), Query.of(" ".join([short] * 3))]
    router = SkillRouter(ShortSighted(64), skill_column="skills").fit(TRAIN)
    assert router.estimate(queries).truncated.tolist() == [False, True]
    assert BY_WORDS.estimate([words("sounds")]).truncated is None


def test_it_must_be_trained_and_fit_its_encoder():
    with pytest.raises(RouterError, match="this skill router is not trained"):
        SkillRouter(ENCODER).estimate([])
    assert SkillRouter(ENCODER).experts == ()
    state = BY_TEXT.state()
    with pytest.raises(InvalidArtifact, match="trained on embeddings of 256 dimensions"):
        SkillRouter.from_state(state, HashingEncoder(128))
    for name in ("gamma", "texts.vectors", "skills.skill_of"):
        arrays = {key: array for key, array in state.arrays.items() if key != name}
        with pytest.raises(InvalidArtifact, match=f"the saved skill router lacks '{name}'"):
            SkillRouter.from_state(RouterState(arrays, state.settings), ENCODER)
    json.dumps(state.settings, allow_nan=False)
    assert build_encoder(ENCODER.name).digest == ENCODER.digest
