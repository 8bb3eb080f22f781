"""Which host takes which shift: nobody waits while there is work, and each shift is taken once."""

import random

import pytest

from coe.batch.turns import Turns


def test_one_host_takes_all_in_order_and_knows_the_next_one() -> None:
    turns = Turns(3, hosts=1)
    assert [turns.take(turn, "a") for turn in range(3)] == [(0, 1), (1, 2), (2, None)]


def test_hosts_keep_back_only_what_the_others_do_not_need_now() -> None:
    turns = Turns(5, hosts=2)
    assert turns.take(0, "a") == (0, 1)
    assert turns.take(1, "b") == (2, 3)
    assert turns.take(2, "b") == (3, None)  # what is left is for who is free first
    assert turns.take(3, "b") == (4, None)
    assert turns.take(4, "b") == (1, None)  # `a` did not come to it


def test_with_as_many_hosts_as_shifts_each_begins_at_once() -> None:
    turns = Turns(2, hosts=2)
    assert [turns.take(0, "a"), turns.take(1, "b")] == [(0, None), (1, None)]


def test_the_turn_of_a_host_that_died_is_for_the_same_shift() -> None:
    turns = Turns(4, hosts=1)
    assert turns.take(0, "a") == (0, 1)
    assert turns.take(0, "b") == (0, 2)
    assert turns.take(1, "b") == (2, 3)
    assert [turns.take(2, "b")[0], turns.take(3, "b")[0]] == [3, 1]


@pytest.mark.parametrize("seed", range(20))
def test_whoever_comes_when_every_shift_is_taken_once(seed: int) -> None:
    rng = random.Random(seed)
    hosts, shifts = rng.randint(1, 5), rng.randint(1, 12)
    turns = Turns(shifts, hosts)
    taken = [turns.take(turn, str(rng.randrange(hosts)))[0] for turn in range(shifts)]
    assert sorted(taken) == list(range(shifts))
