"""Which host answers which work item: no host is idle while work is left, and each item is claimed once."""

import random

import pytest

from coe.batch.claims import Claims


def test_one_host_claims_all_in_order_and_knows_the_next_one() -> None:
    claims = Claims(3, hosts=1)
    assert [claims.claim(number, "a") for number in range(3)] == [(0, 1), (1, 2), (2, None)]


def test_hosts_reserve_only_what_the_others_do_not_need_now() -> None:
    claims = Claims(5, hosts=2)
    assert claims.claim(0, "a") == (0, 1)
    assert claims.claim(1, "b") == (2, 3)
    assert claims.claim(2, "b") == (3, None)  # the rest goes to the first free host
    assert claims.claim(3, "b") == (4, None)
    assert claims.claim(4, "b") == (1, None)  # stolen: `a` has not started it


def test_with_as_many_hosts_as_items_each_begins_at_once() -> None:
    claims = Claims(2, hosts=2)
    assert [claims.claim(0, "a"), claims.claim(1, "b")] == [(0, None), (1, None)]


def test_the_claim_of_a_host_that_died_gets_the_same_item() -> None:
    claims = Claims(4, hosts=1)
    assert claims.claim(0, "a") == (0, 1)
    assert claims.claim(0, "b") == (0, 2)
    assert claims.claim(1, "b") == (2, 3)
    assert [claims.claim(2, "b").item, claims.claim(3, "b").item] == [3, 1]


@pytest.mark.parametrize("seed", range(20))
def test_every_item_is_claimed_once_whichever_hosts_come(seed: int) -> None:
    rng = random.Random(seed)
    hosts, items = rng.randint(1, 5), rng.randint(1, 12)
    claims = Claims(items, hosts)
    claimed = [claims.claim(number, str(rng.randrange(hosts))).item for number in range(items)]
    assert sorted(claimed) == list(range(items))
