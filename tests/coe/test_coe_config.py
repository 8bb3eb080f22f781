"""A configuration is read once, with every problem and its place; paths are relative to the file that contains them."""

from pathlib import Path

import pytest

from coe.config import Config, PolicyConfig, load_config
from coe.engine_config import EnginesConfig
from coe.errors import ConfigError
from routers.selectors import Cascade, Dynamic, Selector, TopK


def write(folder: Path, text: str, name: str = "service.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_file_and_home_is_the_home_of_coe(tmp_path: Path, coe_home: Path) -> None:
    config = load_config(
        write(
            tmp_path,
            "experts: [experts.yaml, /abs/more.yaml]\n"
            "policies:\n  default: {router: home://zoo/router}\n  other: {router: routers/x}\n",
        )
    )
    assert config.experts == (tmp_path / "experts.yaml", Path("/abs/more.yaml"))
    assert config.policies["default"].router == coe_home / "zoo" / "router"
    assert config.policies["other"].router == tmp_path / "routers" / "x"


def test_sizes_are_read_with_their_units(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "host: {budget: 1.5GiB}")).host.budget == 1.5 * 2**30


def test_every_problem_is_reported_at_once_with_line_and_field(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "host:\n  budgte: 4GiB\n  aging_s: -1\npolicies:\n  default: {composition: single}\n"
        "engines:\n  hf: {max_batch: 0}\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert f"{path}:2: host.budgte" in lines[0] and "budget" in lines[0]
    assert f"{path}:3: host.aging_s" in lines[1]
    assert f"{path}:5: policies.default" in lines[2] and "give either `router`" in lines[2]
    assert f"{path}:7: engines.hf.max_batch" in lines[3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policies: {a: {expert: x}}\ndefault_policy: b", "default_policy 'b' is not among the policies"),
        ("registry: sqlite://\nexperts: [x.yaml]", "either `registry` .* or `experts`"),
        ("policies: {default: {expert: x, router: y}}", "give either `router`"),
        ("host: [", "service.yaml:1"),
        ("policies: {default: {expert: x, select: dynamc}}", "default.*no selector 'dynamc'; did you mean 'dynamic'"),
        ("policies: {default: {expert: x, select: {kind: dynamic, p: 2}}}", r"p must be a number in \[0, 1\], got 2"),
        ("policies: {default: {expert: x, select: {kind: dynamic, k: 2}, k: 3}}", "k is given twice"),
        ("policies: {default: {expert: x, k: 0}}", "policies.default.k"),
        ("policies: {default: {expert: x, reads: all}}", "policies.default.reads.*'last' or 'conversation'"),
        ("policies: {default: {expert: x, switch_weight: -1}}", "policies.default.switch_weight"),
    ],
)
def test_contradictions_and_broken_yaml_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_the_defaults_need_no_file() -> None:
    config = Config()
    assert config.host.budget is None and config.engines.hf.device == "auto" and config.policies == {}


@pytest.mark.parametrize(
    ("text", "selector"),
    [
        ("", TopK(1)),
        ("k: 3", TopK(3)),
        ("select: best", TopK(1)),
        ("select: dynamic", Dynamic()),
        ("select: {kind: dynamic, p: 0.8}, k: 3", Dynamic(0.8, 3)),
        ("select: {kind: cascade, tolerance: 0.05, k: 2}", Cascade(tolerance=0.05, k=2)),
    ],
)
def test_a_policy_says_how_many_experts_it_takes(tmp_path: Path, text: str, selector: Selector) -> None:
    policy = load_config(write(tmp_path, f"policies: {{default: {{expert: x, {text}}}}}")).policies["default"]
    assert policy.selector == selector
    assert PolicyConfig.model_validate_json(policy.model_dump_json()) == policy  # as it is sent to the replicas


def test_a_composition_is_a_name_or_a_kind_with_settings(tmp_path: Path) -> None:
    text = "policies: {default: {expert: x}, all: {expert: x, composition: vote}, some: {expert: x, composition: %s}}"
    policies = load_config(write(tmp_path, text % "{kind: cascade, confidence: 0.8}")).policies
    assert [policy.composition.kind for policy in policies.values()] == ["single", "vote", "cascade"]
    assert policies["some"].composition.settings == {"confidence": 0.8} and not policies["all"].composition.settings
    told = load_config(write(tmp_path, text % "{kind: cascade, prior: priors/exam.json}")).policies["some"]
    assert told.composition.settings == {"prior": str(tmp_path / "priors" / "exam.json")}
    assert PolicyConfig.model_validate_json(told.model_dump_json()) == told
    for policy in policies.values():
        assert PolicyConfig.model_validate_json(policy.model_dump_json()) == policy


def test_an_engine_of_a_plugin_has_a_section_and_a_typo_has_none(tmp_path: Path) -> None:
    engines = load_config(
        write(tmp_path, "engines: {'my_pkg.engine:MyEngine': {depth: 2}, fake: {capacity: 3}}")
    ).engines
    assert engines.settings("my_pkg.engine:MyEngine") == {"depth": 2}
    assert engines.settings("fake")["capacity"] == 3 and engines.settings("another") == {}
    assert EnginesConfig.model_validate_json(engines.model_dump_json()) == engines
    with pytest.raises(ConfigError, match=r":2: engines.fak: is not a known field; did you mean 'fake'\?"):
        load_config(write(tmp_path, "engines:\n  fak: {capacity: 3}"))
    with pytest.raises(ConfigError, match=r"engines.my_pkg:Engine: should be a mapping of fields, got 3"):
        load_config(write(tmp_path, "engines: {'my_pkg:Engine': 3}"))
