"""What the zoo ships: adapters, cards, tasks, outcomes and the rival."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from coe.config import load_config
from coe.evaluation.tasks import find_tasks
from examples.zoo.card import read_card
from examples.zoo.families import FAMILIES, TWO_SKILLS, Split
from examples.zoo.fetch import BASES
from examples.zoo.plan import (
    ADAPTERS,
    AGGREGATOR,
    BATCH,
    DIRECT,
    GENERALIST,
    KNOWLEDGE,
    STEPS,
    TRAIN_SEED,
    training_rows,
)
from examples.zoo.tasks import write_task
from examples.zoo.train import ZOO, folder_of
from registry.documents import load_document
from routers.outcomes.table import OutcomeTable

SHIPPED = {**ADAPTERS, GENERALIST.name: GENERALIST}
FOR_TWO_SKILLS = {adapter.name: adapter for adapter in (AGGREGATOR, DIRECT)}
every_adapter = pytest.mark.parametrize("name", SHIPPED)


def test_every_family_has_an_adapter_and_gemma_has_one_at_least() -> None:
    assert set(STEPS) == set(FAMILIES)
    assert {adapter.base for adapter in ADAPTERS.values()} == set(BASES)


@pytest.mark.parametrize("name", SHIPPED | FOR_TWO_SKILLS)
def test_an_adapter_is_small_bf16_and_knows_no_machine(name: str) -> None:
    folder, base = folder_of(name), BASES[(SHIPPED | FOR_TWO_SKILLS)[name].base]
    weights = folder / "adapter_model.safetensors"
    assert weights.stat().st_size <= 2e6
    with safe_open(weights, "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    assert {tensor.get_dtype() for tensor in slices.values()} == {"BF16"}
    assert all(".q_proj." in key or ".v_proj." in key for key in slices)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert config["base_model_name_or_path"] == base.hub.removeprefix("hf://")
    assert (folder / "chat_template.jinja").exists() == (base.chat_template is not None)
    assert not any(path.suffix in {".bin", ".pt", ".pkl", ".py"} for path in folder.iterdir())


@every_adapter
def test_a_card_says_how_it_was_made_and_how_good_it_is(name: str) -> None:
    card, adapter = read_card(folder_of(name)), SHIPPED[name]
    assert card["training"]["steps"] == adapter.steps
    assert card["training"]["seed"] == TRAIN_SEED
    assert card["training"]["seconds"] > 0
    assert "CPU" in card["training"]["hardware"]
    assert card["base_model"] == BASES[adapter.base].hub.removeprefix("hf://")
    assert set(card["scores"]) == {family.name for family in adapter.families}
    assert all(score["n"] >= 100 for score in card["scores"].values())


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_expert_is_twenty_points_over_its_base(name: str) -> None:
    score = read_card(folder_of(name))["scores"][name]
    assert score["adapter"] - score["base"] >= 0.20


def test_the_rival_trains_on_the_same_rows_for_as_many_steps() -> None:
    assert GENERALIST.steps == sum(adapter.steps for adapter in ADAPTERS.values())
    theirs = [row.prompt for a in ADAPTERS.values() for row in training_rows(a, steps=a.steps, seed=TRAIN_SEED)]
    ours = [row.prompt for row in training_rows(GENERALIST, steps=GENERALIST.steps, seed=TRAIN_SEED)]
    assert sorted(ours) == sorted(theirs)
    assert ours != theirs


def test_gemmas_terms_come_with_what_was_made_from_it() -> None:
    notice = (ZOO / "NOTICE").read_text()
    assert notice.startswith(
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
    )
    assert "3.2 Use" in (ZOO / "GEMMA_TERMS.txt").read_text()
    for name, adapter in ADAPTERS.items():
        assert read_card(folder_of(name))["license"] == ("gemma" if "gemma" in adapter.base else "apache-2.0")


def test_experts_yaml_lists_the_bases_and_every_adapter_but_the_rival() -> None:
    experts = {entry["name"]: entry for entry in load_document(ZOO / "experts.yaml").value["experts"]}
    assert set(experts) == set(BASES) | set(ADAPTERS)
    for name, adapter in ADAPTERS.items():
        assert experts[name]["base"] == adapter.base
        assert (ZOO / experts[name]["source"]).samefile(folder_of(name))
    for name, base in BASES.items():
        assert experts[name]["source"] == f"home://models/{base.folder}"


def test_what_two_skills_take_is_listed_apart_and_was_trained_on_equal_terms() -> None:
    experts = {entry["name"]: entry for entry in load_document(ZOO / "aggregator.yaml").value["experts"]}
    assert set(experts) == set(FOR_TWO_SKILLS)
    for name, adapter in FOR_TWO_SKILLS.items():
        assert experts[name]["base"] == adapter.base
        assert (ZOO / experts[name]["source"]).samefile(folder_of(name))
        card = read_card(folder_of(name))
        assert card["training"]["families"] == list(TWO_SKILLS)
        facts = [card["training"][key] for key in ("seed", "steps", "batch")]
        assert facts == [TRAIN_SEED, AGGREGATOR.steps, BATCH]
    config = load_config(ZOO / "two_skills.yaml")
    assert config.experts == tuple(
        ZOO / f"{name}.yaml" for name in ("experts", "aggregator", "latent_artifacts/experts")
    )
    assert config.engines.hf.dtype == "auto"  # bfloat16 takes many times as long on a CPU without it


def test_the_knowing_expert_is_listed_apart_small_and_knows_its_words() -> None:
    (entry,) = load_document(ZOO / "latent_experts.yaml").value["experts"]
    folder, card = folder_of(KNOWLEDGE.name), read_card(folder_of(KNOWLEDGE.name))
    assert (entry["name"], entry["base"]) == (KNOWLEDGE.name, KNOWLEDGE.base)
    assert (ZOO / entry["source"]).samefile(folder)
    assert (folder / "adapter_model.safetensors").stat().st_size <= 3e6
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], sorted(config["target_modules"])) == (KNOWLEDGE.rank, sorted(KNOWLEDGE.targets))
    assert config["layers_to_transform"] == list(range(KNOWLEDGE.first_layer, 30))
    assert [card["training"][key] for key in ("seed", "steps", "batch")] == [
        TRAIN_SEED,
        KNOWLEDGE.steps,
        KNOWLEDGE.batch,
    ]
    score = card["scores"][KNOWLEDGE.name]
    assert score["n"] >= 100
    assert score["adapter"] >= 0.75  # of texts of one to six words, all of them right and in their order
    assert score["base"] == 0.0


def test_shipped_tasks_are_what_the_generators_write(tmp_path: Path) -> None:
    for family in FAMILIES.values():
        rows = {
            f"{split}-1-{i:03d}": row
            for split in (Split.TRAIN, Split.VALID)
            for i, row in enumerate(family.rows(split, 20, seed=1))
        }
        written = write_task(family, rows, tmp_path)
        for path in (written, written.with_suffix(".jsonl")):
            assert path.read_text() == (ZOO / "tasks" / path.name).read_text()
    assert [task.name for task in find_tasks(str(ZOO / "tasks"), [])] == sorted(FAMILIES)


def test_shipped_outcomes_cover_every_expert_and_task() -> None:
    table = OutcomeTable.read(ZOO / "outcomes.parquet")
    digests = json.loads((ZOO / "outcomes.digests.json").read_text())
    assert set(table.experts) == set(digests) == set(BASES) | set(ADAPTERS)
    assert set(table.labels()) == set(FAMILIES)
    assert len(table) == sum(len(task.rows) for task in find_tasks(str(ZOO / "tasks"), []))


def test_ood_prompts_belong_to_no_family() -> None:
    prompts = [json.loads(line)["prompt"] for line in (ZOO / "ood.jsonl").read_text().splitlines()]
    assert len(set(prompts)) == len(prompts) >= 100
    ours = {row.prompt for family in FAMILIES.values() for split in Split for row in family.rows(split, 100, seed=9)}
    assert not ours & set(prompts)
