"""Conversations: the right expert of the last turn, the constants of reading, a day of sessions, and the speed.

    python benchmarks/conversations.py accuracy    # with baselines, and conversations written by hand
    python benchmarks/conversations.py tune        # the constants of `routers.conversation.turns`, on train and valid
    python benchmarks/conversations.py sessions    # the price of switching on a simulated day
    python benchmarks/conversations.py speed       # decisions per second for 1, 3 and 6 turns
    COE_DATA_DIR=... python benchmarks/conversations.py single    # single turns of five tables stay as they are

The zoo's router reads conversations of the zoo's families (`examples/zoo/conversations`): half end with a follow-up,
half with a change of topic. Templates and words of `test` and `fresh` occur in no training row, and nothing was chosen
by them. Labels are right by construction.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are imported

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
from conversation_sessions import print_sessions

from coe.policy import Policy
from coe.routing import Routed, route
from examples.zoo.conversations.generate import Conversation, conversations
from examples.zoo.families import Split
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Estimate, Message, Query, Router
from routers.conversation import dependence, estimate, mix, read, training, turns
from routers.conversation.harness import user_words
from routers.decision import decide
from routers.encoders.build import CachedEncoder, HashingEncoder, build_encoder
from routers.factory import build
from routers.outcomes.table import OutcomeTable

_T = TypeVar("_T")
ZOO = Path(__file__).parent.parent / "examples" / "zoo"
TABLES = ("routerdc7", "mmlupro28", "llmrouter9", "routerbench3", "routellm2")
KINDS = ("follow-up", "topic change")
GRID: dict[str, tuple[float, ...]] = {
    "WORDS_SCALE": (0.5, 0.75, 1.0, 1.5, 2.0),
    "OOD_SCALE": (0, 2, 4, 6, 8, 12, 16),
    "OOD_NEUTRAL": (0.7, 0.8, 0.85, 0.9, 0.95),
}
N_FOLDS = 5
N_HALVES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("accuracy", "tune", "sessions", "speed", "single"))
    parser.add_argument("--splits", nargs="+", type=Split, default=[Split.TEST, Split.FRESH])
    parser.add_argument("--n", type=int, default=640, help="conversations of each split")
    options = parser.parse_args()
    if options.what == "accuracy":
        accuracy(options.splits, options.n)
    elif options.what == "tune":
        tune(options.n)
    elif options.what == "sessions":
        print_sessions()
    elif options.what == "speed":
        speed()
    else:
        single_turns()


def zoo_router(*, cached: bool = True) -> Router:
    """The demo's router, trained on the shipped outcomes."""
    encoder = build_encoder("minilm")
    prompts = [json.loads(line)["prompt"] for line in (ZOO / "ood.jsonl").read_text(encoding="utf-8").splitlines()]
    settings = {"ood_prompts": prompts, "general": "smollm2"}
    table = OutcomeTable.read(ZOO / "outcomes.parquet")
    trained = build("category", CachedEncoder(encoder), settings).fit(table)
    return trained if cached else type(trained).from_state(trained.state(), encoder)


def chosen(estimated: Estimate) -> list[str]:
    """The expert of each row."""
    return [(decision.experts or ("",))[0] for decision in decide(estimated)]


def users(query: Query) -> list[str]:
    """The texts of the user messages."""
    return [message.content for message in query.messages if message.role == "user"]


def assisted(query: Query) -> Query:
    """The query with the last answer in front of its last user turn."""
    answers = [message.content for message in query.messages if message.role == "assistant"]
    *before, last = query.messages
    return Query((*before, Message("user", f"{answers[-1]}\n\n{last.content}"))) if answers else query


METHODS: dict[str, Callable[[Router, Sequence[Query]], Estimate]] = {
    "last user turn": lambda router, queries: estimate(router, queries, "last"),
    "last user turn, without harness text": lambda router, queries: router.estimate(
        [Query.of(next((text for text in reversed(user_words(users(q))) if text), "")) for q in queries]
    ),
    "sticky: the expert of the first turn": lambda router, queries: router.estimate(
        [Query.of(users(q)[0]) for q in queries]
    ),
    "all user turns as one text": lambda router, queries: router.estimate(
        [Query.of("\n".join(filter(None, user_words(users(q))))) for q in queries]
    ),
    "all user turns as one text, the last first": lambda router, queries: router.estimate(
        [Query.of("\n".join(filter(None, reversed(user_words(users(q)))))) for q in queries]
    ),
    "the turn that weighs most by its words": lambda router, queries: router.estimate(
        [Query.of(turns.main_text(q.messages)) for q in queries]
    ),
    "turns mixed, words alone": lambda router, queries: _with({"OOD_SCALE": 0.0}, lambda: estimate(router, queries)),
    "turns mixed, out-of-distribution alone": lambda router, queries: _with(
        {"WORDS_SCALE": 0.0}, lambda: estimate(router, queries)
    ),
    "turns mixed, with the last answer": lambda router, queries: estimate(router, [assisted(q) for q in queries]),
    "reads: conversation": estimate,
}


