"""`coe route --config`: the decision that the service would make."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from batch_runs import save_router, service
from composed_training import make_service
from typer.testing import CliRunner

from coe.cli.app import app
from coe.cli.route.composed import composed_lines
from coe.errors import ConfigError
from registry.errors import UnknownExpert
from registry.spec import ExpertSpec, Kind
from routers.base import RoutingDecision
from routers.errors import NoEligibleExpert


@pytest.fixture
def config(tmp_path: Path) -> Path:
    save_router(tmp_path / "router")
    return service(
        tmp_path, "{default: {router: router}, two: {router: router, k: 2, select: top-k}, loud: {expert: loud}}"
    )


def route(*words: object, ok: bool = True) -> Any:
    result = CliRunner().invoke(app, ["route", "hello", *map(str, words)])
    assert (result.exit_code == 0) is ok, result.output
    return result


def test_the_default_policy_decides_unless_another_is_named(config: Path) -> None:
    assert route("--config", config).stdout == "base\n"
    assert route("--config", config, "--policy", "loud").stdout == "loud\n"
    assert route("--config", config, "--policy", "two").stdout == "base\nloud\n"


def test_it_is_the_decision_of_the_service(config: Path) -> None:
    asked = CliRunner().invoke(app, ["ask", "hello", "-c", str(config), "--json", "-"])
    answer, decision = json.loads(asked.stdout), json.loads(route("-c", config, "--json", "-").stdout)
    assert {name: decision[name] for name in answer["decision"]} == answer["decision"]
    assert decision.keys() == {*RoutingDecision.__dataclass_fields__, "estimate", "ood", "recruiting"}
    quality = {expert: each["quality"] for expert, each in decision["estimate"].items()}
    assert quality == pytest.approx({"base": 0.9, "loud": 0.8, "tuned": 0.7, "flaky": 0.6})
    assert decision["recruiting"] is None


def test_the_question_may_come_from_stdin(config: Path) -> None:
    given = CliRunner().invoke(app, ["route", "-", "-c", str(config), "--explain"], input="hello")
    assert given.stdout == route("-c", config, "--explain").stdout


def test_the_configuration_of_the_folder_is_the_default(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config.parent)
    config.rename("coe.yaml")
    assert route("--policy", "two").stdout == "base\nloud\n"


def test_a_selector_takes_its_settings(config: Path) -> None:
    for source in (("-c", config), ("--router", config.parent / "router")):
        assert route(*source, "--select", "best").stdout == "base\n"
        assert route(*source, "--select", "dynamic,p=0.95").stdout == "base\nloud\n"
        assert route(*source, "--select", "top-k,k=3").stdout == "base\nloud\ntuned\n"
        assert "is not KEY=VALUE" in route(*source, "--select", "dynamic,p", ok=False).output
        assert "has no setting q" in str(route(*source, "--select", "dynamic,q=1", ok=False).exception)


def test_constraints_and_flags_count(config: Path) -> None:
    assert route("-c", config, "--allowed", "tuned,flaky").stdout == "tuned\n"
    assert route("-c", config, "--top-k", 3).stdout == "base\nloud\ntuned\n"
    assert isinstance(route("-c", config, "--allowed", "broken", ok=False).exception, NoEligibleExpert)


def test_explain_shows_every_expert(config: Path) -> None:
    shown = route("-c", config, "--explain").stdout
    assert "expected score" in shown and all(name in shown for name in ("base", "loud", "tuned", "flaky"))
    assert "not chosen" in shown


def test_explain_shows_the_members_of_a_composed_expert_in_place_of_a_score(tmp_path: Path) -> None:
    experts = make_service(tmp_path).with_name("experts.yaml")
    document = yaml.safe_load(experts.read_text())
    both = {"kind": "composed", "architecture": "logits", "members": ["base", "one"], "settings": {"mode": "mean"}}
    mixed = {
        "kind": "composed",
        "architecture": "lora-mix",
        "members": ["one", "second"],
        "settings": {"gate": "arrow"},
    }
    document["experts"] += [{"name": "both", **both}, {"name": "mixed", **mixed}]
    experts.write_text(yaml.safe_dump(document))
    config = tmp_path / "service.yaml"
    voting = {"expert": "mixed", "composition": {"kind": "chain", "experts": ["both", "one"]}}
    policies = {"default": {"expert": "both"}, "chained": voting, "plain": {"expert": "one"}}
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "policies": policies}))

    named = route("-c", config, "--explain").stdout
    assert named.splitlines() == [
        "both",
        "             reason: the policy names this expert",
        "    composed expert: both: logits, the scores of each next token of base, one are combined",
    ]
    chained = route("-c", config, "--policy", "chained", "--explain").stdout
    assert "composition: chain" in chained
    assert "mixed: lora-mix, each token mixes the LoRA updates of one, second" in chained
    assert "both: logits" in chained  # the composition calls it
    assert route("-c", config, "--policy", "plain", "--explain").stdout.splitlines()[0] == "one"


@pytest.mark.parametrize(
    ("architecture", "line"),
    [
        ("notes", "x: notes, a answers, and reads the hidden states of b, c"),
        ("cache", "x: cache, a answers, and reads the key-value entries of b, c"),
        ("mot", "x: mot, one of a, b, c answers, and reads the hidden states of others"),
    ],
)
def test_a_composed_expert_in_words(architecture: str, line: str) -> None:
    spec = ExpertSpec(name="x", kind=Kind.COMPOSED, architecture=architecture, members=("a", "b", "c"), source="x")
    (found,) = composed_lines(["x", "a", "x"], {"x": spec})
    assert found.startswith(line)


def test_the_room_for_the_answer_counts(config: Path) -> None:
    experts = config.with_name("experts.yaml")
    experts.write_text(
        experts.read_text().replace('"fake://echo", context_length: 64', '"fake://echo", context_length: 32')
    )
    assert route("-c", config, "--max-tokens", 30).stdout == "base\n"
    assert route("-c", config, "--max-tokens", 32).stdout == "loud\n"
    shown = " ".join(route("-c", config, "--max-tokens", 32, "--explain").stdout.split())
    assert "base: context length: 32 tokens for the answer do not fit its 32" in shown
    assert "a saved router knows no contexts" in route(
        "--router", config.parent / "router", "--max-tokens", 64, ok=False
    ).output.replace("\n", " ")


def test_the_router_alone_decides_the_same(config: Path) -> None:
    assert route("--router", config.parent / "router").stdout == "base\n"


def test_flags_that_do_not_go_together(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config.parent)
    missing = " ".join(route(ok=False).output.replace("│", " ").split())
    assert "no coe.yaml here" in missing and "or a saved router with --router" in missing
    result = route("--router", config.parent / "router", "--policy", "two", ok=False)
    assert "names a policy of --config" in result.output
    error = route("-c", config, "--policy", "tow", ok=False).exception
    assert isinstance(error, UnknownExpert) and "did you mean 'two'" in str(error)


def test_a_configuration_without_policies(tmp_path: Path) -> None:
    error = route("-c", service(tmp_path, "{}"), ok=False).exception
    assert isinstance(error, ConfigError) and "has no policy" in str(error)


TALK = [{"role": "user", "content": "Count the rows of the table."}, {"role": "assistant", "content": "12 rows"}]


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(TALK))
    return path


def test_a_conversation_before_the_question_is_read_and_shown(config: Path, talk: Path) -> None:
    found = json.loads(route("-c", config, "--history", talk, "--json", "-").stdout)["conversation"]
    assert [turn["message"] for turn in found["turns"]] == [0, 2]
    assert sum(turn["weight"] for turn in found["turns"]) == pytest.approx(1.0)
    assert found["previous"] == "base" and found["prefill_tokens"] == 16
    assert found["switch_price"]["base"] == 0 < found["switch_price"]["loud"]
    shown = route("-c", config, "--history", talk, "--explain").stdout
    assert "stands alone 100%: Count the rows of the table." in shown and "previous expert: base; 16 tokens" in shown


def test_the_previous_expert_may_be_stated(config: Path, talk: Path) -> None:
    stated = ("-c", config, "--history", talk, "--previous", "loud", "--json", "-")
    assert json.loads(route(*stated).stdout)["conversation"]["previous"] == "loud"
    wrong = route("-c", config, "--history", talk, "--previous", "lout", ok=False)
    assert isinstance(wrong.exception, UnknownExpert) and "did you mean 'loud'" in str(wrong.exception)
    assert "goes with --history" in route("-c", config, "--previous", "loud", ok=False).output
    by_router = route("--router", config.parent / "router", "--history", talk, "--json", "-")
    assert json.loads(by_router.stdout)["conversation"]["previous"] is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '[{"role": "user"}]', "[" * 10_000, '["x"]', "\x00"])
def test_a_history_that_is_no_conversation_is_refused(config: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    assert "must be a JSON list" in route("-c", config, "--history", tmp_path / "bad.json", ok=False).output
    assert "cannot be read" in route("-c", config, "--history", tmp_path / "none.json", ok=False).output


@pytest.mark.parametrize(
    "text, problem",
    [
        ('[{"role": "user"', "not valid JSON: Expecting ',' delimiter: line 1 column 17"),
        ("{}", "it is not a list"),
        ("[]", "it has 0 messages"),
        ('[{"role": "user", "content": "hi"}, {"role": "human", "content": "ho"}]', "message 1 (from 0) is not one"),
        (json.dumps([{"role": "user", "content": "hi"}] * 4097), "it has 4097 messages"),
        (" " * 2**22 + "[]", "it is larger"),
    ],
)
def test_the_error_of_a_history_names_the_problem(config: Path, tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    shown = route("-c", config, "--history", tmp_path / "bad.json", ok=False).output
    plain = " ".join(shown.replace("│", " ").split())
    assert problem in plain and "assistant" in plain


def test_the_context_must_hold_the_whole_conversation(config: Path, tmp_path: Path) -> None:
    (tmp_path / "long.json").write_text(json.dumps([{"role": "user", "content": "word " * 400}]))
    refused = route("-c", config, "--history", tmp_path / "long.json", ok=False)
    assert isinstance(refused.exception, NoEligibleExpert) and "context length" in str(refused.exception)
