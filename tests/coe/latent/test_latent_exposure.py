"""Which notes a row is trained with: shares of missing and wrong peers, and whose notes those are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

import pytest

from coe.latent.config import TrainingConfig
from coe.latent.training.exposure import Source, exposure

PEERS = ("a", "b", "c")
ALIKE = {"a": ["b"], "b": ["a"], "c": []}
N = 4000


def drawn(
    row: int = 3, n_rows: int = 10, alike: Mapping[str, Sequence[str]] = ALIKE, **shares: float
) -> list[dict[str, Source]]:
    config = TrainingConfig(**{"drop_peer": 0, "drop_all": 0, "wrong_peer": 0, **shares})  # type: ignore[arg-type]
    return [exposure(row, n_rows, PEERS, alike, config, Random(f"{number}")) for number in range(N)]


def share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def test_without_drawing_each_peer_leaves_its_own_notes() -> None:
    assert set(map(str, drawn())) == {str({peer: Source(peer, 3) for peer in PEERS})}


def test_peers_are_missing_with_their_probabilities() -> None:
    found = drawn(drop_peer=0.15, drop_all=0.05)
    assert share([not each for each in found]) == pytest.approx(0.05 + 0.95 * 0.15**3, abs=0.012)
    for peer in PEERS:
        assert share([peer not in each for each in found]) == pytest.approx(0.05 + 0.95 * 0.15, abs=0.02)


def test_one_peer_is_wrong_with_its_probability() -> None:
    found = drawn(wrong_peer=0.15)
    wrong = [[peer for peer in PEERS if each[peer] != Source(peer, 3)] for each in found]
    assert {len(peers) for peers in wrong} == {0, 1}
    assert share([len(peers) == 1 for peers in wrong]) == pytest.approx(0.15, abs=0.02)


def test_wrong_notes_are_of_another_row_or_of_a_member_of_the_same_width() -> None:
    sources = [(peer, each[peer]) for each in drawn(wrong_peer=1) for peer in PEERS if each[peer] != Source(peer, 3)]
    assert len(sources) == N
    of_a = [source for peer, source in sources if peer == "a"]
    assert share([source == Source("b", 3) for source in of_a]) == pytest.approx(0.5, abs=0.05)
    assert {source.row for source in of_a if source.peer == "a"} == {*range(10)} - {3}
    assert all(source.peer == "c" and source.row != 3 for peer, source in sources if peer == "c")


def test_a_single_row_has_other_members_only() -> None:
    found = drawn(row=0, n_rows=1, wrong_peer=1)
    assert all(each["c"] == Source("c", 0) for each in found)
    assert {each["a"] for each in found} == {Source("a", 0), Source("b", 0)}


def test_equal_chances_draw_equally() -> None:
    config = TrainingConfig()
    one, two = ([exposure(row, 9, PEERS, ALIKE, config, Random(row)) for row in range(9)] for _ in range(2))
    assert one == two
