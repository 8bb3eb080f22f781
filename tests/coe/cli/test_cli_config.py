"""`coe config check`: all problems at once, each with file, line and field."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from batch_runs import save_router, service
from typer.testing import CliRunner

from coe.cli.app import app
from coe.config import Config
from coe.engines.fake import FakeEngine
from coe.errors import ConfigError
from coe.experts import how_to_register
from registry.spec import ExpertSpec

EXPERTS = """experts:
  - {name: echo, kind: model, source: "fake://echo"}
  - {name: upper, kind: model, source: "fake://upper"}
  - {name: vectors, kind: embedding, source: "fake://echo", capabilities: [embedding]}
"""


def check(config: Path) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["config", "check", str(config), "--json", "-"])
    document = json.loads(result.stdout)
    assert result.exit_code == (0 if document["valid"] else 1)
    return dict(document)


def write(folder: Path, config: str, experts: str = EXPERTS) -> Path:
    (folder / "experts.yaml").write_text(experts)
    path = folder / "coe.yaml"
    path.write_text(config)
    return path


def places(document: dict[str, Any], kind: str = "problems") -> list[tuple[str, int | None, str | None]]:
    return [(Path(one["file"]).name, one["line"], one["field"]) for one in document[kind]]


def test_a_sound_configuration_is_valid(tmp_path: Path) -> None:
    document = check(
        write(tmp_path, "experts: [experts.yaml]\npolicies:\n  default: {expert: echo, fallback: upper}\n")
    )
    assert document["valid"] and document["problems"] == document["notes"] == []
    assert document["experts"] == ["echo", "upper", "vectors"] and document["policies"] == ["default"]


def test_a_trained_router_is_part_of_the_check(tmp_path: Path) -> None:
    save_router(tmp_path / "router")
    assert check(service(tmp_path, "{default: {router: router, fallback: base}}"))["valid"]
    (tmp_path / "router" / "router.json").write_text("{}")
    document = check(tmp_path / "service.yaml")
    assert places(document) == [("service.yaml", 3, "policies.default.router")]
    assert "train the router again" in document["problems"][0]["message"]


def test_a_router_of_experts_that_there_are_not_is_a_problem(tmp_path: Path) -> None:
    save_router(tmp_path / "router")
    document = check(write(tmp_path, "experts: [experts.yaml]\npolicies:\n  default:\n    router: router\n"))
    assert places(document) == [("coe.yaml", 4, "policies.default.router")]
    assert "base" in document["problems"][0]["message"] and "flaky" in document["problems"][0]["message"]


def test_all_problems_at_once_with_file_line_and_field(tmp_path: Path) -> None:
    config = """experts: [experts.yaml, gone.yaml]
host: {pins: [nope]}
engines: {hf: {max_batch: 0}}
policies:
  default: {router: ./router, fallback: nope, composition: {kind: vot}}
  two: {expert: uper}
  three: {expert: echo, router: x}
  four:
    expert: echo
    composition: {kind: chain, experts: [upper, ehco]}
  five: {expert: vectors}
  six: {expert: half}