def _with(values: dict[str, float], call: Callable[[], _T]) -> _T:
    """The result of a call under other constants of reading."""
    before = {name: getattr(turns, name) for name in values}
    try:
        for name, value in values.items():
            setattr(turns, name, value)
        return call()
    finally:
        for name, value in before.items():
            setattr(turns, name, value)


def accuracy(splits: Sequence[Split], n: int) -> None:
    """Each method's share of conversations whose last turn goes to the right expert."""
    router = zoo_router()
    sets = {str(split): conversations(split, n) for split in splits}
    columns = [(name, kind) for name in sets for kind in KINDS]
    print("| method |", " | ".join(f"{name}: {kind}" for name, kind in columns), "|")
    for label, method in METHODS.items():
        cells = []
        for found in sets.values():
            names = chosen(method(router, [Query(one.messages) for one in found]))
            cells += [f"{_share(found, names, kind):.1%}" for kind in KINDS]
        print("|", label, "|", " | ".join(cells), "|", flush=True)
    harness = [one for found in sets.values() for one in found if one.harness]
    names = chosen(estimate(router, [Query(one.messages) for one in harness]))
    print(f"with text of a harness ({len(harness)}):", " ".join(f"{k} {_share(harness, names, k):.1%}" for k in KINDS))
    by_hand(router)


def by_hand(router: Router) -> None:
    """Conversations written by hand: short, casual, some in German, French or Spanish.

    Those that are `seen` were read while the phrasings were written, the others were scored once.
    """
    rows = [json.loads(line) for line in (ZOO / "conversations" / "by_hand.jsonl").read_text("utf-8").splitlines()]
    for seen in (True, False):
        some = [row for row in rows if row["seen"] is seen]
        queries = [Query(tuple(Message(**message) for message in row["messages"])) for row in some]
        for label in ("last user turn", "sticky: the expert of the first turn", "reads: conversation"):
            names = chosen(METHODS[label](router, queries))
            right = [name == row["expert"] for name, row in zip(names, some, strict=True)]
            print(f"by hand, {'seen' if seen else 'not seen'}, {label}: {sum(right)} of {len(right)}")
        alone = [set(chosen(router.estimate([Query.of(text) for text in users(query)]))) for query in queries]
        hopeless = sum(row["expert"] not in names for row, names in zip(some, alone, strict=True))
        print(f"  of these, no turn alone goes to the right expert: {hopeless}")


def _share(found: Sequence[Conversation], names: Sequence[str], kind: str) -> float:
    return float(np.mean([name == one.expert for one, name in zip(found, names, strict=True) if one.kind == kind]))


@dataclass(frozen=True)
class Turned:
    """Conversations with the estimates of their turns."""

    found: list[Conversation]
    texts: list[list[str]]
    of_turns: Estimate

    @classmethod
    def of(cls, router: Router, found: list[Conversation]) -> Turned:
        texts = [[turn.text for turn in turns.turns_of(Query(one.messages))] for one in found]
        return cls(found, texts, router.estimate([Query.of(text) for text in itertools.chain(*texts)]))

    def right(self) -> list[bool]:
        """Whether the last turn of each goes to the right expert, under the current constants."""
        mixtures, start = [], 0
        for texts in self.texts:
            rows = slice(start, start := start + len(texts))
            p = turns.dependence(texts, None if self.of_turns.ood is None else self.of_turns.ood[rows])
            mixtures.append((rows, turns.prefix_weights(p)[-1]))
        names = chosen(mix(self.of_turns, mixtures))
        return [name == one.expert for name, one in zip(names, self.found, strict=True)]


