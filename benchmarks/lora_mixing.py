"""Accuracy and speed of LoRA adapters mixed by token, on the zoo: its families, and queries that need two skills.

    python benchmarks/lora_mixing.py [--gate arrow] [--artifact trained=FOLDER ...] [--rows 20] [--two 40]
        [--split test] [--timed] [--work DIR] [--json PATH]

The seven adapters of SmolLM2 answer the same held-out rows

    base               none of them
    one adapter        the single one with the best accuracy over all rows
    router             the one that the demo's router (`category`, from the zoo's outcomes) chooses for the query
    oracle             the adapter of the row's family; of a two-skill query, the better of its two adapters
    equal              all adapters with weight 1/7, by the gate `fixed`
    arrow              training-free, top 2
    NAME               a composition that `coe latent train` wrote (preset lora-mix), one for each --artifact

with greedy answers and the graders of the families. Differences to the router have paired bootstrap intervals (95%).
`--timed` compares tokens per second of CPU time with those of one adapter, at batches of 1 and 8. Answers are kept in
the work folder by adapter or gate and row, so an interrupted run resumes; --write-rows writes rows to train on.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from coe.engines.base import Adapter, Expert, Member
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.sampling import SamplingOptions
from coe.types import GenerateRequest
from examples.zoo.families import FAMILIES, TWO_SKILLS, Family, Row, Split
from examples.zoo.fetch import fetch
from examples.zoo.outcomes import SHIPPED
from examples.zoo.plan import SCORE_SEED, STEPS
from examples.zoo.scoring import grades
from registry.composed import read_composed
from registry.profiles import Measure
from registry.spec import ExpertSpec, Kind
from registry.storage import atomic_path
from registry.strengths import wilson
from routers.base import Message, Query
from routers.encoders.build import CachedEncoder, build_encoder
from routers.evaluation.metrics import paired_bootstrap
from routers.factory import build
from routers.outcomes.table import OutcomeTable

MEMBERS: Final = tuple(name for name, (base, _) in STEPS.items() if base == "smollm2")
ADAPTERS: Final = Path(__file__).parents[1] / "examples" / "zoo" / "adapters"
ROUTER: Final = "router"
AT_ONCE: Final = 16
TRAIN_SEED: Final = 77


@dataclass(frozen=True)
class Asked:
    """A held-out row, and the adapters that know a part of it."""

    family: Family
    row: Row
    experts: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.family.name}: {self.row.prompt}"

    @property
    def is_two(self) -> bool:
        return len(self.experts) > 1


def held_out(split: Split, n_rows: int, n_two: int) -> list[Asked]:
    singles = [
        Asked(FAMILIES[m], row, (m,)) for m in MEMBERS for row in FAMILIES[m].rows(split, n_rows, seed=SCORE_SEED)
    ]
    pairs = [
        Asked(pair.family, row, pair.experts)
        for pair in TWO_SKILLS.values()
        for row in pair.family.rows(split, n_two, seed=SCORE_SEED)
    ]
    return [*singles, *pairs]


class Answers:
    """Answers of experts to rows, kept in a file for each expert."""

    def __init__(self, work: Path, base: HFExpert, artifacts: Mapping[str, Path]) -> None:
        self._work, self._base, self._artifacts = work, base, artifacts
        self._adapters = {name: Adapter(_spec(name), ADAPTERS / name) for name in MEMBERS}
        work.mkdir(parents=True, exist_ok=True)

    def expert(self, name: str) -> tuple[Expert, Adapter | None]:
        """The base, an adapter, or a mixture."""
        if name in self._adapters or name == "base":
            return self._base, self._adapters.get(name)
        if name in self._artifacts:
            found = read_composed(self._artifacts[name])
            return self._mixture(tuple(found.members), found.settings, self._artifacts[name]), None
        settings: dict[str, Any] = {"gate": "arrow", "top_k": 2}
        if name == "equal":
            settings = {"gate": "fixed", "weights": dict.fromkeys(MEMBERS, 1 / len(MEMBERS))}
        return self._mixture(MEMBERS, settings, None), None

    def _mixture(self, members: Sequence[str], settings: Mapping[str, Any], path: Path | None) -> Expert:
        spec = ExpertSpec(
            name="mix",
            kind=Kind.COMPOSED,
            architecture="lora-mix",
            members=tuple(members),
            settings=settings,
            source=str(path or ""),
        )
        leased = {name: Member(self._base, self._adapters[name]) for name in members}
        return HFEngine(device="cpu").compose(spec, leased, path)

    def _content(self, name: str) -> str:
        """What tells artifacts of one name apart."""
        if name not in self._artifacts:
            return ""
        files = [self._artifacts[name] / each for each in ("composed.json", "weights.safetensors")]
        return "-" + hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]

    async def of(self, name: str, asked: Sequence[Asked]) -> dict[str, str]:
        """The answers of one expert, by row; new ones are computed."""
        file = self._work / f"{name}{self._content(name)}.json"
        known: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
        missing = [each for each in asked if each.key not in known]
        expert, adapter = self.expert(name) if missing else (None, None)
        for start in range(0, len(missing), AT_ONCE):
            some = missing[start : start + AT_ONCE]
            assert expert is not None
            texts = await asyncio.gather(*(_answer(expert, adapter, each) for each in some))
            known |= {each.key: text for each, text in zip(some, texts, strict=True)}
            with atomic_path(file) as staged:
                staged.write_text(json.dumps(known))
            print(f"{name}: {start + len(some)}/{len(missing)}", file=sys.stderr)
        return {each.key: known[each.key] for each in asked}


def _spec(name: str) -> ExpertSpec:
    return ExpertSpec(name=name, kind=Kind.ADAPTER, base="smollm2", source=str(ADAPTERS / name))


async def _answer(expert: Expert, adapter: Adapter | None, asked: Asked) -> str:
    messages = (Message("user", asked.row.prompt),)
    request = GenerateRequest(messages=messages, max_tokens=asked.family.max_tokens)
    return "".join([chunk.text async for chunk in expert.generate(request, adapter)])


def routed(asked: Sequence[Asked]) -> list[str]:
    """The adapter of highest expected quality for each query, by the demo's kind of router."""
    router = build("category", CachedEncoder(build_encoder("minilm")), {}).fit(OutcomeTable.read(SHIPPED))
    estimate = router.estimate([Query.of(each.row.prompt) for each in asked])
    columns = [estimate.experts.index(name) for name in MEMBERS]
    return [MEMBERS[int(best)] for best in estimate.quality[:, columns].argmax(axis=1)]


