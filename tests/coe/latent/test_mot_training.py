"""Training a mixture of thoughts on tiny members of two architectures and tokenizers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from shutil import copytree
from typing import Any

import pytest
import torch
from engine_models import save_adapter
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mot_members import LETTERS, answer_rows, job, random_rows, save_gemma, save_llama, snapshot_of, teach

from coe.engines.latent.memory import Memories
from coe.engines.latent.mot import MotInteractions
from coe.engines.latent.mot_router import read_chooser
from coe.errors import ConfigError, ContextLengthExceeded, EngineError, Rejected, Unsupported
from coe.latent.training.checkpoint import Checkpoint
from coe.latent.training.loop import train
from coe.latent.training.members import Members
from coe.latent.training.mot.draws import Noted
from coe.latent.training.mot.objective import MotObjective
from coe.latent.training.mot.states import StateStore
from coe.latent.training.mot.trainer import OUTCOMES, MotTrainer
from coe.latent.training.trainer import Job, Step, Validation
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.encoders.build import build_encoder
from routers.outcomes.table import OutcomeTable

MEMBERS = ("llama", "gemma", "second")
FEW = {"learning_rate": 0.01, "validate_every": 60, "steps": 60}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Three members that have learned that an answer is one of eight letters, any of them as likely."""
    root = tmp_path_factory.mktemp("members")
    torch.manual_seed(0)
    folders = {"llama": save_llama(root / "llama"), "gemma": save_gemma(root / "gemma")}
    for name, folder in folders.items():
        teach(folder, lambda step, name=name: random_rows(16, f"{name}/{step}"), steps=100)  # type: ignore[misc]
    folders["second"] = Path(copytree(folders["llama"], root / "second"))
    return snapshot_of(folders)


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where states are stored; the same for all tests of this file."""
    path = tmp_path_factory.getbasetemp() / "mot-home"
    monkeypatch.setenv("COE_HOME", str(path))
    return path


class KeptMembers(Members):
    """Members that several tests use."""

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def kept() -> Iterator[dict[object, KeptMembers]]:
    members: dict[object, KeptMembers] = {}
    yield members
    for each in members.values():
        Members.close(each)


@pytest.fixture(autouse=True)
def members_are_loaded_once(kept: dict[object, KeptMembers], monkeypatch: pytest.MonkeyPatch) -> None:
    def load_once(names: tuple[str, ...], snapshot: Snapshot, engines: Any, **options: Any) -> KeptMembers:
        key = (names, *(snapshot.experts[name].digest for name in names))
        if key not in kept:
            kept[key] = KeptMembers(names, snapshot, engines, **options)
        return kept[key]

    monkeypatch.setattr("coe.latent.training.mot.trainer.Members", load_once)


def prepare(made: Job) -> MotObjective:
    MotTrainer.check(made)
    return MotTrainer.prepare(made)


def random_job(folder: Path, snapshot: Snapshot, members: tuple[str, ...] = MEMBERS, **fields: Any) -> Job:
    return job(folder, snapshot, members, random_rows(64, "train"), random_rows(64, "valid"), **fields)


def step(number: int = 0, of: int = 60, seed: int = 0) -> Step:
    return Step(number, of, Random(f"{seed}/{number}"))


def fill(objective: MotObjective, scale: float = 0.3) -> None:
    """Wo other than zero, so that notes act."""
    torch.manual_seed(3)
    for name, parameter in objective.interactions.named_parameters():
        if name.endswith("output"):
            torch.nn.init.normal_(parameter, std=scale)


# The untouched start


def test_before_training_every_primary_answers_as_if_alone(snapshot: Snapshot, tmp_path: Path) -> None:
    objective = prepare(random_job(tmp_path, snapshot, settings={"router": "first", "k": 3}))
    rows = objective.valid
    assert objective.validate().loss == pytest.approx(float(rows.losses[:, 0].sum() / rows.n_tokens.sum()), abs=1e-6)
    for primary in range(3):
        other = prepare(random_job(tmp_path, snapshot)) if primary else objective
        peers = [peer for peer in range(3) if peer != primary]
        bare = other._logits(rows, primary, [0, 1], [[], []])
        composed = other._logits(rows, primary, [0, 1], [[Noted(peer, row) for peer in peers] for row in (0, 1)])
        assert torch.equal(bare, composed)


def test_first_trains_the_first_member_as_primary_and_no_router(snapshot: Snapshot, tmp_path: Path) -> None:
    objective = prepare(random_job(tmp_path, snapshot, settings={"router": "first", "k": 2}))
    assert objective.router is None and objective.interactions.primary_names == ("llama",)
    losses = objective.loss([0, 1, 2], step())
    assert {"regret", "entropy", "balance"}.isdisjoint(losses.parts)
    assert losses.total.item() == pytest.approx(losses.parts["cross_entropy"] + 0.1 * losses.parts.get("keep", 0.0))


# The leak


def train_on_noise(folder: Path, snapshot: Snapshot, **fields: Any) -> tuple[Validation, Validation]:
    """Validation before and after 60 steps on labels that have nothing to do with the prompts."""
    made = random_job(folder, snapshot, training={**FEW, "drop_peer": 0, "drop_all": 0, "wrong_peer": 0}, **fields)
    objective = prepare(made)
    before = objective.validate()
    config = made.config.training
    optimizer = torch.optim.AdamW([p for group in objective.groups() for p in group.tensors.values()], lr=0.01)
    for number in range(config.steps):
        rows = Random(number).sample(range(len(made.train)), 8)
        objective.loss(rows, step(number)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, objective.validate()


@pytest.mark.parametrize("router", ["first", "latent"])
def test_labels_at_random_are_not_learned(snapshot: Snapshot, tmp_path: Path, router: str) -> None:
    before, after = train_on_noise(tmp_path, snapshot, settings={"router": router, "k": 3})
    assert after.loss >= before.loss - 0.02


def test_without_the_causal_mask_of_the_published_code_the_answer_leaks(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Memories, "visible", lambda self, ends: self.mask[:, None, :])
    before, after = train_on_noise(tmp_path, snapshot, settings={"router": "first", "k": 3})
    assert after.loss < before.loss - 0.3


# Causality


def test_a_token_does_not_depend_on_text_behind_it(snapshot: Snapshot, tmp_path: Path) -> None:
    objective = prepare(random_job(tmp_path, snapshot, settings={"interactions": 2}))
    fill(objective)
    texts = st.text(st.sampled_from("the end is😀\u0301a\n "), min_size=2, max_size=10)

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
    @given(text=texts, last=st.sampled_from("xth😀 "), primary=st.sampled_from(range(3)))
    def check(text: str, last: str, primary: int) -> None:
        answers = [text, text[:-1] + last]
        assume(answers[0] != answers[1] and all(answer.strip() for answer in answers))
        n_same = len(text) - 1
        for member in range(3):
            first, second = (tokens_before(objective, member, answer, n_same) for answer in answers)
            assume(first == second)
        n = 1 + len(tokens_before(objective, primary, answers[0], n_same))  # tokens that are the same in both texts
        logits = [answered(objective, primary, answer)[0] for answer in answers]
        torch.testing.assert_close(logits[0][:n], logits[1][:n], atol=1e-4, rtol=1e-4)

    check()


def tokens_before(objective: MotObjective, member: int, answer: str, n_characters: int) -> list[int]:
    """The tokens of an answer with which a member has read nothing behind `n_characters`."""
    reading = objective.members[member].reading("the end", answer)
    n = int((reading.read <= n_characters).sum())
    return list(reading.ids[reading.n_prompt : n])


def answered(objective: MotObjective, primary: int, answer: str) -> tuple[torch.Tensor, list[int]]:
    """Logits of a row with notes of all peers, and how much text was given before each."""
    [row] = answer_rows([("the end", answer)])
    readings = [[member.reading(row.prompt, row.answer)] for member in objective.members]
    for store, own in zip(objective._stores, readings, strict=True):
        store.measure(own, lambda done, total: None)
    rows = type(objective.train)(readings, torch.zeros(1, 3), torch.zeros(1, 3))
    notes = [Noted(peer, 0) for peer in range(3) if peer != primary]
    reading = readings[primary][0]
    ends = reading.given[reading.n_prompt - 1 :].tolist()
    return objective._logits(rows, primary, [0], [notes]).detach(), ends


def test_notes_on_the_answer_do_reach_the_tokens_behind_them(snapshot: Snapshot, tmp_path: Path) -> None:
    """The mask does not hide everything: other notes on the first letter change what follows it."""
    objective = prepare(random_job(tmp_path, snapshot))
    fill(objective)
    logits, ends = answered(objective, 0, "ab")
    bare = objective.members[0].logits([objective.members[0].reading("the end", "ab")])
    assert ends == [0, 1, 2]
    assert float((logits - bare).abs().amin(0).max()) > 1e-3
    reading = objective.members[1].reading("the end", "ab")
    visible = [sum(end <= given for end in reading.read.tolist()) for given in ends]
    assert visible == [reading.n_prompt, reading.n_prompt + 1, reading.n_prompt + 2]


# The router


def test_the_router_gets_a_gradient_through_the_weights_of_the_peers(snapshot: Snapshot, tmp_path: Path) -> None:
    nothing = {"entropy": 0, "balance": 0, "consistency": 0, "regret": 0}
    made = random_job(tmp_path, snapshot, settings={"losses": nothing, "k": 2}, training={"keep": 0})
    objective = prepare(made)
    assert objective.router is not None
    weight = objective.router.layers[0].weight
    objective.loss(list(range(8)), step()).total.backward()
    assert isinstance(weight, torch.nn.Parameter)
    assert weight.grad is None or float(weight.grad.abs().sum()) == 0.0  # Wo is zero: no note acts yet
    fill(objective)
    objective.loss(list(range(8)), step()).total.backward()
    assert weight.grad is not None and float(weight.grad.abs().sum()) > 0


def test_the_regret_alone_gives_the_router_a_gradient_from_the_first_step(snapshot: Snapshot, tmp_path: Path) -> None:
    objective = prepare(random_job(tmp_path, snapshot))
    objective.loss(list(range(8)), step()).total.backward()
    assert objective.router is not None
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in objective.router.parameters())


def test_at_the_first_step_only_wo_has_a_gradient_and_then_every_tensor(snapshot: Snapshot, tmp_path: Path) -> None:
    training = {"drop_peer": 0, "drop_all": 0, "wrong_peer": 0}
    objective = prepare(random_job(tmp_path, snapshot, training=training))
    tensors = dict(objective.interactions.named_parameters())

    def with_gradient() -> set[str]:
        for parameter in tensors.values():
            parameter.grad = None
        for seed in range(4):  # all members are primary in one of these
            objective.loss(list(range(24)), step(seed=seed)).total.backward()
        return {name for name, p in tensors.items() if p.grad is not None and float(p.grad.abs().sum()) > 0}

    assert with_gradient() == {name for name in tensors if name.endswith("output")}
    fill(objective)
    assert with_gradient() == set(tensors)


def test_a_planted_choice_of_the_primary_is_learned(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("planted")
    folders = {"x": save_llama(root / "x"), "y": save_gemma(root / "y")}
    for name, folder in folders.items():
        teach(folder, lambda step, name=name: always(name, step), steps=25)  # type: ignore[misc]
    planted = {"x": "north", "y": "south"}
    rows = [(f"{planted[answer]} {q}", answer) for q, answer in random_rows(120, "planted", "xy")]
    training = {"steps": 40, "learning_rate": 0.02, "validate_every": 40}
    compared = {"compare": ["knn"]}
    made = job(tmp_path, snapshot_of(folders), ("x", "y"), rows[:80], rows[80:], settings=compared, training=training)
    objective = prepare(made)
    right = objective.valid.regret.argmin(1)
    assert right.tolist() == ["xy".index(answer) for _, answer in rows[80:]]
    assert float((objective._order(objective.valid)[:, 0] == right).float().mean()) < 0.9
    outcome = train(objective, len(made.train), made.config.training, Checkpoint(tmp_path / "checkpoint"))
    assert float((objective._order(objective.valid)[:, 0] == right).float().mean()) == 1.0
    assert outcome.after.loss < outcome.before.loss - 1
    choices = objective.choices()
    assert choices["router"] == choices["knn"] == choices["oracle"] < choices["best_single"]
    table = OutcomeTable.read(made.work / OUTCOMES)
    assert table.experts == ("x", "y") and len(table) == 80
    assert table.scores.argmax(1).tolist() == ["xy".index(answer) for _, answer in rows[:80]]


def always(answer: str, step: int) -> list[tuple[str, str]]:
    return [(f"{('north', 'south')[i % 2]} {q}", answer) for i, (q, _) in enumerate(random_rows(8, step))]


# Peers that are missing or wrong


def test_peers_are_left_out_and_replaced_as_often_as_stated(snapshot: Snapshot, tmp_path: Path) -> None:
    objective = prepare(random_job(tmp_path, snapshot, settings={"k": 2}, training={"wrong_peer": 0.15}))
    rows = [row % 64 for row in range(4000)]
    generator = torch.Generator().manual_seed(0)
    first, _, _ = objective._draws(rows, generator, 1.0)
    chance = Random(0)
    plans = [objective._planned(first, place, row, chance) for place, row in enumerate(rows)]
    assert sum(not plan for plan in plans) / 4000 == pytest.approx(0.05 + 0.95 * 0.15, abs=0.03)
    wrong = [plan for place, plan in enumerate(plans) if plan and plan[0].member != first.order[place, 1]]
    assert len(wrong) / sum(map(bool, plans)) == pytest.approx(0.15, abs=0.03)
    primaries = first.primary.tolist()
    assert all(each.member != primaries[place] for place, plan in enumerate(plans) for each in plan)


def test_with_all_members_active_a_wrong_note_is_on_another_row(snapshot: Snapshot, tmp_path: Path) -> None:
    training = {"drop_peer": 0, "drop_all": 0, "wrong_peer": 1}
    objective = prepare(random_job(tmp_path, snapshot, settings={"k": 3}, training=training))
    first, _, _ = objective._draws([7] * 50, torch.Generator().manual_seed(0), 1.0)
    chance = Random(1)
    plans = [objective._planned(first, place, 7, chance) for place in range(50)]
    assert all(len({each.member for each in plan}) == len(plan) == 2 for plan in plans)
    assert all(sum(each.row != 7 for each in plan) == 1 for plan in plans)


def test_predictions_with_other_peers_are_compared_where_they_differ(snapshot: Snapshot, tmp_path: Path) -> None:
    training = {"drop_peer": 0, "drop_all": 0, "wrong_peer": 0}
    objective = prepare(random_job(tmp_path, snapshot, settings={"k": 2}, training=training))
    fill(objective)
    assert objective.loss(list(range(24)), step()).parts["consistency"] > 0
    all_active = prepare(random_job(tmp_path, snapshot, settings={"k": 3}, training=training))
    fill(all_active)
    assert "consistency" not in all_active.loss(list(range(24)), step()).parts


# Runs


class Interrupted(MotObjective):
    """Raises KeyboardInterrupt before a step."""

    stop_at = 5

    def loss(self, rows: Any, step: Step) -> Any:
        if step.number == self.stop_at:
            raise KeyboardInterrupt
        return super().loss(rows, step)


def test_a_resumed_run_ends_bitwise_as_an_uninterrupted_one(snapshot: Snapshot, tmp_path: Path) -> None:
    training = {"steps": 8, "validate_every": 4, "learning_rate": 0.01, "accumulate": 2}

    def run(folder: Path, objective_class: type[MotObjective] = MotObjective) -> tuple[dict[str, torch.Tensor], Any]:
        made = random_job(tmp_path, snapshot, settings={"k": 2}, training=training)
        objective = prepare(made)
        objective.__class__ = objective_class
        outcome = train(objective, 64, made.config.training, Checkpoint(folder))
        tensors = {name: p.detach() for group in objective.groups() for name, p in group.tensors.items()}
        return tensors, outcome

    whole, outcome = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", Interrupted)
    resumed, again = run(tmp_path / "parts")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert (again.before, again.after, again.best_step) == (outcome.before, outcome.after, outcome.best_step)


def test_members_are_bitwise_unchanged(snapshot: Snapshot, tmp_path: Path) -> None:
    objective = prepare(random_job(tmp_path, snapshot))
    before = weights_digest(objective)
    made = random_job(tmp_path, snapshot, training={"steps": 3, "validate_every": 3})
    train(objective, 64, made.config.training, Checkpoint(tmp_path / "checkpoint"))
    assert weights_digest(objective) == before
    for member in objective.members:
        assert not any(p.requires_grad for p in member._weights.loaded.model.parameters())


def weights_digest(objective: MotObjective) -> str:
    digest = hashlib.sha256()
    for member in objective.members:
        for name, tensor in sorted(member._weights.loaded.model.state_dict().items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_stored_states_are_not_computed_again(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(random_job(tmp_path, snapshot))
    monkeypatch.setattr("coe.latent.training.members.Member.states", lambda *_: pytest.fail("read again"))
    second = prepare(random_job(tmp_path, snapshot, training={"seed": 7}))
    assert torch.equal(first.train.losses, second.train.losses)
    reading = first.train.readings[1][3]
    assert torch.equal(first._stores[1].states(reading), second._stores[1].states(reading))


def test_states_beyond_the_range_of_fp16_are_kept_and_damaged_files_are_named(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = prepare(random_job(tmp_path, snapshot))
    member, reading = objective.members[0], objective.train.readings[0][0]
    store = StateStore(tmp_path / "states", member, "sha256:0", (1,))
    large = torch.full((1, len(reading.ids), 32), 1e6)
    logits = member.logits([reading])
    monkeypatch.setattr(type(member), "states", lambda *_: ([large], logits))
    store.measure([reading], lambda done, total: None)
    assert torch.equal(store.states(reading), large)
    next((tmp_path / "states").rglob("*.safetensors")).write_bytes(b"cut")
    with pytest.raises(EngineError, match="is damaged .* remove it, and start again"):
        store.states(reading)


def test_members_may_be_adapters_of_one_base(
    snapshot: Snapshot, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = Path(snapshot.experts["llama"].source)
    folders = {"llama": base, "lora": save_adapter(tmp_path_factory.mktemp("adapter") / "lora", base)}
    adapted = snapshot_of(folders, {"lora": "llama"})
    objective = prepare(random_job(tmp_path, adapted, ("lora", "llama")))
    assert objective.members[0]._weights is objective.members[1]._weights
    readings = [objective.train.readings[0][0]]
    with_adapter, bare = (member.logits(readings) for member in objective.members)
    alone = prepare(random_job(tmp_path, snapshot, ("llama", "gemma")))
    assert torch.equal(bare, alone.members[0].logits(readings))
    assert float((with_adapter - bare).abs().max()) > 0.1
    before = weights_digest(objective)
    for seed in range(3):
        objective.loss(list(range(8)), step(seed=seed)).total.backward()
    assert weights_digest(objective) == before
    outputs = [p for name, p in objective.interactions.named_parameters() if name.endswith("output")]
    assert len(outputs) == 4 and all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in outputs)


def test_an_artifact_chooses_and_answers_as_the_trained_tensors(snapshot: Snapshot, tmp_path: Path) -> None:
    made = random_job(tmp_path, snapshot, settings={"k": 2, "saved": "float32"})
    objective = prepare(made)
    fill(objective)
    artifact = objective.save(tmp_path / "artifact", "# card")
    composed, tensors = artifact.composed, artifact.tensors()
    members = list(composed.members)
    assert composed.architecture == "mot" and members == list(MEMBERS)
    read = MotInteractions.of_tensors(members, composed.settings, tensors)
    logits, _ = answered(objective, 1, "abc")
    objective.interactions = read
    assert torch.equal(answered(objective, 1, "abc")[0], logits)
    chooser = read_chooser(members, composed.settings, tensors, build_encoder("hashing:64"))
    order = objective._order(objective.valid)
    for place, row in enumerate(made.valid[:20]):
        chosen = chooser.choose(row.prompt)
        assert [chosen.primary, *chosen.peers] == [members[i] for i in order[place].tolist()]
    assert composed.settings["layers"] == {"llama": [1, 3], "gemma": [2, 3], "second": [1, 3]}
    assert composed.settings["primary"].keys() == {"router", "first", "best_single", "oracle"}


def test_deep_layers_are_read_by_every_interaction(snapshot: Snapshot, tmp_path: Path) -> None:
    objective = prepare(random_job(tmp_path, snapshot, settings={"layers": "deep", "depths": 2}))
    fill(objective)
    assert [store.layers for store in objective._stores] == [(3, 4), (4, 5), (3, 4)]
    objective.loss(list(range(8)), step()).total.backward()
    assert all(p.grad is not None for name, p in objective.interactions.named_parameters() if "project" in name)


# Refusals


@pytest.mark.parametrize("k", [4, 64])
def test_more_active_members_than_there_are_is_refused(snapshot: Snapshot, tmp_path: Path, k: int) -> None:
    with pytest.raises(ConfigError, match=rf"train.yaml:1: settings.k: .*active members, is {k}; it is 1 to 3"):
        MotTrainer.check(random_job(tmp_path, snapshot, settings={"k": k}))


def test_members_without_readable_states_are_refused(snapshot: Snapshot, tmp_path: Path) -> None:
    fake = ExpertSpec(name="fake", kind=Kind.MODEL, source="fake://echo")
    remote = ExpertSpec(name="remote", kind=Kind.REMOTE, source="https://host/v1", context_length=10)
    others = Snapshot(1, {**snapshot.experts, "fake": fake, "remote": remote})
    for name, error in (("fake", Unsupported), ("remote", ConfigError), ("gone", ConfigError)):
        with pytest.raises(error, match=name):
            MotTrainer.check(random_job(tmp_path, others, ("llama", name)))


def test_an_unknown_encoder_and_wrong_widths_are_refused(snapshot: Snapshot, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="settings.encoder: no encoder 'mini'"):
        MotTrainer.check(random_job(tmp_path, snapshot, settings={"encoder": "mini"}))
    with pytest.raises(ConfigError, match="settings.compare: .*'qualty'"):
        MotTrainer.check(random_job(tmp_path, snapshot, settings={"compare": ["qualty"]}))
    with pytest.raises(ConfigError, match="not a multiple of heads"):
        MotTrainer.check(random_job(tmp_path, snapshot, settings={"shared_width": 15}))
    with pytest.raises(ConfigError, match="depths is for layers 'deep'"):
        MotTrainer.check(random_job(tmp_path, snapshot, settings={"depths": 2}))


def test_a_member_with_too_few_layers_is_named(snapshot: Snapshot, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="settings.interactions: member 'llama': 6 interactions need"):
        MotTrainer.check(random_job(tmp_path, snapshot, settings={"interactions": 6}))


def test_rows_that_a_member_cannot_read_are_named(snapshot: Snapshot, tmp_path: Path) -> None:
    for row, error in (("the " * 600, ContextLengthExceeded), ("", Rejected)):
        rows = [*random_rows(3, 0), (row, "a") if row else ("the", "")]
        with pytest.raises(error, match=r"rows.jsonl:4: "):
            MotTrainer.prepare(job(tmp_path, snapshot, MEMBERS, rows, random_rows(4, 1)))


def test_the_letters_are_one_token_for_both_tokenizers(snapshot: Snapshot, tmp_path: Path) -> None:
    objective = prepare(random_job(tmp_path, snapshot))
    for member in objective.members:
        assert all(len(member.reading("the", letter).targets) == 2 for letter in LETTERS)
