"""Settings of router kinds: one frozen dataclass each, from keyword arguments to the artifact and back."""

from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest
from planted_outcomes import planted_table
from router_settings import REQUIRED

from routers.base import RouterState
from routers.encoders.build import HashingEncoder
from routers.errors import InvalidArtifact
from routers.factory import KINDS, build, router_class, settings_of
from routers.fitted import saved
from routers.kinds.category.router import CategoryRouter
from routers.kinds.knn import KNNRouter

ENCODER = HashingEncoder(64)
TABLE = planted_table(40)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_states_its_settings_in_one_frozen_dataclass(kind):
    router = build(kind, ENCODER, REQUIRED.get(kind))
    stated = {field.name for field in fields(router.settings)}
    assert is_dataclass(router_class(kind).Settings)
    assert stated == set(settings_of(kind))
    for name in stated:
        with pytest.raises(FrozenInstanceError):
            setattr(router.settings, name, None)


def test_a_router_with_another_model_leaves_the_first_as_it_is():
    router = KNNRouter(ENCODER, k=3).fit(TABLE)
    more = router.extended(planted_table(20, seed=1))
    assert (len(router.rows), len(more.rows)) == (40, 60)
    assert more.settings is router.settings


def test_saved_settings_leave_out_what_an_artifact_does_not_hold():
    router = CategoryRouter(ENCODER, ood_prompts=["le chat dort"], budget=float("inf"))
    assert "ood_prompts" not in saved(router.settings)
    assert saved(router.settings)["budget"] is None  # JSON has no infinity


def test_a_state_with_settings_of_another_version_is_refused():
    state = KNNRouter(ENCODER, k=3).fit(TABLE).state()
    other = {**state.settings, "settings": {"k": 3, "metric": "l2"}}
    with pytest.raises(InvalidArtifact, match=r"the saved knn router cannot be read \(.*'metric'\): train it again"):
        KNNRouter.from_state(RouterState(state.arrays, other), ENCODER)
    with pytest.raises(InvalidArtifact, match="a knn router reads text: load it with the encoder"):
        KNNRouter.from_state(state)
