"""Training the gates of mixtures of adapters: planted adapters that are right for some rows each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml
from composed_training import make_service, write_config, write_rows
from engine_models import make_tokenizer, save_adapter, say
from latent_models import save_tiny
from mot_members import snapshot_of, teach
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from coe.cli.app import app
from coe.config import Config, load_config
from coe.engines.base import Adapter, Member
from coe.engines.hf.composed.lora_mix import LoraMix
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.errors import ConfigError, TaskError, Unsupported
from coe.hosting import open_host
from coe.latent.config import read_train_file
from coe.latent.training.answer_rows import AnswerRow, read_answer_rows, rows_digest
from coe.latent.training.checkpoint import Checkpoint
from coe.latent.training.loop import train
from coe.latent.training.lora_mix import LoraMixTrainer, MixObjective, WeightSearch
from coe.latent.training.mot.routing_losses import localized, switch
from coe.latent.training.search import Evaluations, minimise
from coe.latent.training.trainer import Job, Step
from coe.types import GenerateRequest
from registry.composed import composed_facts
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

ANSWERS = {"left": "a", "right": "b", "up": "c"}
"""Word of a prompt -> the answer; the adapter of that name always gives it."""


def question(word: str, random: Random) -> str:
    return f"{''.join(random.choices('klmnopq', k=3))} {word} {''.join(random.choices('klmnopq', k=2))}"


def rows(n: int, seed: str, words: Sequence[str] = tuple(ANSWERS), **fields: Any) -> tuple[AnswerRow, ...]:
    random = Random(seed)
    found = []
    for i in range(n):
        word = words[i % len(words)]
        asked = question(word, random)
        found.append(AnswerRow(f"{seed}{i}", asked, ANSWERS[word], f"{seed}.jsonl:{i + 1}", member=word, **fields))
    return tuple(found)


def guesses(step: int) -> list[tuple[str, str]]:
    """Questions with any of the answers: the base learns their form."""
    random = Random(f"guess/{step}")
    return [(question(random.choice(list(ANSWERS)), random), random.choice("abc")) for _ in range(16)]


def save_planted_adapter(folder: Path, base: Path, answer: str) -> Path:
    """An adapter that gives one answer to every prompt, whatever it is."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(7)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    config = LoraConfig(r=4, target_modules=["v_proj", "down_proj", "up_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    target = torch.tensor([*tokenizer(answer)["input_ids"], tokenizer.eos_token_id])
    random = Random(answer)
    for _ in range(20):
        loss = torch.zeros(())
        for _ in range(6):
            messages = [{"role": "user", "content": question(random.choice(list(ANSWERS)), random)}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = torch.tensor([*tokenizer(prompt)["input_ids"], *target])
            logits = model(input_ids=ids[None]).logits[0, -len(target) - 1 : -1]
            loss = loss + cross_entropy(logits, target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    root = tmp_path_factory.mktemp("mixed")
    base = save_tiny(root / "base", "LlamaForCausalLM", make_tokenizer())
    teach(base, guesses, steps=60)
    folders = {name: save_planted_adapter(root / name, base, answer) for name, answer in ANSWERS.items()}
    return snapshot_of({"base": base, **folders}, dict.fromkeys(folders, "base"))


def job(
    folder: Path,
    snapshot: Snapshot,
    settings: Mapping[str, Any],
    *,
    members: Sequence[str] = tuple(ANSWERS),
    training: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Job:
    document = {
        "preset": "lora-mix",
        "config": "service.yaml",
        "members": list(members),
        "train": "train.jsonl",
        "valid": "valid.jsonl",
        "out": "out",
        "settings": dict(settings),
        "training": {"batch": 12, "accumulate": 1, "steps": 60, "validate_every": 20, "seed": 1, **(training or {})},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.yaml").write_text(json.dumps(document))
    service = Config.model_validate({"engines": {"hf": {"device": "cpu", "dtype": "float32"}}})
    given = {"train": rows(96, "train"), "valid": rows(30, "valid")} | fields
    (folder / "work").mkdir(exist_ok=True)
    return Job(
        file=read_train_file(folder / "train.yaml"),
        service=service,
        snapshot=snapshot,
        work=folder / "work",
        on_progress=lambda what, done, total: None,
        **given,
    )


def prepared(made: Job) -> MixObjective:
    LoraMixTrainer.check(made)
    return LoraMixTrainer.prepare(made)


def trained(made: Job) -> tuple[MixObjective, Any]:
    objective = prepared(made)
    checkpoint = Checkpoint(made.work / "checkpoint")
    return objective, train(objective, len(made.train), made.config.training, checkpoint)


LEARNED: dict[str, dict[str, Any]] = {
    "top-1": {"gate": "trained", "top_k": 1},
    "dynmole": {"gate": "trained", "entropy": {"tau": 0.9, "coefficient": 0.01}, "noise": 0.1},
}


@pytest.mark.parametrize("name", list(LEARNED))
async def test_a_gate_learns_which_adapter_is_right_on_held_out_rows(
    tmp_path: Path, snapshot: Snapshot, name: str
) -> None:
    made = job(tmp_path, snapshot, LEARNED[name])
    objective, outcome = trained(made)
    assert outcome.before.accuracy < 0.6
    assert outcome.after.accuracy > 0.9
    assert outcome.after.loss < outcome.before.loss
    model = objective._primary.model
    assert not any(parameter.requires_grad for n, parameter in model.named_parameters() if "lora" not in n)
    artifact = objective.save(tmp_path / "out", "card")
    spec = draft(tmp_path / "out", snapshot)
    assert spec.settings.get("top_k", 2) == LEARNED[name].get("top_k", 2)
    assert set(artifact.tensors()) == {f"router.{layer}" for layer in objective.gate.names}
    served = await answers(spec, snapshot, [row.prompt for row in made.valid])
    right = [text == row.answer for text, row in zip(served, made.valid, strict=True)]
    assert sum(right) / len(right) == pytest.approx(outcome.after.accuracy)


def draft(folder: Path, snapshot: Snapshot) -> ExpertSpec:
    stated = ExpertSpec(name="mix", kind=Kind.COMPOSED, members=tuple(ANSWERS), source=str(folder))
    return stated.model_copy(update=composed_facts(stated, folder, snapshot.experts))


async def answers(spec: ExpertSpec, snapshot: Snapshot, prompts: Sequence[str]) -> list[str]:
    """Greedy answers of the served composition."""
    engine = HFEngine(device="cpu", dtype="float32")
    base = snapshot.experts["base"]
    expert = await engine.load(base, Path(base.source))
    assert isinstance(expert, HFExpert)
    adapters = [Adapter(snapshot.experts[name], Path(snapshot.experts[name].source)) for name in spec.members]
    mix = LoraMix(spec, {each.spec.name: Member(expert, each) for each in adapters}, Path(spec.source))
    requests = [GenerateRequest(messages=(Message("user", prompt),), max_tokens=4) for prompt in prompts]
    found = [(await say(mix, request)).text for request in requests]
    await engine.unload(expert)
    return found


def preference(objective: MixObjective) -> torch.Tensor:
    """(n_members, n_members) mean weights of the members, on the validation rows of each."""
    seen: list[torch.Tensor] = []
    found = []
    for name in objective.members:
        here = [i for i, row in enumerate(objective._rows) if row.member == name and i >= len(objective._job.train)]
        seen.clear()
        objective.gate.observer = lambda layer, probabilities, weights: seen.append(weights[:, 3:].mean(dim=(0, 1)))
        objective.measure(here)
        found.append(torch.stack(seen).mean(dim=0))
    objective.gate.observer = None
    return torch.stack(found)


def test_phatgoose_and_glider_train_each_gate_on_the_rows_of_its_member(tmp_path: Path, snapshot: Snapshot) -> None:
    settings = {"top_k": 2, "encoder": "hashing:256", "scale": 20.0, "instructions": {n: n for n in ANSWERS}}
    objective, outcome = trained(job(tmp_path / "p", snapshot, {"gate": "phatgoose"}, training={"steps": 40}))
    assert outcome.after.loss < outcome.before.loss
    local = preference(objective)
    glider = prepared(job(tmp_path / "g", snapshot, {"gate": "glider", **settings}))
    glider.gate.load(objective.gate.weights() | {"instructions": glider.gate.weights()["instructions"]}, expert="g")
    both = preference(glider)
    off = ~torch.eye(3, dtype=torch.bool)
    assert (both.diagonal() > both.masked_fill(~off, 0).amax(dim=1)).all(), "the query names the member"
    assert both.diagonal().mean() > local.diagonal().mean()
    saved = glider.save(tmp_path / "out", "card")
    assert saved.tensors()["instructions"].shape == (3, 256)
    assert saved.composed.settings["encoder"] == "hashing:256"


def test_weights_are_found_without_gradients(tmp_path: Path, snapshot: Snapshot) -> None:
    """All rows want the answer of one adapter."""
    right = {"train": rows(8, "train", ["right"]), "valid": rows(8, "valid", ["right"])}
    made = job(tmp_path, snapshot, {"gate": "fixed", "examples": 8}, training={"steps": 30}, **right)
    objective = prepared(made)
    assert isinstance(objective, WeightSearch)
    steps: list[int] = []
    outcome = objective.search(lambda step, figures: steps.append(step))
    weights = objective.gate.weights()["w"]
    assert outcome.after.accuracy == 1.0
    assert weights.argmax() == 1
    assert weights[1] > 0.4
    assert len(steps) <= 31
    again = prepared(made)
    assert isinstance(again, WeightSearch)
    steps.clear()
    assert again.search(lambda step, figures: steps.append(step)).after == outcome.after
    assert len(steps) == 1, "what is known is not evaluated again"
    assert again.gate.weights()["w"].equal(weights)
    assert made.settings.served() == {"gate": "fixed"}


def test_a_search_stays_within_its_evaluations_and_bounds(tmp_path: Path) -> None:
    calls: list[tuple[float, ...]] = []

    def bowl(point: Sequence[float]) -> float:
        calls.append(tuple(point))
        return sum((x - 3) ** 2 for x in point)

    values = Evaluations(tmp_path / "values.json", bowl, lambda number, value: None)
    assert minimise(values, [0.0, 0.0], bound=1.5, most=25) == pytest.approx((1.5, 1.5), abs=1e-3)
    assert len(calls) <= 25
    assert max(abs(x) for point in calls for x in point) <= 1.5
    (tmp_path / "values.json").write_text('{"values": [1]}')
    with pytest.raises(ConfigError, match="is damaged"):
        Evaluations(tmp_path / "values.json", bowl, lambda number, value: None)


@pytest.mark.parametrize("settings", [{"gate": "trained"}, {"gate": "fixed", "examples": 4}], ids=["trained", "fixed"])
async def test_from_the_command_to_an_expert_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setenv("COE_HOME", str(tmp_path / "home"))
    make_service(tmp_path)
    write_rows(tmp_path / "train.jsonl", 12, seed=1)
    write_rows(tmp_path / "valid.jsonl", 8, seed=2)
    training = {"steps": 4, "batch": 4, "accumulate": 1, "validate_every": 2}
    config = write_config(tmp_path, preset="lora-mix", members=["one", "second"], settings=settings, training=training)
    result = CliRunner().invoke(app, ["latent", "train", "--config", str(config), "--json", str(tmp_path / "result")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "result").read_text())["architecture"] == "lora-mix"
    assert "every token mixes `one` and `second`" in (tmp_path / "out" / "README.md").read_text()
    assert sorted(path.name for path in (tmp_path / "out.training").iterdir()) == ["metrics.jsonl"]
    experts = yaml.safe_load((tmp_path / "experts.yaml").read_text())
    experts["experts"] += yaml.safe_load(result.output.partition("To use it as an expert, ")[2].partition("\n")[2])
    (tmp_path / "experts.yaml").write_text(yaml.safe_dump(experts))
    async with open_host(load_config(tmp_path / "service.yaml")) as host:
        request = GenerateRequest(messages=(Message("user", "what is it?"),), max_tokens=4)
        chunks = [chunk async for chunk in host.ask("out", request)]
        assert chunks[-1].finish_reason in ("length", "stop")
        assert host.resident == {"base"}, "one base for all members"


MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def test_the_balance_loss_is_least_for_uniform_use() -> None:
    even = torch.eye(4)[torch.tensor([[0, 1, 2], [3, 0, 0]])]
    one = torch.eye(4)[torch.zeros(2, 3, dtype=torch.long)]
    assert switch(even, even, MASK) == pytest.approx(1)
    assert switch(one, one, MASK) == pytest.approx(4)


def test_localized_balance_favours_the_members_of_the_group() -> None:
    weights = torch.ones(2, 3, 2) / 2
    favour = torch.tensor([[1.1, 0.9], [0.9, 1.1]])
    mask = torch.ones(2, 3)
    assert localized(weights, mask, torch.ones(2, 2)) == pytest.approx(0)
    uniform = localized(weights, mask, favour)
    tilted = weights / favour[:, None]
    assert localized(tilted, mask, favour) == pytest.approx(0, abs=1e-6)
    assert uniform == pytest.approx(0.15**2 / 1.5, rel=1e-4)
    assert localized(weights, MASK, torch.ones(2, 2)) > 0, "padding does not count"


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_of_the_balance_loss(tmp_path: Path, snapshot: Snapshot, sign: int) -> None:
    balance = {"coefficient": 5.0, "sign": sign}
    made = job(tmp_path, snapshot, {"gate": "trained", "top_k": None, "balance": balance})
    objective = prepared(made)
    for parameter in objective.gate.parameters():
        parameter.data.mul_(20)  # far from uniform
    optimizer = torch.optim.AdamW(objective.gate.parameters(), lr=0.02)
    values = []
    for number in range(8):
        losses = objective.loss(range(12), Step(number, 8, Random(number)))
        values.append(losses.parts["balance"])
        optimizer.zero_grad()
        losses.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert (values[-1] - values[0]) * sign < 0


def test_localized_balance_and_noise_are_trained(tmp_path: Path, snapshot: Snapshot) -> None:
    balance = {"kind": "localized", "groups": {"left": "side", "right": "side", "up": "height"}}
    settings = {"gate": "trained", "top_k": None, "balance": balance, "noise": 0.5}
    given = {"train": rows(12, "train", group="side"), "valid": rows(6, "valid")}
    objective = prepared(job(tmp_path, snapshot, settings, **given))
    one, two, other = (objective.loss(range(6), Step(0, 1, Random(seed))).total.item() for seed in (1, 1, 2))
    assert one == two != other, "noise is drawn from the step"
    assert objective.validate() == objective.validate()
    with pytest.raises(TaskError, match=r"train.jsonl:1: `group` must be one of .*\(height, side\), not ''"):
        prepared(job(tmp_path, snapshot, settings))


@pytest.mark.parametrize(
    ("settings", "fields", "problem"),
    [
        ({"gate": "arrow"}, {}, "the gate 'arrow' is not trained"),
        ({"top_k": 4}, {}, "top_k is 4, and it has 3 members"),
        ({}, {"members": ["base", "left"]}, "'base' is a model"),
        ({"gate": "glider", "instructions": {"math": "sum"}}, {}, "'math', which are not among its members"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tmp_path: Path, snapshot: Snapshot, settings: dict[str, Any], fields: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        LoraMixTrainer.check(job(tmp_path, snapshot, settings, **fields))


def test_adapters_of_the_head_are_refused(tmp_path: Path, snapshot: Snapshot) -> None:
    base = Path(snapshot.experts["base"].source)
    folder = save_adapter(tmp_path / "headed", base, target_modules=["q_proj", "lm_head"])
    headed = snapshot_of({"base": base, "headed": folder, "left": Path(snapshot.experts["left"].source)}, {
        "headed": "base", "left": "base",
    })  # fmt: skip
    rows_of = {"train": rows(8, "train", ["left"]), "valid": rows(8, "valid", ["left"])}
    with pytest.raises(Unsupported, match="'headed' adapts lm_head, which is in no decoder layer"):
        prepared(job(tmp_path, headed, {"gate": "trained"}, members=["left", "headed"], **rows_of))


def test_rows_name_their_member_and_group(tmp_path: Path) -> None:
    lines = [{"id": i, "prompt": f"p{i}", "answer": "a", "member": "left", "group": "side"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_answer_rows(tmp_path / "rows.jsonl", fewest=4)
    assert {(row.member, row.group) for row in found} == {("left", "side")}
    assert rows_digest(found) != rows_digest(tuple(replace(row, member="right") for row in found))


def test_rows_of_members(tmp_path: Path, snapshot: Snapshot) -> None:
    phatgoose = {"gate": "phatgoose"}
    with pytest.raises(TaskError, match=r"train.jsonl:1: .*`member` must be one of left, right, not 'up'"):
        LoraMixTrainer.check(
            job(tmp_path, snapshot, phatgoose, members=["left", "right"], train=rows(8, "train", ["up"]))
        )
    with pytest.raises(TaskError, match="has no row of the member 'right'"):
        LoraMixTrainer.check(job(tmp_path, snapshot, phatgoose, train=rows(8, "train", ["left", "up"])))
    with pytest.raises(ConfigError, match="'left' has no description: state it in settings.instructions"):
        prepared(job(tmp_path, snapshot, {"gate": "glider", "encoder": "hashing:64"}))
