import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from planted_outcomes import planted_table
from router_settings import REQUIRED

from routers import artifacts
from routers.artifacts import ARRAYS, META, load, save
from routers.base import Query, RouterState
from routers.decision import decide
from routers.encoders.build import HashingEncoder
from routers.errors import InvalidArtifact, RouterError, StaleArtifactWarning
from routers.factory import KINDS, build
from routers.kinds.auto.router import Member
from routers.kinds.baselines import FixedRouter
from routers.outcomes.reference import Reference

ENCODER = HashingEncoder(64)
TABLE = planted_table(120)
QUERIES = [Query.of(prompt) for prompt in planted_table(12, seed=5).prompts]


def trained(kind="knn", **settings):
    return build(kind, ENCODER, settings).fit(TABLE)


@pytest.fixture
def saved(tmp_path):
    save(trained(k=10), tmp_path / "r", table=TABLE, encoder=ENCODER)
    return tmp_path / "r"


def edit(folder, **changes):
    """Change router.json and sign it again."""
    document = json.loads((folder / META).read_text()) | changes
    document["digest"] = artifacts._digest(document)
    (folder / META).write_text(json.dumps(document))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_router_decides_as_the_one_that_was_saved(tmp_path, kind):
    router = trained(kind, **REQUIRED.get(kind, {}) | ({"k": 10} if kind == "knn" else {}))
    save(router, tmp_path / "r", table=TABLE, encoder=ENCODER)
    loaded = load(tmp_path / "r").router
    expected, found = router.estimate(QUERIES), loaded.estimate(QUERIES)
    assert found.experts == expected.experts
    np.testing.assert_array_equal(found.quality, expected.quality)
    assert decide(found) == decide(expected)


def test_the_meta_says_what_the_router_was_trained_on(tmp_path):
    digests = {"law-expert": "sha256:1"}
    digest = save(trained(), tmp_path / "r", table=TABLE, encoder=ENCODER, digests=digests, prices={"m": 1})
    meta = load(tmp_path / "r").meta
    assert (meta.kind, meta.n_queries, meta.digest, meta.prices) == ("knn", 120, digest, {"m": 1})
    assert dict(meta.experts) == {name: digests.get(name) for name in TABLE.experts}
    assert (meta.encoder.name, meta.encoder.digest, meta.encoder.dim) == ("hashing:64", ENCODER.digest, 64)
    assert meta.training_ids_digest == Reference.of(TABLE).ids_digest()
    assert meta.training_ids_digest != Reference.of(TABLE.select([0, 1])).ids_digest()
    assert meta.reference.seen([TABLE.query_ids[3], "other"]).tolist() == [True, False]
    np.testing.assert_allclose(meta.reference.mean_scores, TABLE.scores.mean(axis=0))
    law = [domain == "law" for domain in TABLE.domains]
    np.testing.assert_allclose(meta.reference.by_domain["law"], TABLE.scores[law].mean(axis=0))


def test_a_router_without_text_has_no_encoder(tmp_path):
    save(trained("best-single"), tmp_path / "r", table=TABLE, encoder=None)
    assert load(tmp_path / "r").meta.encoder is None


def test_nothing_but_the_two_files_is_written_and_saving_again_replaces_them(saved):
    assert sorted(path.name for path in saved.iterdir()) == [META, ARRAYS]
    save(trained("random"), saved, table=TABLE, encoder=None)
    assert load(saved).meta.kind == "random"
    assert [path.name for path in saved.parent.iterdir() if path.name != "coe-home"] == ["r"]


@pytest.mark.parametrize("name", [META, ARRAYS])
def test_missing_files_are_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(InvalidArtifact, match=f"is not a saved router: it has no {name}"):
        load(saved)