async def scores(
    answers: Answers, asked: Sequence[Asked], gates: Sequence[str], *, every: bool
) -> dict[str, list[float]]:
    """Method -> the score of each row; `every` lets each single adapter answer every row."""
    by_gate = {gate: _graded(asked, await answers.of(gate, asked)) for gate in gates}
    chosen = routed(asked)
    graded: dict[str, dict[str, float]] = {}
    for member in MEMBERS:
        mine = [each for each, to in zip(asked, chosen, strict=True) if every or member in (to, *each.experts)]
        keys = [each.key for each in mine]
        graded[member] = dict(zip(keys, _graded(mine, await answers.of(member, mine)), strict=True))
    found: dict[str, list[float]] = {"base": _graded(asked, await answers.of("base", asked))}
    if every:
        singles = {member: [graded[member][each.key] for each in asked] for member in MEMBERS}
        best = max(MEMBERS, key=lambda member: sum(singles[member]))
        found[f"one adapter ({best})"] = singles[best]
    found[ROUTER] = [graded[to][each.key] for each, to in zip(asked, chosen, strict=True)]
    found["oracle"] = [max(graded[member][each.key] for member in each.experts) for each in asked]
    return found | by_gate


def _graded(asked: Sequence[Asked], texts: Mapping[str, str]) -> list[float]:
    return [grades(each.family, [each.row], [texts[each.key]])[0] for each in asked]


def table(asked: Sequence[Asked], found: Mapping[str, Sequence[float]]) -> tuple[list[str], dict[str, Any]]:
    """The lines of the table, and the figures."""
    families = list(dict.fromkeys(each.family.name for each in asked))
    two = np.array([each.is_two for each in asked])
    lines = [f"| method | one skill | two skills | to the router, two skills | {' | '.join(families)} |"]
    lines.append("|---" * (4 + len(families)) + "|")
    figures = {}
    for name, values in found.items():
        score, router = np.array(values), np.array(found[ROUTER])
        by_family = {f: float(score[[each.family.name == f for each in asked]].mean()) for f in families}
        low, high = paired_bootstrap(score[two], router[two])
        gain = float((score - router)[two].mean())
        figures[name] = {
            "one_skill": _share(score[~two]),
            "two_skills": _share(score[two]),
            "to_router": [gain, float(low), float(high)],
            "by_family": by_family,
        }
        cells = [f"{100 * value:.0f}" for value in by_family.values()]
        parts = [_shown(score[~two]), _shown(score[two]), f"{100 * gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"]
        lines.append(f"| {name} | {' | '.join([*parts, *cells])} |")
    return lines, figures


def _share(score: Any) -> list[float]:
    low, high = wilson(Measure(len(score), float(score.mean())))
    return [float(score.mean()), low, high]