"""
    experts = EXPERTS + '  - {name: half, kind: model, source: "fake://x", sise: 3}\n  - {name: sql, kind: adapter}\n'
    document = check(write(tmp_path, config, experts))
    assert places(document) == [
        ("coe.yaml", 1, "experts[1]"),
        ("coe.yaml", 2, "host.pins[0]"),
        ("coe.yaml", 3, "engines.hf.max_batch"),
        ("coe.yaml", 5, "policies.default.router"),
        ("coe.yaml", 5, "policies.default.fallback"),
        ("coe.yaml", 5, "policies.default.composition"),
        ("coe.yaml", 6, "policies.two.expert"),
        ("coe.yaml", 7, "policies.three"),
        ("coe.yaml", 10, "policies.four.composition"),
        ("coe.yaml", 11, "policies.five.expert"),
        ("experts.yaml", 5, "experts[3].sise"),
        ("experts.yaml", 6, "experts[4]"),
    ]
    messages = "\n".join(one["message"] for one in document["problems"])
    assert (
        "did you mean 'upper'" in messages and "did you mean 'vote'" in messages and "did you mean 'echo'" in messages
    )


def test_the_parts_of_a_pool_are_checked(tmp_path: Path) -> None:
    config = "experts: [experts.yaml]\npolicies: {default: {expert: echo}}\nserve:\n  pools:\n"
    document = check(write(tmp_path, config + "    - {experts: [echo, uper]}\n"))
    assert places(document) == [("coe.yaml", 5, "serve.pools[0].experts[1]")]


@pytest.mark.parametrize(
    ("config", "place", "words"),
    [
        ("experts: [experts.yaml", ("coe.yaml", 1, None), "is not YAML"),
        ("- a list\n", ("coe.yaml", 1, None), "mapping"),
        ("", ("coe.yaml", 1, None), "no expert is registered"),
        ("polices: {}\n", ("coe.yaml", 1, "polices"), "did you mean 'policies'"),
        ("policies: {default: {expert: a}}\n", ("coe.yaml", 1, "registry"), "no expert is registered"),
        ("registry: 7\n", ("coe.yaml", 1, "registry"), "string"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole(
    tmp_path: Path, config: str, place: tuple[str, int, str | None], words: str
) -> None:
    document = check(write(tmp_path, config))
    assert place in places(document)
    assert words in document["problems"][places(document).index(place)]["message"]


@pytest.mark.parametrize("several", [False, True])
def test_notes_do_not_make_it_invalid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: bool) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    remote = (
        "{name: r, kind: remote, endpoints: [{url: 'https://x.test/v1', key_env: SOME_KEY}], context_length: 9}"
        if several
        else "{name: r, kind: remote, source: 'https://x.test/v1', context_length: 9, api_key_env: SOME_KEY}"
    )
    experts = f"experts:\n  - {remote}\n  - {{name: far, kind: model, source: 'hf://org/absent'}}\n"
    document = check(write(tmp_path, "experts: [experts.yaml]\n", experts))
    assert document["valid"]
    assert places(document, "notes") == [
        ("experts.yaml", None, None),
        ("experts.yaml", 2, "experts[0].endpoints[0].key_env" if several else "experts[0].api_key_env"),
        ("coe.yaml", 1, None),
    ]
    downloads, key, policy = (note["message"] for note in document["notes"])
    assert "far" in downloads and "SOME_KEY" in key and "no policy" in policy


def test_people_read_one_problem_a_line_and_what_to_do_next(tmp_path: Path) -> None:
    config = write(tmp_path, "experts: [experts.yaml]\npolicies: {default: {expert: ecko}}\n")
    result = CliRunner().invoke(app, ["config", "check", str(config)])
    assert result.exit_code == 1 and result.stdout == ""
    assert f"wrong: {config}:2: policies.default.expert: 'ecko' is not in" in result.stderr
    config.write_text("experts: [experts.yaml]\npolicies: {default: {expert: echo}}\n")
    result = CliRunner().invoke(app, ["config", "check", str(config)])
    assert result.exit_code == 0 and f"{config} is valid: 3 experts, policies default" in result.stdout
    assert f"coe chat --config {config}" in result.stderr


def test_the_engines_that_experts_name_are_checked(tmp_path: Path) -> None:
    config = "experts: [experts.yaml]\npolicies: {default: {expert: echo}}\nengines:\n  fake: {capacity: 2}\n"
    experts = EXPERTS + '  - {name: odd, kind: model, source: "odd://x", engine: fakee}\n'
    document = check(write(tmp_path, config, experts))
    assert places(document) == [("coe.yaml", 1, "experts")]
    [problem] = document["problems"]
    assert problem["message"].startswith("engine of odd: there is no engine 'fakee'; did you mean 'fake'?")
    assert check(write(tmp_path, config, experts.replace("fakee", "fake")))["valid"]
    config += "  'coe.engines.fake:FakeEngine': {capactiy: 2}\n"
    document = check(write(tmp_path, config, experts.replace("fakee", "coe.engines.fake:FakeEngine")))
    assert places(document) == [("coe.yaml", 5, "engines.coe.engines.fake:FakeEngine")]
    assert "unexpected keyword argument 'capactiy'" in document["problems"][0]["message"]


def test_settings_of_composed_experts_are_checked(tmp_path: Path) -> None:
    experts = EXPERTS + (
        '  - {name: a, kind: model, source: "fake://echo", engine: hf}\n'
        '  - {name: b, kind: model, source: "fake://echo", engine: hf}\n'
        "  - {name: both, kind: composed, architecture: logits, members: [a, b], settings: {mode: mean, alpha: 2}}\n"
    )
    document = check(write(tmp_path, "experts: [experts.yaml]\npolicies: {default: {expert: echo}}\n", experts))
    messages = [problem["message"] for problem in document["problems"]]
    assert any("settings of 'both': `alpha` is of mode proxy, not of 'mean'" in message for message in messages)


def test_an_engine_may_refuse_experts_before_they_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_expert(self: FakeEngine, spec: ExpertSpec) -> None:
        if spec.tool_call_parser == "hermess":
            raise ConfigError(f"`tool_call_parser` of {spec.name!r}: no parser 'hermess'")

    monkeypatch.setattr(FakeEngine, "check_expert", check_expert, raising=False)
    experts = EXPERTS + '  - {name: odd, kind: model, source: "fake://echo", engine: fake, tool_call_parser: hermess}\n'
    experts += '  - {name: over, kind: adapter, base: odd, source: "fake://echo", tool_call_parser: hermess}\n'
    config = "experts: [experts.yaml]\npolicies: {default: {expert: echo}}\n"
    document = check(write(tmp_path, config, experts))
    assert places(document) == [("coe.yaml", 1, "experts")] * 2
    assert document["problems"][0]["message"] == "`tool_call_parser` of 'odd': no parser 'hermess'"
    assert check(write(tmp_path, config, experts.replace("hermess", "hermes")))["valid"]


@pytest.mark.parametrize(
    ("config", "command"),
    [
        (Config(), "`coe registry apply FILE` registers them"),
        (Config(registry="sqlite:////x/y.db"), "`coe registry apply FILE --registry sqlite:////x/y.db` registers them"),
        (Config(registry="postgresql://coe:secret@db/coe"), "--registry postgresql://coe:***@db/coe`"),
        (Config(experts=["mine.yaml"]), "add them to "),
    ],
)
def test_an_error_names_what_adds_experts_where_the_reader_is(config: Config, command: str) -> None:
    assert command in how_to_register(config) and "secret" not in how_to_register(config)


def test_an_empty_configuration_reads_the_registry(tmp_path: Path, coe_home: Path) -> None:
    config = tmp_path / "coe.yaml"
    config.write_text("# every key has a default\n")
    messages = [problem["message"] for problem in check(config)["problems"]]
    assert len(messages) == 1 and "no expert is registered there: `coe registry apply FILE`" in messages[0]


@pytest.mark.parametrize(
    ("experts", "line"),
    [("experts:\n  - {name: [1], kind: model, source: x}\n", 2), ("{}", 1), ("- 1", 1), ("a: 2020-99-99", 1)],
)
def test_experts_files_of_the_wrong_shape(tmp_path: Path, experts: str, line: int) -> None:
    entry = "  - {name: echo, kind: model, source: 'fake://echo'}\n" if "name" in experts else ""
    config = "experts: [experts.yaml]\npolicies: {default: {expert: echo}}\n"
    found = places(check(write(tmp_path, config, experts + entry)))
    assert ("experts.yaml", line) in [place[:2] for place in found]


def test_sources_that_no_file_system_holds(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    sources = ["~no-such-user/x", "x" * 300, "pipe.gguf", "."]
    entries = "".join(f"  - {{name: e{n}, kind: model, source: '{one}'}}\n" for n, one in enumerate(sources))
    document = check(write(tmp_path, "experts: [experts.yaml]\n", f"experts:\n{entries}"))
    assert [place[1:] for place in places(document)] == [(n + 2, f"experts[{n}].source") for n in range(4)]
    words = ("there is no such user", "there is no folder", "is a pipe, socket or device", "has no model.safetensors")
    assert all(text in one["message"] for text, one in zip(words, document["problems"], strict=True))


@pytest.mark.parametrize("url", ["https://bob:hunter2@x.test/v1", "HTTPS://bob:?hunter2@x.test", "http://hunter2@[::1"])
def test_a_password_in_a_url_is_refused_and_not_printed(tmp_path: Path, url: str) -> None:
    entry = f"{{name: far, kind: remote, context_length: 9, source: '{url}'}}"
    document = check(write(tmp_path, "experts: [experts.yaml]\n", f"experts:\n  - {entry}\n"))
    assert ("experts.yaml", 2, "experts[0].source") in places(document)
    assert "`api_key_env`" in str(document) and "hunter2" not in str(document)


def test_members_of_a_composed_expert_are_on_its_engine(tmp_path: Path) -> None:
    text = """\
