"""The harness of latent compositions: plan, rows on equal terms, answers that are kept, results and tables."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from coe.compose import Aggregate, Chain, Latent, Single, Vote
from coe.config import load_config
from coe.errors import EngineError
from coe.latent.config import TRAINERS, read_train_file
from coe.latent.training.answer_rows import read_answer_rows
from coe.latent.training.loop import OnStep
from coe.latent.training.trainer import OnLoading, OnProgress
from coe.orchestrator import Orchestrator
from coe.types import Answer, Chunk, GenerateRequest, Usage
from examples.zoo.families import CODE_SKILLS, PARTS, TWO_SKILLS, Split
from examples.zoo.families.codes import words_of
from examples.zoo.fetch import BASES
from examples.zoo.latent import __main__ as command_module
from examples.zoo.latent import latent_runs
from examples.zoo.latent.__main__ import app
from examples.zoo.latent.asking import Answers, Scored, answer_all, flops_of, request
from examples.zoo.latent.benches import ALL_BENCHES, BENCHES, CODES_BENCH, TWO_SKILLS_BENCH, Bench
from examples.zoo.latent.clock import Clock, OutOfTime
from examples.zoo.latent.latent_runs import write_train_file
from examples.zoo.latent.methods import ABLATIONS, METHODS, Method, Trains
from examples.zoo.latent.plan import Run, plan
from examples.zoo.latent.real_sets import REAL_SETS
from examples.zoo.latent.report import interval, paired, report
from examples.zoo.latent.results import KEPT, Result, Training, keep, read_result, read_results, write_result
from examples.zoo.latent.service import adapter, composed, write_service
from examples.zoo.latent.text_rivals import Fitted, Rows, base_and_start, rows_of, with_answers
from examples.zoo.latent.timing import Times
from examples.zoo.latent.ways import way_of
from registry.documents import load_document
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot

SMALL = Bench("codes", CODES_BENCH.families, CODES_BENCH.members, 2, 6, {Split.VALID: 4, Split.TEST: 5})
runner = CliRunner()
MIXTURES = ("arrow", "phatgoose", "glider", "lora-mix")


def snapshot() -> Snapshot:
    base = ExpertSpec(name="smollm2", kind=Kind.MODEL, source="fake://echo", digest="sha256:1", parameters_active=100)
    codes = ExpertSpec(
        name="codes", kind=Kind.ADAPTER, base="smollm2", source="x", digest="sha256:2", parameters_active=110
    )
    return Snapshot(version=1, experts={"smollm2": base, "codes": codes})


class Experts:
    """`codes` says the expected gloss of the rows it knows; every answer counts 10 tokens in and 2 out."""

    def __init__(self) -> None:
        rows = [row for split in SMALL.rows for found in SMALL.scored(split).values() for row in found]
        self.gloss = {row.prompt: row.extras[PARTS][0] for row in [*rows, *SMALL.training(1)]}
        self.asked: list[tuple[str, str]] = []

    async def __call__(self, expert: str, asked: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        prompt = asked.messages[-1].content
        self.asked.append((expert, prompt))
        text = self.gloss[prompt] if expert == "codes" else "yes"
        yield Chunk(text, "stop", Usage(10, 2))


def test_every_bench_and_method_is_planned_in_the_order_of_its_worth() -> None:
    runs = plan()
    assert len({run.id for run in runs}) == len(runs)
    assert {run.bench.name for run in runs} == set(BENCHES)
    assert runs[0].bench is CODES_BENCH
    first = [run.method.name for run in runs if run.bench is CODES_BENCH and run.seed == 1]
    assert first == [name for name in METHODS if name not in MIXTURES]  # they mix two adapters or more
    assert [run.method.name for run in runs if run.bench.name == "bookings" and run.seed == 1] == list(METHODS)
    for run in runs:
        assert run.seed == 1 or run.method.trains is not Trains.NOTHING
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert {run.seed for run in runs} == {1, 2, 3}
    assert [run.id for run in plan(["codes"], ["direct", "vote"], [2, 3])] == [
        "codes/direct/2",
        "codes/vote/2",
        "codes/direct/3",
    ]


def test_methods_of_one_base_leave_out_benches_of_two() -> None:
    mixed = {run.method.name for run in plan(["arc_challenge"])}
    assert {"notes", "mot", "vote", "direct"} <= mixed
    assert not mixed & {"cache", "logit-mean", "token-gate", *MIXTURES}
    assert METHODS["lora-mix"].members(BENCHES["bookings"]) == ("fields", "dates")
    assert METHODS["notes"].members(BENCHES["bookings"]) == ("smollm2", "fields", "dates")


def test_the_bench_of_what_is_shipped_runs_when_it_is_named() -> None:
    assert set(ALL_BENCHES) - set(BENCHES) == {"two-skills"}
    assert not any(run.bench is TWO_SKILLS_BENCH for run in plan())
    named = [run.method.name for run in plan(["two-skills"], seeds=[1])]
    assert named == [name for name in METHODS if name != "knowing-lora"]  # no one peer knows all families
    assert [family.name for family in TWO_SKILLS_BENCH.families] == list(TWO_SKILLS)
    assert TWO_SKILLS_BENCH.peers_of("triage") == ("sentiment", "intent")
    assert CODES_BENCH.peers_of("code_sum") == CODES_BENCH.peers


@pytest.mark.parametrize("name", ["vote", "chain", "aggregate", "cache", "notes-prompt", "mot", "direct"])
def test_a_family_is_asked_of_the_peers_that_are_right_for_it(name: str) -> None:
    way = way_of(METHODS[name], TWO_SKILLS_BENCH)
    for family in TWO_SKILLS_BENCH.families:
        first, second = TWO_SKILLS[family.name].experts
        asked = {
            "vote": (("smollm2", first, second), Vote),
            "chain": ((first, second, "smollm2"), Chain),
            "aggregate": ((first, second), Aggregate),
            "cache": ((first, second), Latent),
            "notes-prompt": ((first, second), Latent),
            "mot": (("composed",), Single),  # its own router chooses among all members
            "direct": (("trained",), Single),
        }
        assert (way.of(family).experts, type(way.of(family).composition)) == asked[name]
        composition = way.of(family).composition
        assert not isinstance(composition, Latent) or composition.expert == "composed"


def test_rows_of_all_two_skill_families_name_their_peers(tmp_path: Path) -> None:
    bench = TWO_SKILLS_BENCH
    file = read_train_file(write_train_file(bench, METHODS["cache"], 1, rows_of(bench, 1), tmp_path))
    train = read_answer_rows(file.config.train, fewest=8)
    for row, shown, family in zip(train, bench.training(1), bench.families * bench.steps * bench.batch, strict=False):
        assert row.prompt == shown.prompt
        assert row.peers == TWO_SKILLS[family.name].experts
    valid = read_answer_rows(file.config.valid, fewest=4)
    assert [row.peers for row in valid] == [
        TWO_SKILLS[name].experts for name, rows in bench.scored(Split.VALID).items() for _ in rows
    ]
    mixed = read_train_file(write_train_file(bench, METHODS["phatgoose"], 1, rows_of(bench, 1), tmp_path / "mixed"))
    assert {row.member for row in read_answer_rows(mixed.config.train, fewest=8)} == set(bench.peers)


def test_ablations_are_latent_and_change_one_thing_on_the_codes() -> None:
    runs = plan(ablations=True)
    assert {(run.bench.name, run.seed) for run in runs} == {("codes", 1)}
    assert all(run.method.trains is Trains.LATENT for run in runs)
    assert [run.method.name for run in runs] == list(ABLATIONS)
    reference, *others = (run.method for run in runs)
    assert reference is METHODS["notes"]
    for method in others:
        changed = [
            getattr(method, name) != getattr(reference, name) for name in ("preset", "settings", "training", "peers")
        ]
        assert sum(changed) == 1, method.name


@pytest.mark.parametrize("name", [name for name in BENCHES if name not in REAL_SETS])
def test_all_methods_get_the_same_rows_and_no_scored_row_is_trained_on(name: str) -> None:
    bench = BENCHES[name]
    rows = bench.training(1)
    assert len(rows) == bench.steps * bench.batch
    assert rows == bench.training(1)
    assert rows != bench.training(2)
    assert rows == list(rows_of(bench, 1).train)
    trained = {row.prompt for row in rows}
    for split, n in bench.rows.items():
        for family, found in bench.scored(split).items():
            assert len({row.prompt for row in found}) == n
            assert not trained & {row.prompt for row in found}, (split, family)
    assert [row.prompt for row in rows_of(bench, 1).valid] == [
        row.prompt for found in bench.scored(Split.VALID).values() for row in found
    ]


def test_training_rows_of_the_codes_hold_no_word_of_the_test() -> None:
    text = " ".join(row.prompt for seed in (1, 2, 3) for row in CODES_BENCH.training(seed))
    assert all(word in text for word in words_of(Split.TRAIN))
    assert not any(word in text for word in words_of(Split.TEST))
    assert [family.name for family in CODES_BENCH.families] == list(CODE_SKILLS)


def test_who_is_called_by_each_method() -> None:
    def way(name: str) -> tuple[tuple[str, ...], type, tuple[str, ...]]:
        found = way_of(METHODS[name], CODES_BENCH, best="codes")
        named = found.composition.experts if isinstance(found.composition, Aggregate | Chain) else ()
        return found.experts, type(found.composition), named

    assert way("primary") == (("smollm2",), Single, ())
    assert way("best-single") == (("codes",), Single, ())
    assert way("routed") == ((), Single, ())
    assert way("vote") == (("smollm2", "codes"), Vote, ())
    assert way("chain") == (("codes", "smollm2"), Chain, ("codes", "smollm2"))
    assert way("aggregate") == (("codes",), Aggregate, ("smollm2",))
    assert way("aggregate-trained") == (("codes",), Aggregate, ("trained",))
    assert way("direct") == way("knowing-lora") == (("trained",), Single, ())
    for name in ("logit-mean", "token-gate", "notes", "notes-lora", "notes-prompt", "cache", "mot", "lora-mix"):
        assert way(name) == (("composed",), Single, ())


def test_an_adapter_is_on_the_primary_or_on_the_expert_that_knows() -> None:
    assert base_and_start(CODES_BENCH, METHODS["direct"]) == ("smollm2", None)
    base, start = base_and_start(CODES_BENCH, METHODS["knowing-lora"])
    assert base == "smollm2"
    assert start is not None
    assert start.name == "codes"
    base, start = base_and_start(BENCHES["retention"], METHODS["direct"])
    assert (base, start and start.name) == ("smollm2", "fields")
    assert base_and_start(BENCHES["arc_challenge"], METHODS["knowing-lora"]) == ("gemma3-270m", None)


async def test_the_trained_aggregator_sees_what_the_composition_shows() -> None:
    experts = Experts()
    orchestrator = Orchestrator(snapshot(), {}, ask=experts)
    rows = await with_answers(SMALL, rows_of(SMALL, 1), orchestrator, Clock(), lambda _: None)
    assert isinstance(rows, Rows)
    for shown, plain in zip([*rows.train, *rows.valid], [*SMALL.training(1), *rows_of(SMALL, 1).valid], strict=True):
        assert shown.prompt.startswith(f"{plain.prompt}\n\nExperts answered:\n1. {plain.extras[PARTS][0]}\n")
        assert (shown.answer, shown.extras) == (plain.answer, plain.extras)
    assert {expert for expert, _ in experts.asked} == {"codes"}


async def test_answers_are_kept_and_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    experts = Experts()
    orchestrator = Orchestrator(snapshot(), {}, ask=experts)
    way, file = way_of(METHODS["primary"], SMALL), tmp_path / "deep" / "answers.jsonl"
    ticks = iter(range(100))
    clock = Clock(3, now=lambda: next(ticks))
    with pytest.raises(OutOfTime):
        await answer_all(SMALL, SMALL.rows, way, orchestrator, Answers(file), clock)
    half = len(experts.asked)
    assert 0 < half < 27
    with file.open("a") as out:
        out.write('{"row": ["test", "code_or')
    answers, lines = Answers(file), list[str]()
    await answer_all(SMALL, SMALL.rows, way, orchestrator, answers, Clock(), lines.append)
    assert len(experts.asked) == 27
    assert len(lines) == 6 - half // 4
    again = Answers(file)
    await answer_all(SMALL, SMALL.rows, way, orchestrator, again, Clock())
    assert len(experts.asked) == 27
    for split, n in SMALL.rows.items():
        for name in CODE_SKILLS:
            assert again.of(split, name) == answers.of(split, name)
            assert len(again.of(split, name)) == n
    yes = [float(row.answer == "yes") for row in SMALL.scored(Split.TEST)["code_order"]]
    assert [scored.score for scored in again.of(Split.TEST, "code_order")] == yes
    assert again.of(Split.TEST, "code_sum")[0] == Scored("yes", 0.0, 10, 2, 2 * 100 * 12)


async def test_tokens_and_operations_are_those_of_all_experts() -> None:
    orchestrator = Orchestrator(snapshot(), {}, ask=Experts())
    row, family = SMALL.scored(Split.TEST)["code_word"][0], SMALL.families[0]
    answers = {}
    for name in ("primary", "vote", "best-single"):
        reply = way_of(METHODS[name], SMALL, best="codes").reply(request(row, family), orchestrator)
        await reply.text()
        assert isinstance(reply.answer, Answer)
        answers[name] = flops_of(reply, orchestrator.snapshot), reply.answer.usage.prompt_tokens
    assert answers == {"primary": (2400, 10), "best-single": (2640, 10), "vote": (5040, 20)}


def test_a_run_s_experts_stand_beside_those_of_the_zoo(tmp_path: Path) -> None:
    assert len(load_config(write_service(tmp_path / "bookings", BENCHES["bookings"].members)).experts) == 1
    file = write_service(tmp_path, CODES_BENCH.members, adapter("smollm2", tmp_path / "adapter"))
    document = yaml.safe_load(file.read_text())
    assert [Path(name).name for name in document["experts"]] == ["experts.yaml", "latent_experts.yaml", "experts.yaml"]
    (entry,) = load_document(tmp_path / "experts.yaml").value["experts"]
    assert ExpertSpec(**entry).base == "smollm2"
    spec = ExpertSpec(**composed("notes", CODES_BENCH.members, tmp_path))
    assert (spec.members, spec.is_staged) == (("smollm2", "codes"), True)
    mean = ExpertSpec(**composed("logits", CODES_BENCH.members, None, METHODS["logit-mean"].settings))
    assert (mean.source, mean.settings) == ("", {"mode": "mean"})


@pytest.mark.parametrize(
    "method",
    [method for method in {**METHODS, **ABLATIONS}.values() if method.trains is Trains.LATENT],
    ids=lambda method: method.name,
)
def test_the_file_of_a_latent_training_is_one_that_coe_reads(method: Method, tmp_path: Path) -> None:
    assert method.preset in TRAINERS
    bench = next(bench for bench in BENCHES.values() if method.suits(bench))
    file = read_train_file(write_train_file(bench, method, 3, rows_of(bench, 3), tmp_path))
    assert file.config.members == method.members(bench)
    assert (file.config.training.steps, file.config.training.batch) == (bench.steps, bench.batch)
    assert (file.config.training.accumulate, file.config.training.seed) == (1, 3)
    rows = read_answer_rows(file.config.train, fewest=8)
    assert len(rows) == bench.steps * bench.batch
    names = {
        entry["name"]
        for path in load_config(file.config.config).experts
        for entry in load_document(path).value["experts"]
    }
    assert set(method.members(bench)) <= names


def test_a_latent_training_that_runs_out_of_time_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def train(file: object, *, on_progress: OnProgress, on_step: OnStep, on_loading: OnLoading) -> object:
        calls.append(file)
        on_loading("codes")
        on_progress("notes", 5, 5)
        on_step(len(calls), {"valid_loss": 0.5})
        return SimpleNamespace(
            artifact=SimpleNamespace(path=tmp_path / "artifact"),
            outcome=SimpleNamespace(seconds=4.0, after=SimpleNamespace(loss=0.5)),
            n_parameters=7,
        )

    monkeypatch.setattr(latent_runs, "train_composition", train)
    lines: list[str] = []

    def fit(clock: Clock) -> Fitted:
        return latent_runs.fit(SMALL, METHODS["notes"], 1, rows_of(SMALL, 1), tmp_path, clock, lines.append)

    ticks = iter([0.0, 1.0, 3.0, 3.0])
    with pytest.raises(OutOfTime):
        fit(Clock(2, now=lambda: next(ticks)))
    assert lines == ["loading codes", "notes: 5", "step 1 of 2, validation loss 0.500"]
    assert fit(Clock()) == Fitted(tmp_path / "artifact", 4.0, 7, 0.5)


def result(method: str, seed: int, right: list[float], fresh: list[float] | None = None) -> Result:
    scores = {"test": {"code_order": right}} | ({} if fresh is None else {"fresh": {"code_order": fresh}})
    training = None if METHODS[method].trains is Trains.NOTHING else Training(90.0, 460_800, 0.25)
    return Result("codes", method, seed, scores, 64.0, 3.0, 1.8e10, 0.5, training)


def test_a_result_is_written_whole_and_read_back(tmp_path: Path) -> None:
    run = Run(CODES_BENCH, METHODS["direct"], 1)
    assert read_result(tmp_path / run.id) is None
    (tmp_path / run.id).mkdir(parents=True)
    made = result("direct", 1, [1.0, 0.0], [1.0, 1.0])
    write_result(tmp_path / run.id, made)
    assert read_result(tmp_path / run.id) == made
    assert read_results(tmp_path, plan(["codes"])) == [made]
    document = json.loads((tmp_path / run.id / "result.json").read_text())
    assert document["accuracy"] == {"test": {"code_order": 0.5}, "fresh": {"code_order": 1.0}}
    assert made.accuracy(Split.TEST) == 0.5
    assert made.accuracy(Split.VALID) is None
    (tmp_path / run.id / "result.json").write_text(json.dumps(document | {"format": 0}))
    with pytest.raises(ValueError, match="another version"):
        read_result(tmp_path / run.id)


def test_results_are_kept_in_the_project_and_reported_from_there(tmp_path: Path) -> None:
    runs, kept = plan(["codes"], ["direct"]), tmp_path / "kept"
    (tmp_path / runs[1].id).mkdir(parents=True)
    write_result(tmp_path / runs[1].id, made := result("direct", 2, [1.0, 0.0]))
    assert keep(tmp_path, runs, kept) == [runs[1]]
    assert read_results(kept, runs) == [made]


def test_the_kept_results_are_of_known_runs_and_complete() -> None:
    files = sorted(KEPT.glob("*/*/*/result.json"))
    runs = [run for bench in ALL_BENCHES for run in plan([bench])]
    found = read_results(KEPT, runs)
    assert len(found) == len(files) > 0
    for each in found:
        rows = ALL_BENCHES[each.bench].rows
        assert {split: {len(scores) for scores in by.values()} for split, by in each.scores.items()} == {
            split: {n} for split, n in rows.items()
        }


def test_a_table_has_means_over_seeds_and_paired_differences() -> None:
    results = [
        result("vote", 1, [0.0, 0.0, 1.0, 0.0], [0.0] * 4),
        result("direct", 1, [1.0, 0.0, 1.0, 0.0], [0.0] * 4),
        result("direct", 2, [1.0, 1.0, 1.0, 0.0], [1.0] * 4),
        result("aggregate-trained", 1, [1.0] * 4, [1.0] * 4),
        result("aggregate-trained", 2, [1.0] * 4, [1.0] * 4),
    ]
    text = report(results)
    assert text.startswith("### codes\n\nMembers smollm2, codes; 120 steps of 8 rows; scored rows: 4 test, 4 fresh")
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in text.splitlines() if "|" in line
    }
    assert rows["direct"][1:4] == ["2", "62.5", "50.0"]
    assert rows["direct"][4:] == ["0.250", "64", "3.0", "18.0", "0.50", "0.46M", "1.5"]
    assert rows["vote"][4] == ""
    assert list(rows)[2:] == ["vote", "aggregate-trained", "direct"]
    assert "- direct less aggregate-trained: test -37.5 (" in text
    assert "- vote less aggregate-trained: test -75.0 (" in text
    assert "less direct" in report(results, against="direct")


def test_differences_are_paired_by_row_and_seed_and_both_are_resampled() -> None:
    ours = [result("direct", seed, [1.0, 0.0] * 20) for seed in (1, 2)]
    theirs = [result("knowing-lora", seed, [0.0, 1.0] * 20) for seed in (1, 2, 3)]
    pairs = paired(ours, theirs, Split.TEST)
    assert pairs.shape == (2, 40)
    assert set(pairs.flatten()) == {1.0, -1.0}
    low, high = interval(pairs)
    assert -0.45 < low < -0.15 < 0.15 < high < 0.45
    assert interval(np.ones((3, 10))) == (1.0, 1.0)
    seeds_differ = np.stack([np.ones(100), -np.ones(100)])
    assert interval(seeds_differ) == (-1.0, 1.0)
    alone = [result("vote", 1, [0.0] * 40)]
    assert paired(ours, alone, Split.TEST).shape == paired(alone, ours, Split.TEST).shape == (2, 40)
    with pytest.raises(ValueError, match="no seed in common"):
        paired(ours, [result("knowing-lora", seed, [0.0] * 40) for seed in (3, 4)], Split.TEST)


def test_the_command_lists_reports_and_refuses_unknown_names(tmp_path: Path) -> None:
    made = result("direct", 1, [1.0, 0.0], [1.0, 1.0])
    (tmp_path / "codes/direct/1").mkdir(parents=True)
    write_result(tmp_path / "codes/direct/1", made)
    listed = runner.invoke(app, ["list", "--folder", str(tmp_path), "--bench", "codes", "--seed", "1"])
    assert "done  codes/direct/1" in listed.output.splitlines()
    assert "      codes/notes/1" in listed.output.splitlines()
    shown = runner.invoke(app, ["report", "--folder", str(tmp_path)])
    assert "| direct | 1 | 50.0 | 100.0 |" in shown.output
    empty = runner.invoke(app, ["report", "--folder", str(tmp_path), "--method", "vote"])
    assert (empty.exit_code, "no run is done yet" in empty.output) == (1, True)
    refused = runner.invoke(app, ["run", "--bench", "code"])
    assert refused.exit_code == 2
    assert "no bench code; there are: codes" in " ".join(refused.output.replace("│", " ").split())


@pytest.mark.parametrize("command", ["run", "time"])
def test_the_command_fetches_the_bases_before_a_run_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    done = list[str]()
    made = result("direct", 1, [1.0, 0.0], [1.0, 1.0])

    def execute(run: Run, folder: Path, clock: Clock, report: object) -> Result:
        done.append(run.id)
        return made

    async def times_of(runs: list[Run], folder: Path, n: int, report: object) -> dict[str, Times]:
        done.extend(run.id for run in runs)
        return {run.method.name: Times([1.0], [1.0]) for run in runs}

    def fetch(name: str, *, progress: Callable[[str], None]) -> None:
        progress(f"{name}: downloading")
        done.append(name)

    for name, substitute in (("execute", execute), ("times_of", times_of), ("fetch", fetch)):
        monkeypatch.setattr(command_module, name, substitute)
    if command == "time":
        (tmp_path / "codes/direct/1").mkdir(parents=True)
        write_result(tmp_path / "codes/direct/1", made)
    chosen = ["--bench", "codes", "--method", "direct", "--seed", "1", "--folder", str(tmp_path)]
    ran = runner.invoke(app, [command, *chosen])
    assert (ran.exit_code, done) == (0, [*BASES, "codes/direct/1"])
    assert "  smollm2: downloading\n" in ran.stderr

    def offline(name: str, *, progress: Callable[[str], None]) -> None:
        raise EngineError(f"{name} cannot be downloaded: check the network")

    monkeypatch.setattr(command_module, "fetch", offline)
    failed = runner.invoke(app, [command, *chosen])
    assert (failed.exit_code, failed.stderr) == (1, "smollm2 cannot be downloaded: check the network\n")


def test_runs_that_are_done_need_no_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_module, "fetch", lambda *_, **__: pytest.fail("fetched"))
    (tmp_path / "codes/direct/1").mkdir(parents=True)
    write_result(tmp_path / "codes/direct/1", result("direct", 1, [1.0, 0.0], [1.0, 1.0]))
    ran = runner.invoke(
        app, ["run", "--bench", "codes", "--method", "direct", "--seed", "1", "--folder", str(tmp_path)]
    )
    assert (ran.exit_code, ran.output) == (0, "")


def test_the_command_writes_a_training_that_coe_reads(tmp_path: Path) -> None:
    made = runner.invoke(app, ["write", "bookings/cache/1", "--out", str(tmp_path / "bookings")])
    assert (made.exit_code, made.output) == (0, f"coe latent train --config {tmp_path}/bookings/train.yaml\n")
    file = read_train_file(tmp_path / "bookings/train.yaml")
    assert (file.config.preset, file.config.members) == ("cache", ("smollm2", "fields", "dates"))
    rows = read_answer_rows(tmp_path / "bookings/train.jsonl", fewest=8)
    assert [row.prompt for row in rows] == [row.prompt for row in BENCHES["bookings"].training(1)]
    refused = runner.invoke(app, ["write", "bookings/direct/1", "--out", str(tmp_path / "direct")])
    assert (refused.exit_code, "direct trains no composition" in refused.output) == (1, True)