def _shown(score: Any) -> str:
    share, low, high = _share(score)
    return f"{100 * share:.1f} ({100 * low:.0f}-{100 * high:.0f})"


async def speeds(answers: Answers, gates: Sequence[str], repeats: int = 3) -> dict[str, Any]:
    """Tokens per second of CPU time, best of several turns, at batches of 1 and 8."""
    names = ["base", "fields", *gates]
    experts = {name: answers.expert(name) for name in names}
    found: dict[str, Any] = {name: {} for name in names}
    for n_rows, n_tokens in ((1, 48), (8, 32)):
        for repeat in range(repeats + 1):
            for name, (expert, adapter) in experts.items():
                rate = await _rate(expert, adapter, n_rows, n_tokens if repeat else 4)
                if repeat:
                    found[name][n_rows] = max(rate, found[name].get(n_rows, 0.0))
    return found


async def _rate(expert: Expert, adapter: Adapter | None, n_rows: int, n_tokens: int) -> float:
    async def one(number: int) -> None:
        prompt = f"Number {number}: " + "the history of a town where people live and work by the sea. " * 2
        options = SamplingOptions(ignore_eos=True)
        request = GenerateRequest(prompt=prompt, max_tokens=n_tokens, sampling=options)
        async for _ in expert.generate(request, adapter):
            pass

    began = time.process_time()
    await asyncio.gather(*(one(number) for number in range(n_rows)))
    return n_rows * n_tokens / (time.process_time() - began)


def write_rows(folder: Path) -> None:
    """Rows to train gates on: of each adapter's family (`single`), of two skills (`two`), and both (`both`)."""

    def single(split: Split, n: int) -> list[dict[str, str]]:
        return [
            _line(f"{m}-{i}", row, m)
            for m in MEMBERS
            for i, row in enumerate(FAMILIES[m].rows(split, n, seed=TRAIN_SEED))
        ]

    def two(split: Split, n: int) -> list[dict[str, str]]:
        return [
            _line(f"{name}-{i}", row)
            for name, pair in TWO_SKILLS.items()
            for i, row in enumerate(pair.family.rows(split, n, seed=TRAIN_SEED))
        ]

    folder.mkdir(parents=True, exist_ok=True)
    for part, split, (n_single, n_two) in (("train", Split.TRAIN, (160, 320)), ("valid", Split.VALID, (8, 20))):
        one, both = single(split, n_single), two(split, n_two)
        mixed = single(split, n_single // 2) + two(split, n_two * 3 // 4)
        for name, rows in (("single", one), ("two", both), ("both", mixed)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}_{part}.jsonl").write_text(text, encoding="utf-8")


def _line(name: str, row: Row, member: str = "") -> dict[str, str]:
    return {"id": name, "prompt": row.prompt, "answer": row.target} | ({"member": member} if member else {})


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    base = fetch("smollm2")
    engine = HFEngine(device="cpu", dtype=args.dtype, threads=1)
    model = await engine.load(ExpertSpec(name="smollm2", kind=Kind.MODEL, source=str(base)), base)
    assert isinstance(model, HFExpert)
    artifacts = dict(each.split("=", 1) for each in args.artifact)
    answers = Answers(args.work / args.dtype, model, {name: Path(path) for name, path in artifacts.items()})
    asked = held_out(Split(args.split), args.rows, args.two)
    gates = [*args.gate, *artifacts]
    found = await scores(answers, asked, gates, every=args.every)
    lines, figures = table(asked, found)
    print("\n".join(lines))
    document = {"split": args.split, "rows": args.rows, "two": args.two, "dtype": args.dtype, "methods": figures}
    if args.timed:
        document["tokens_per_s"] = rates = await speeds(answers, gates)
        for name, by_rows in rates.items():
            shown = ", ".join(f"{n} rows {r:.1f} ({r / rates['fields'][n]:.2f}x)" for n, r in by_rows.items())
            print(f"{name}: tokens/s of CPU time beside one adapter's: {shown}")
    await engine.unload(model)
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gate", nargs="*", default=["equal", "arrow"], choices=["equal", "arrow"])
    parser.add_argument("--artifact", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--rows", type=int, default=20, help="rows of each of the seven families")
    parser.add_argument("--two", type=int, default=40, help="rows of each of the three two-skill families")
    parser.add_argument("--split", default="test", choices=[split.value for split in Split])
    parser.add_argument("--every", action="store_true", help="each adapter answers every row, for the best single one")
    parser.add_argument("--timed", action="store_true")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "coe" / "lora-mixing")
    parser.add_argument("--write-rows", type=Path, metavar="DIR", help="write rows to train on, and end")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.write_rows is not None:
        write_rows(args.write_rows)
        return
    document = asyncio.run(measure(args))
    if args.json is not None:
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
