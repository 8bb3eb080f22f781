import sys
import types

import pytest
from router_settings import REQUIRED

from routers import factory
from routers.encoders.build import HashingEncoder
from routers.errors import InvalidSettings, RouterError, UnknownRouterKind
from routers.factory import KINDS, TrainableRouter, build, reads_text, router_class, settings_of


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_trainable_router_of_that_name(kind):
    router = build(kind, HashingEncoder(16), REQUIRED.get(kind))
    assert isinstance(router, TrainableRouter)
    assert router.kind == kind


def test_unknown_kinds_come_with_the_list():
    with pytest.raises(
        UnknownRouterKind, match=r"no router kind 'categry'; did you mean 'category'\? there are: categ"
    ):
        build("categry")
    with pytest.raises(UnknownRouterKind, match=r"no router kind 'xyz'; there are: "):
        router_class("xyz")


@pytest.mark.parametrize("kind", ["oracle", "dataset-oracle"])
def test_marks_that_read_the_answers_are_no_routers(kind):
    with pytest.raises(UnknownRouterKind, match="cannot be trained or served; `coe router cv`"):
        build(kind)


def test_settings_reach_the_router():
    assert build("knn", HashingEncoder(16), {"k": 7}).settings.k == 7
    assert settings_of("knn")["weights"] == "uniform"
    assert "encoder" not in settings_of("category")
    assert reads_text("knn")
    assert not reads_text("random")


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("knn", {"kk": 7}, "a knn router has no setting 'kk'; did you mean 'k'"),
        ("best-single", {"expert": "m"}, "a best-single router has no setting 'expert'; it has: none"),
        ("fixed", {}, "a fixed router needs the setting expert; it has: expert"),
        ("knn", {"k": "many"}, "setting k='many' of a knn router: Input should be a valid integer"),
        ("category", {"classifier": "forest"}, "setting classifier='forest' of a category router: Input should be"),
    ],
)
def test_settings_at_fault_are_named(kind, settings, expected):
    with pytest.raises(InvalidSettings, match=expected):
        build(kind, HashingEncoder(16), settings)


def test_values_that_a_router_refuses_are_its_own_errors():
    with pytest.raises(RouterError, match="k"):
        build("knn", HashingEncoder(16), {"k": 0})


def test_a_router_that_reads_text_needs_an_encoder():
    with pytest.raises(InvalidSettings, match="a category router reads text: it needs an encoder"):
        build("category")


def test_a_class_that_raises_other_errors_is_translated(monkeypatch):
    class Picky:
        def __init__(self, level: int = 1) -> None:
            raise ValueError("level 1 is taken")

    module = types.ModuleType("picky_routers")
    module.Picky = Picky
    monkeypatch.setitem(sys.modules, "picky_routers", module)
    monkeypatch.setitem(factory.KINDS, "picky", "picky_routers:Picky")
    with pytest.raises(InvalidSettings, match="a picky router cannot be made with level=1: level 1 is taken"):
        build("picky", settings={"level": 1})
