"""Which host answers which work item: no host is idle while work is left, and each item is claimed once."""

import random

import pytest

from coe.batch.claims import Claims


def test_one_host_claims_all_in_order_and_knows_the_next_one() -> None:
    claims = Claims("abc", hosts=1)
    assert [claims.claim("x") for _ in range(4)] == [(0, 1), (1, 2), (2, None), None]
    assert not claims.left


def test_hosts_reserve_only_what_the_others_do_not_need_now() -> None:
    claims = Claims("abcde", hosts=2)
    assert claims.claim("x") == (0, 1)
    assert claims.claim("y") == (2, 3)
    assert claims.claim("y") == (3, None)  # the rest goes to the first free host
    assert claims.claim("y") == (4, None)
    assert claims.left and claims.claim("y") == (1, None)  # stolen: `x` has not started it


def test_with_as_many_hosts_as_items_each_begins_at_once() -> None:
    claims = Claims("ab", hosts=2)
    assert [claims.claim("x"), claims.claim("y")] == [(0, None), (1, None)]


def test_what_a_host_holds_comes_first_and_what_another_holds_last() -> None:
    claims = Claims("abcd", hosts=2)
    assert claims.claim("x", held="c", elsewhere="a") == (2, 1)
    assert claims.claim("y", held="a", elsewhere="c") == (0, None)
    assert claims.claim("y", held="a", elsewhere="cd") == (3, None)  # rather than nothing


def test_the_item_of_a_host_that_died_is_claimed_next_and_what_it_had_reserved() -> None:
    claims = Claims("abcd", hosts=1)
    assert claims.claim("x") == (0, 1)
    claims.give_back("x", 0)
    assert [claims.claim("y") for _ in range(4)] == [(0, 1), (1, 2), (2, 3), (3, None)]


@pytest.mark.parametrize("seed", range(20))
def test_every_item_is_claimed_once_whichever_hosts_come(seed: int) -> None:
    rng = random.Random(seed)
    hosts, items = rng.randint(1, 5), rng.randint(1, 12)
    claims = Claims([rng.choice("abc") for _ in range(items)], hosts)
    held = [rng.sample("abc", 2) for _ in range(hosts)]
    claimed = []
    for _ in range(items):
        host = rng.randrange(hosts)
        claim = claims.claim(str(host), held[host], held[host - 1])
        assert claim is not None
        claimed.append(claim.item)
    assert sorted(claimed) == list(range(items)) and claims.claim("0") is None