def tune(n: int) -> None:
    """The constants with the best share on train and valid, and what that choice scores on folds left out.

    The classifier of turns is trained on half of the phrasings, three times: its phrasings resemble those of train, and
    the constants should fit turns that are new to it.
    """
    found = [*conversations(Split.TRAIN, n), *conversations(Split.VALID, n)]
    turned = Turned.of(zoo_router(), found)
    kinds = np.array([KINDS.index(one.kind) for one in found])
    folds = np.arange(len(found)) // 2 % N_FOLDS
    scored: dict[tuple[float, ...], Any] = {
        values: np.zeros(len(found)) for values in itertools.product(*GRID.values())
    }
    for seed in range(N_HALVES):
        arrays = training.train(share=0.5, seed=seed)
        half = arrays["weights"].astype(np.float32), float(arrays["bias"][0])
        with mock.patch.object(dependence, "_model", lambda half=half: half):
            odds = {text: dependence.log_odds(text) for texts in turned.texts for text in texts}
        with mock.patch.object(turns, "log_odds", odds.__getitem__):
            for values, right in scored.items():
                right += np.array(_with(dict(zip(GRID, values, strict=True)), turned.right)) / N_HALVES

    def best(rows: Any) -> tuple[float, ...]:
        """Highest mean of the two shares, then the highest of the lower one."""
        shares = {v: [right[rows & (kinds == k)].mean() for k in (0, 1)] for v, right in scored.items()}
        return max(shares, key=lambda values: (round(sum(shares[values]), 6), min(shares[values])))

    held_out = np.zeros(len(found))
    for fold in range(N_FOLDS):
        values = best(folds != fold)
        held_out[folds == fold] = scored[values][folds == fold]
        print(f"fold {fold}: {dict(zip(GRID, values, strict=True))}")
    values = best(folds >= 0)
    print(f"all: {dict(zip(GRID, values, strict=True))}, {_both(scored[values], kinds)}")
    print(f"folds left out: {_both(held_out, kinds)}")


def _both(right: Any, kinds: Any) -> str:
    return ", ".join(f"{kind} {right[kinds == k].mean():.1%}" for k, kind in enumerate(KINDS))


def speed() -> None:
    """Decisions per second, one request at a time and 32 at once; `last` and `conversation` interleaved."""
    router = zoo_router(cached=False)
    experts = router.estimate([Query.of("x")]).experts
    snapshot = Snapshot(1, {e: ExpertSpec(name=e, kind=Kind.MODEL, source="fake://echo") for e in experts})
    pool = [one for one in conversations(Split.TEST, 640) if one.n_turns >= 2]
    print("turns  batch  last/s  conversation/s  (medians of 9, interleaved)")
    for n_turns, batch in itertools.product((1, 3, 6), (1, 32)):
        queries = [_cut(one, n_turns) for one in pool if one.n_turns >= n_turns][:batch]
        seconds: dict[str, list[float]] = {"last": [], "conversation": []}
        for _ in range(9):
            for reads, times in seconds.items():
                policy = Policy("p", router, reads=reads)  # type: ignore[arg-type]
                before = time.perf_counter()
                outcomes = route(queries, policy, snapshot, {})
                times.append(time.perf_counter() - before)
                assert all(isinstance(outcome, Routed) for outcome in outcomes)
        rates = [len(queries) / statistics.median(times) for times in seconds.values()]
        print(f"{n_turns:5} {batch:6} {rates[0]:7.0f} {rates[1]:15.0f}", flush=True)


def _cut(one: Conversation, n_turns: int) -> Query:
    """The first user turns of a conversation."""
    at = [i for i, message in enumerate(one.messages) if message.role == "user"]
    return Query(one.messages[: at[n_turns - 1] + 1])


def single_turns() -> None:
    """Every prompt of the outcome tables reaches the router as it is, and its estimate comes back bit for bit."""
    folder = os.environ.get("COE_DATA_DIR")
    if not folder:
        sys.exit("COE_DATA_DIR is not set: it names the folder that holds outcomes/<set>.public.parquet")
    for name in TABLES:
        table = OutcomeTable.read(Path(folder) / "outcomes" / f"{name}.public.parquet")
        fold = np.arange(len(table)) % 5
        router = build("knn", HashingEncoder(256)).fit(table.select(fold != 0))
        held = table.select(fold == 0)
        before, after = router.estimate(held.queries()), read(router, held.queries()).estimate
        same = repr(before.quality.tobytes()) == repr(after.quality.tobytes())
        asked = [turns.turns_of(query)[0].text is query.text for query in table.queries()]
        scores = [held.scores[range(len(held)), e.quality.argmax(axis=1)].mean() for e in (before, after)]
        whole = f"{sum(asked):,} of {len(asked):,} prompts as they are"
        print(f"{name}: {whole}; estimates identical: {same}; score {scores[0]:.4f} and {scores[1]:.4f}", flush=True)


if __name__ == "__main__":
    main()
