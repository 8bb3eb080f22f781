"""adapter_config.json: its limits, and its patterns, which are matched in bounded time."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from registry.errors import SourceError
from registry.lora import config as lora_config
from registry.lora import patterns as module_patterns
from registry.lora.config import LoraConfig, read_lora_config
from registry.lora.patterns import PatternMatcher

NAME = "model.layers.3.self_attn.q_proj"
SLOW = r"(.|[\w.])+[!-]"  # 2**31 ways to match NAME, and none does


def config(folder: Path, **settings: Any) -> LoraConfig:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | settings))
    return read_lora_config(folder)


def test_every_task_type_of_peft_is_served_or_refused_with_its_reason(tmp_path: Path) -> None:
    from peft import TaskType

    reasons = set()
    for task in set(TaskType) - {TaskType.CAUSAL_LM}:
        with pytest.raises(SourceError, match=f"has task_type '{task.value}'; only CAUSAL_LM can be served: ") as error:
            config(tmp_path, task_type=task.value)
        reasons.add(str(error.value).rpartition(": ")[2])
    assert len(reasons) == len(TaskType) - 1 and "it is unknown" not in reasons


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"task_type": None},
        {"task_type": "CAUSAL_LM"},
        {"task_type": "causal_lm"},
        {"auto_mapping": None},
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}},
        {"auto_mapping": {"base_model_class": "Gemma3ForConditionalGeneration"}},
        {"auto_mapping": {"base_model_class": "GPT2LMHeadModel"}},
        {"task_type": "CAUSAL_LM", "auto_mapping": {"base_model_class": "LlamaForSequenceClassification"}},
        {"auto_mapping": {"base_model_class": 7}},
        {"auto_mapping": []},
    ],
)
def test_adapters_of_models_that_write_text_are_taken(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert config(tmp_path, **settings).r == 8


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"task_type": "seq_cls"}, "it classifies texts"),
        ({"task_type": "IMAGE_CLS"}, "it is unknown"),
        ({"task_type": ""}, "it is unknown"),
        ({"task_type": ["SEQ_CLS"]}, "it is not a name"),
        ({"task_type": 7}, "it is not a name"),
        ({"auto_mapping": {"base_model_class": "LlamaForSequenceClassification"}}, "a LlamaForSequenceClassification"),
        ({"task_type": None, "auto_mapping": {"base_model_class": "BertForTokenClassification"}}, "only adapters of"),
        ({"auto_mapping": {"base_model_class": "BertForMaskedLM"}}, "only adapters of models that write text"),
    ],
)
def test_other_adapters_are_refused_with_the_reason(tmp_path: Path, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(SourceError, match=match):
        config(tmp_path, **settings)


def test_an_endless_task_type_is_shown_in_part(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="it is unknown") as error:
        config(tmp_path, task_type="x" * 1_000_000)
    assert len(str(error.value)) < 500


def matcher(most_s: float = 0.3) -> PatternMatcher:
    return PatternMatcher("adapter_config.json", most_s)


@pytest.mark.parametrize(
    ("settings", "targeted"),
    [
        ({}, True),
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["proj"]}, False),
        ({"target_modules": ["self_attn.q_proj"]}, True),
        ({"target_modules": ["q_proj"], "exclude_modules": ["layers.3.self_attn.q_proj"]}, False),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*layers\.[0-2].*"}, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": [3, 5]}, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": 4}, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": "h"}, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": ["h", "layers"]}, True),
        ({"target_modules": [NAME], "layers_to_transform": [4]}, True),
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": r".*\.(q|v)_proj"}, True),
        ({"target_modules": r"(q|v)_proj"}, False),
        ({"target_modules": r"^(?!.*vision).*(?:attn).*?(?:q_proj|up_proj)$"}, True),
    ],
)
def test_targets_are_those_of_peft(tmp_path: Path, settings: dict[str, Any], targeted: bool) -> None:
    from types import SimpleNamespace

    from peft.tuners.tuners_utils import check_target_module_exists

    assert config(tmp_path, **settings).targets(NAME, matcher()) is targeted
    if "target_modules" in settings and settings["target_modules"] != "all-linear":
        unused = dict.fromkeys(("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"))
        assert bool(check_target_module_exists(SimpleNamespace(**unused | settings), NAME)) is targeted


@pytest.mark.parametrize(
    ("pattern", "rank"),
    [("q_proj", 2), ("self_attn.q_proj", 2), (r"layers\.[0-3]\..*", 2), ("proj", 8), (r"layers\.3", 8), (NAME, 2)],
)
def test_ranks_and_alphas_by_pattern(tmp_path: Path, pattern: str, rank: int) -> None:
    it = config(tmp_path, r=8, lora_alpha=8, rank_pattern={pattern: 2}, alpha_pattern={"other": 1, pattern: 2})
    assert (it.rank(NAME, matcher()), it.alpha(NAME, matcher())) == (rank, rank)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": SLOW},
        {"target_modules": ["q_proj"], "exclude_modules": SLOW},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": SLOW},
    ],
)
def test_a_pattern_that_backtracks_is_given_up(tmp_path: Path, settings: dict[str, Any]) -> None:
    began = time.monotonic()
    with pytest.raises(SourceError, match=r"takes longer than 0\.3 s: name the modules in a list instead"):
        config(tmp_path, **settings).targets(NAME, matcher())
    for name in ("rank_pattern", "alpha_pattern"):
        it = config(tmp_path, **{name: {SLOW: 2}})
        with pytest.raises(SourceError, match="takes longer than"):
            (it.rank if name == "rank_pattern" else it.alpha)(NAME, matcher())
    assert time.monotonic() - began < 30


def test_all_patterns_of_an_adapter_share_the_time() -> None:
    """A thousand patterns that each take half of the limit do not take five hundred times the limit."""
    seconds = iter(range(1000))
    it = PatternMatcher("x", most_s=4.0, clock=lambda: float(next(seconds)))  # each match takes a second
    for _ in range(4):
        assert it.whole("mode.*", NAME)
    with pytest.raises(SourceError, match="takes longer than 4 s"):
        it.whole(SLOW, NAME)


def test_other_threads_go_on_while_a_pattern_is_matched() -> None:
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.wait(0.005):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    with pytest.raises(SourceError, match="takes longer"):
        matcher(1.0).whole(SLOW, NAME)
    done.set()
    thread.join()
    assert len(ticks) > 10


def test_limits_of_patterns() -> None:
    longest = module_patterns.MOST_CHARACTERS
    assert not matcher().whole("a" * longest, NAME)
    with pytest.raises(SourceError, match="a pattern has 2,001 characters; the most: 2,000"):
        matcher().whole("a" * (longest + 1), NAME)
    assert matcher().whole(r"[\w.]{1,10}[\w.]{1,10}[\w.]+", NAME)
    assert matcher().whole(r"[\w.]{1,}", NAME)
    with pytest.raises(SourceError, match="repeats more than 100 times: use"):
        matcher().whole(r"[\w.]{1,101}", NAME)
    for pattern in ("(", "[", "a{2}{3}{4}**", "(?P<a", "\\", "(" * 900 + ")" * 900):
        with pytest.raises(SourceError, match="is not a regular expression"):
            matcher().whole(pattern, NAME)


def test_limits_of_a_config(tmp_path: Path) -> None:
    assert config(tmp_path, r=lora_config.MOST_RANK).r == 2**16
    with pytest.raises(SourceError, match="a rank of 65537: it must be from 1 to 65,536"):
        config(tmp_path, r=2**16 + 1)
    most = lora_config.MOST_PATTERNS
    assert len(config(tmp_path, rank_pattern={f"m{n}": 1 for n in range(most)}).rank_pattern) == most
    for name in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(SourceError, match=f"{name} has 4,097 keys; the most: 4,096"):
            config(tmp_path, **{name: {f"m{n}": 1 for n in range(most + 1)}})
    with pytest.raises(SourceError, match="layers_pattern has 4,097 entries"):
        config(tmp_path, target_modules=["q"], layers_to_transform=[1], layers_pattern=["h"] * (most + 1))
    file, start = tmp_path / "adapter_config.json", '{"peft_type": "LORA", "revision": "'
    fill = lora_config.MOST_BYTES - len(start) - 2
    file.write_text(f'{start}{"x" * fill}"}}')
    assert file.stat().st_size == lora_config.MOST_BYTES and read_lora_config(tmp_path).r == 8
    file.write_text(f'{start}{"x" * (fill + 1)}"}}')
    with pytest.raises(SourceError, match="has 4,194,305 bytes"):
        read_lora_config(tmp_path)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target_modules": 3}, "target_modules is not a list of names"),
        ({"target_modules": ["a", None]}, "target_modules is not a list of names"),
        ({"target_modules": "q", "layers_to_transform": [1]}, "cannot be used with target_modules as a pattern"),
        ({"layers_to_transform": [True]}, "layers_to_transform is not a list of whole numbers"),
        ({"rank_pattern": ["a"]}, "rank_pattern is not a mapping"),
        ({"rank_pattern": {"a": -1}}, "a rank of -1"),
        ({"alpha_pattern": {"a": "b"}}, "alpha_pattern is 'b', not a finite number"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"use_dora": "yes"}, "use_dora is 'yes', not true or false"),
        ({"bias": "some"}, "bias is 'some', not one of none, all, lora_only"),
        ({"trainable_token_indices": 3}, "neither a list nor a mapping"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices is not a list of whole numbers"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is not a list of names"),
        ({"init_lora_weights": {"a": 1}}, "which modifies the base"),
        ({"peft_type": "ADALORA"}, "has peft_type 'ADALORA'; only LORA"),
    ],
)
def test_what_is_not_a_setting_of_peft_is_refused(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        config(tmp_path, **settings)