experts:
  - {name: a, kind: model, source: fake://echo}
  - {name: b, kind: model, source: fake://upper}
  - {name: both, kind: composed, architecture: logits, members: [a, b], settings: {mode: mean}}
"""
    (tmp_path / "experts.yaml").write_text(text)
    (tmp_path / "coe.yaml").write_text("experts: [experts.yaml]\npolicies: {default: {expert: both}}\n")
    result = CliRunner().invoke(app, ["config", "check", str(tmp_path / "coe.yaml")])
    assert result.exit_code == 1
    assert "'both' combines 'a', which the engine 'fake' serves: members are served by 'hf'" in " ".join(
        result.output.split()
    )


def test_an_expert_larger_than_every_pool_that_serves_it_is_a_problem(tmp_path: Path) -> None:
    experts = """
experts:
  - {name: echo, kind: model, source: "fake://echo", size_bytes: 1048576}
  - {name: big, kind: model, source: "fake://upper", size_bytes: 4194304}
"""
    pools = "serve: {pools: [{name: a, experts: [echo]}, {name: b, experts: [big], budget: %s}]}\n"
    for name in ("one", "two", "three", "four"):
        (tmp_path / name).mkdir()
    one = "experts: [experts.yaml]\nhost: {budget: 2MiB}\npolicies: {default: {expert: echo}}\n"
    found = check(write(tmp_path / "one", one, experts))
    [problem] = found["problems"]
    assert problem["line"] == 2 and "'big' needs at least 4 MiB in memory, the budget is 2 MiB" in problem["message"]
    assert check(write(tmp_path / "two", one + pools % "8MiB", experts))["problems"] == []
    [problem] = check(write(tmp_path / "three", one + pools % "3MiB", experts))["problems"]
    assert problem["line"] == 4 and "the budget is 3 MiB" in problem["message"]
    unknown = one.replace("host: {budget: 2MiB}", "host: {}")
    assert check(write(tmp_path / "four", unknown, experts))["problems"] == []


def test_fake_experts_that_cannot_be_loaded_are_problems(tmp_path: Path) -> None:
    experts = """
experts:
  - {name: good, kind: model, source: "fake://script?paris=France&default=no"}
  - {name: fails, kind: model, source: "fake://fail?after=2"}
  - {name: one, kind: model, source: "fake://ehco"}
  - {name: two, kind: model, engine: auto, source: "fake://echo?loud=1"}
  - {name: three, kind: adapter, base: good, source: "fake://fail?at=start"}
"""
    found = check(write(tmp_path, "experts: [experts.yaml]\npolicies: {default: {expert: good}}\n", experts))
    assert [problem["message"] for problem in found["problems"]] == [
        "'one' cannot be loaded: 'fake://ehco' is not a fake expert; there are: fake://echo, fake://upper, "
        "fake://script, fake://fail",
        "'two' cannot be loaded: 'fake://echo?loud=1' is not a fake expert: echo has no settings, and 'loud' is one",
        "'three' cannot be loaded: 'fake://fail?at=start' is not a fake expert: at must be one of load, switch, got "
        "'start'",
    ]
    assert places(found) == [("coe.yaml", 1, "experts")] * 3


def test_experts_larger_than_one_budget_are_one_problem_with_their_names(tmp_path: Path) -> None:
    lines = [
        f'  - {{name: e{n:02}, kind: model, source: "fake://echo", size_bytes: {n}000000}}\n' for n in range(1, 16)
    ]
    config = "experts: [experts.yaml]\nhost: {budget: 2500}\npolicies: {default: {expert: e01}}\n"
    pools = "serve: {pools: [{name: a, experts: [e15]}, {name: b, budget: 3MB}]}\n"
    [problem] = check(write(tmp_path, config, "experts:\n" + "".join(lines)))["problems"]
    assert "15 experts need more memory than the budget of 2,500 bytes, up to 14 MiB: 'e01'," in problem["message"]
    assert "'e10' and 5 more. Requests for them are refused" in problem["message"] and problem["line"] == 2
    [problem] = check(write(tmp_path, config + pools, "experts:\n" + "".join(lines)))["problems"]
    assert problem["line"] == 4 and "12 experts need more memory than the budget of 3 MiB" in problem["message"]
