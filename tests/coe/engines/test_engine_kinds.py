"""The visible list of engines."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coe.engine_config import EnginesConfig
from coe.engines import ENGINES, Capabilities, capabilities, create_engine, engine_kind, holds_weights
from coe.errors import ConfigError
from registry.spec import COMPOSED_ARCHITECTURES, ExpertSpec, Kind


def test_every_listed_engine_can_be_created() -> None:
    made = {kind: type(create_engine(kind)).__name__ for kind in ENGINES}
    assert made == {kind: path.partition(":")[2] for kind, path in ENGINES.items()}
    assert made.items() >= {"fake": "FakeEngine", "hf": "HFEngine", "remote": "RemoteEngine"}.items()


@pytest.mark.parametrize("kind", ENGINES)
def test_every_listed_engine_has_a_section_with_arguments_that_it_takes(kind: str) -> None:
    assert kind in EnginesConfig.model_fields
    create_engine(kind, **EnginesConfig().settings(kind))


def test_an_engine_states_whether_its_experts_take_memory() -> None:
    assert {kind: holds_weights(kind) for kind in ("fake", "hf", "remote")} == {
        "fake": False,
        "hf": True,
        "remote": False,
    }
    with pytest.raises(ConfigError, match="no engine 'hff'"):
        holds_weights("hff")


def test_the_capabilities_of_experts_are_those_of_the_engines_that_serve_them() -> None:
    specs = [
        ExpertSpec(name="model", kind=Kind.MODEL, source="/models/m"),
        ExpertSpec(name="remote", kind=Kind.REMOTE, source="https://host/v1"),
        ExpertSpec(name="tuned", kind=Kind.ADAPTER, base="model", source="fake://echo"),
        ExpertSpec(name="elsewhere", kind=Kind.MODEL, source="/models/m", engine="not-installed-here"),
    ]
    known = capabilities({spec.name: spec for spec in specs})
    hf = {"streaming", "adapters", "tools", "json_schema", "logprobs", "prompt_logprobs", "token_prompts", "sampling"}
    hf |= {"embeddings", "latent"}
    assert known == {"model": hf, "tuned": hf, "remote": {"streaming", "tools", "vision"}}


def test_composed_experts_lack_what_is_of_one_tokenizer_or_of_the_scores_of_one_model() -> None:
    def able(architecture: str) -> frozenset[str]:
        spec = ExpertSpec(
            name="both", kind=Kind.COMPOSED, members=("a", "b"), architecture=architecture, source="/artifact"
        )
        return capabilities({"both": spec})["both"]

    of_one = {"token_prompts", "prompt_logprobs"}
    found = {name: able(name) & of_one for name in ("notes", "cache", "mot", "lora-mix", "logits")}
    assert found == {
        "notes": {"prompt_logprobs"},
        "cache": {"prompt_logprobs"},
        "mot": set(),
        "lora-mix": of_one,
        "logits": {"token_prompts"},
    }
    assert all({"logprobs", "json_schema", "sampling"} <= able(name) for name in found)


def test_what_a_call_may_want_needs_a_capability() -> None:
    able = Capabilities(prompt_logprobs=True)
    assert able.serves("text") and able.serves("scores") and not able.serves("latent")
    assert Capabilities(latent=True, embeddings=True).names == {"latent", "embeddings"}


def test_the_architecture_of_a_composed_expert_says_which_engine_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPOSED_ARCHITECTURES, "pairs", "fake")
    both = ExpertSpec(name="both", kind=Kind.COMPOSED, members=("a", "b"), architecture="pairs")
    assert engine_kind(both) == "fake"


class Talkative:
    """An engine of another package whose capabilities have a wrong type."""

    capabilities = ("streaming",)

    def footprint(self) -> None: ...
    def load(self) -> None: ...
    def unload(self) -> None: ...


def test_capabilities_of_a_wrong_type_name_the_engine() -> None:
    kind = f"{__name__}:Talkative"
    message = "engine .*:Talkative'.*must be a class attribute of type .*Capabilities, not tuple"
    with pytest.raises(ConfigError, match=message):
        create_engine(kind)
    with pytest.raises(ConfigError, match=message):
        capabilities({"a": ExpertSpec(name="a", kind=Kind.MODEL, source="/models/m", engine=kind)})


@pytest.mark.parametrize("error", [RuntimeError("no device"), SystemExit("no device")])
def test_an_engine_whose_constructor_fails_is_a_configuration_error(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plugins:
        def load(self, kind: str) -> Callable[[], None]:
            return self.construct

        def construct(self) -> None:
            raise error

    monkeypatch.setattr("coe.engines._PLUGINS", Plugins())
    with pytest.raises(ConfigError, match=f"engine 'mine' cannot be created with .*{type(error).__name__}: no device"):
        create_engine("mine")