def test_truncated_and_altered_files_are_named(saved):
    arrays = (saved / ARRAYS).read_bytes()
    (saved / ARRAYS).write_bytes(arrays[:-1])
    with pytest.raises(InvalidArtifact, match=f"{ARRAYS} is truncated or has been altered"):
        load(saved)
    (saved / ARRAYS).write_bytes(arrays)
    text = (saved / META).read_text()
    (saved / META).write_text(text.replace("law-expert", "law-expart"))
    with pytest.raises(InvalidArtifact, match=f"{META} has been altered"):
        load(saved)
    for broken in (text[: len(text) // 2], "[]", "{}"):
        (saved / META).write_text(broken)
        with pytest.raises(InvalidArtifact, match=f"{META} is truncated or not that of a router"):
            load(saved)


def test_other_formats_and_kinds_are_refused(saved):
    edit(saved, format=99)
    with pytest.raises(InvalidArtifact, match="has format 99, but this version reads 2"):
        load(saved)
    edit(saved, format=2, kind="psychic")
    with pytest.raises(InvalidArtifact, match="no router kind 'psychic'"):
        load(saved)


def test_another_encoder_is_refused(saved):
    with pytest.raises(InvalidArtifact, match=r"was trained with encoder 'hashing:64' .* not with 'hashing:32'"):
        load(saved, make_encoder=lambda name: HashingEncoder(32))
    shared = HashingEncoder(64)
    assert load(saved, make_encoder=lambda name: shared).router.encoder is shared


def test_experts_that_are_not_registered_are_named_with_what_to_do(saved):
    known = dict.fromkeys(["cooking-expert", "geometry-expert", "law-expart", "music-expert"])
    with pytest.raises(InvalidArtifact) as caught:
        load(saved, experts=known)
    assert "'law-expert' (did you mean 'law-expart'?), 'generalist'." in str(caught.value)
    assert "the registry or the experts file" in str(caught.value)


def test_experts_with_other_files_warn(tmp_path):
    digests = {"law-expert": "sha256:1", "music-expert": "sha256:2"}
    save(trained(), tmp_path / "r", table=TABLE, encoder=ENCODER, digests=digests)
    there = dict.fromkeys(TABLE.experts) | {"music-expert": "sha256:2", "cooking-expert": "sha256:9"}
    load(tmp_path / "r", experts=there)
    with pytest.warns(StaleArtifactWarning, match="the files of 'law-expert' changed since"):
        load(tmp_path / "r", experts=there | {"law-expert": "sha256:other"})


def test_settings_that_are_not_json_are_refused_and_nothing_is_written(tmp_path, monkeypatch):
    router = trained()
    monkeypatch.setattr(type(router), "state", lambda self: RouterState({}, {"limit": float("inf")}))
    with pytest.raises(RouterError, match="a knn router cannot be saved, its settings are not JSON"):
        save(router, tmp_path / "r", table=TABLE, encoder=ENCODER)
    assert not (tmp_path / "r").exists()


PLUGIN = """
import numpy as np
from routers import Estimate, RouterState

class First:
    kind = "first"
    requires = frozenset()
    experts = ()
    def fit(self, table):
        self.experts = table.experts
        return self
    def estimate(self, queries):
        return Estimate(self.experts, np.tile(np.linspace(1, 0, len(self.experts)), (len(queries), 1)))
    def state(self):
        return RouterState({}, {"experts": list(self.experts)})
    @classmethod
    def from_state(cls, state, encoder):
        router = cls()
        router.experts = tuple(state.settings["experts"])
        return router
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The name of a third-party module that is not imported yet."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "first_router.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield "first_router"
    sys.modules.pop("first_router", None)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("first_router:First", {}),
        ("guarded", {"kind": "first_router:First", "method": "risk", "alpha": 0.5}),
        ("auto", {"candidates": [{"kind": "first_router:First"}]}),
    ],
)
def test_a_plugin_named_by_module_and_class_is_imported_only_if_allowed(tmp_path, plugin, monkeypatch, kind, settings):
    """An untrusted artifact runs no code, whether its own kind or that of an inner router names the class."""
    router = build(kind, ENCODER, settings).fit(TABLE)
    if kind == "auto":  # make the plug-in the chosen router, whichever it chose on this table
        member = Member(build("first_router:First").fit(TABLE), 1.0, None, None)
        router = router.with_model(replace(router.model, members=(member,)))
    save(router, tmp_path / "r", table=TABLE, encoder=ENCODER)
    sys.modules.pop(plugin)
    with pytest.raises(InvalidArtifact, match="the module 'first_router' is not imported.*COE_PLUGINS=first_router"):
        load(tmp_path / "r")
    assert plugin not in sys.modules, "nothing ran"
    for loaded in (load(tmp_path / "r", plugins=[plugin]), _from_environment(tmp_path / "r", plugin, monkeypatch)):
        np.testing.assert_array_equal(loaded.router.estimate(QUERIES).quality, router.estimate(QUERIES).quality)
        assert loaded.meta.kind == kind


def _from_environment(folder, plugin, monkeypatch):
    monkeypatch.setenv("COE_PLUGINS", plugin)
    return load(folder)


def test_a_class_that_is_no_router_is_refused(saved):
    edit(saved, kind="subprocess:Popen")
    with pytest.raises(InvalidArtifact, match="the module 'subprocess' is not imported"):
        load(saved)
    with pytest.raises(InvalidArtifact, match="the class Popen has no kind, fit, estimate, state, from_state"):
        load(saved, plugins=["subprocess"])


def test_a_class_defined_in_a_function_cannot_be_saved(tmp_path):
    class Local(FixedRouter):
        kind = "local"

    with pytest.raises(RouterError, match="a local router cannot be saved: .*Local is defined inside a function"):
        save(Local(expert="law-expert").fit(TABLE), tmp_path / "r", table=TABLE, encoder=None)
