"""The page `/ui` and the reads behind it over HTTP: files, headers, decisions, routers, and who may read them."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from api_server import gateway
from finished_requests import answer, bypassed, finished, inputs, routed
from ui_site import site, trained

import coe.serve.ui
from coe.protocol.openapi import openapi_document
from coe.serve.http.keyring import Keyring, StoredKeys
from coe.serve.http.recent import RecentDecisions, record_of
from coe.serve.http.router_facts import router_document
from coe.serve.http.ui_page import page_files
from registry.keys import KeySpec
from registry.store import Registry
from routers.evaluation.saved_curve import CURVE

SOURCES = Path(coe.serve.ui.__file__).parent


async def test_the_page_and_its_files_are_served_under_a_policy_that_lets_nothing_else_run() -> None:
    async with gateway() as g:
        page = await g.http.get("/ui")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        names = re.findall(r'(?:href|src)="ui/([^"]+)"', page.text)
        assert {"app.js", "style.css", "icon.svg"} == set(names)
        for name in page_files():
            found = await g.http.get("/ui" if name == "index.html" else f"/ui/{name}")
            assert found.status_code == 200 and found.content == (SOURCES / name).read_bytes()
            policy = found.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
            assert "unsafe" not in policy and "require-trusted-types-for 'script'" in policy
            assert found.headers["x-content-type-options"] == "nosniff"
            again = await g.http.get(found.url.path, headers={"if-none-match": f'"x", W/{found.headers["etag"]}'})
            assert (again.status_code, again.content) == (304, b"")
        assert (await g.http.get("/ui/app.js")).headers["content-type"] == "text/javascript; charset=utf-8"


async def test_only_files_of_the_page_are_served() -> None:
    async with gateway() as g:
        for name in ("index.html", "__init__.py", "..%2f__init__.py", "%2e%2e/http/api.py", "app.js/", "nothing.js"):
            found = await g.http.get(f"/ui/{name}")
            assert (found.status_code, found.json()["error"]["code"]) == (404, "unknown_url"), name
        slash = await g.http.get("/ui/", follow_redirects=False)
        assert (slash.status_code, slash.headers["location"]) == (307, "../ui")
        assert (await g.http.post("/ui")).status_code == 405


async def test_the_page_can_be_switched_off() -> None:
    async with gateway(settings={"ui": False}) as g:
        for path in ("/ui", "/ui/", "/ui/app.js"):
            assert (await g.http.get(path)).json()["error"]["code"] == "unknown_url"


def test_the_files_load_nothing_from_elsewhere_and_write_no_html() -> None:
    for name, file in page_files().items():
        text = file.content.decode()
        links = [link for link in re.findall(r"https?://[^\s\"'`]+", text) if "www.w3.org" not in link]
        assert not links, (name, links)
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "onclick=",
        ):
            assert word not in text, (name, word)
    scripts = {name for name in page_files() if name.endswith(".js")}
    imported = {
        found for name in scripts for found in re.findall(r'from "\./([\w.]+)"', page_files()[name].content.decode())
    }
    assert imported <= scripts and scripts - imported == {"app.js"}, "every script is part of the page"


async def test_decisions_have_experts_costs_and_baselines_and_no_texts(tmp_path: Path) -> None:
    async with site(tmp_path / "router") as g:
        for text in ("Which orders are over 100 euros?", "Add 17 and 25."):
            await g.client.chat.completions.create(model="auto", messages=[{"role": "user", "content": text}])
        await g.client.chat.completions.create(model="large", messages=[{"role": "user", "content": "secret words"}])
        with pytest.raises(Exception, match="broken"):
            await g.client.chat.completions.create(model="broken", messages=[{"role": "user", "content": "x"}])
        await g.log.ended(4)
        found = await g.http.get("/admin/decisions?last=3")
        assert not any(word in found.text for word in ("orders", "Add", "secret", "SELECT"))
        failed, named, routed_ = found.json()["decisions"]
        assert (failed["chosen"], failed["expert"], failed["error"]) == (["broken"], None, "engine_error")
        assert (named["policy"], named["expert"], named["estimated"]) == (None, "large", None)
        assert named["cost_usd"] == pytest.approx((2 * 1.2 + 80 * 3.6) * 1e-6, rel=0.2)
        assert (routed_["policy"], routed_["expert"], routed_["chosen"]) == ("default", "math", ["math"])
        estimated = routed_["estimated"]
        assert estimated["most_expensive"]["expert"] == estimated["best_single"]["expert"] == "large"
        assert estimated["cost_usd"] < estimated["best_single"]["cost_usd"] / 5
        for bad in ("0", "1001", "-1", "x", "", "1e3", "9" * 50):
            refused = await g.http.get(f"/admin/decisions?last={bad}")
            assert refused.status_code == 400 and "from 1 to 1000" in refused.json()["error"]["message"]


def test_a_record_states_what_is_known_of_a_request() -> None:
    plain = record_of(finished())
    assert plain["expert"] == "good" and plain["cost_usd"] == 0.25 and plain["estimated"]["best_single"] is None
    assert plain["estimated"]["most_expensive"] == {"expert": "good", "cost_usd": 0.01}
    allowed = record_of(finished(routed=routed(made_from=inputs(allowed=frozenset({"cheap", "general"})))))
    assert allowed["estimated"]["most_expensive"] == {"expert": "general", "cost_usd": 0.002}
    assert record_of(finished(routed=bypassed("good")))["estimated"] is None
    refused = record_of(finished(routed=None, expert=None, answer=None, error="overloaded", status=429))
    assert (refused["policy"], refused["confidence"], refused["error"]) == (None, None, "overloaded")
    two = record_of(finished(done={"0": answer("good"), "1": answer("general")}))
    assert two["estimated"]["cost_usd"] == pytest.approx(0.012) and two["calls"] == 2
    other = record_of(finished(done={"0": answer("stranger")}))
    assert other["estimated"]["cost_usd"] is None, "the estimate does not know the expert that was called"
    json.dumps([plain, allowed, refused, two, other], allow_nan=False)


async def test_the_last_decisions_are_bounded_and_those_of_all_gateways_are_merged() -> None:
    recent = RecentDecisions(3)
    for i in range(5):
        recent.write(finished(id=f"d-{i}", started_at=float(i)))
    assert [record["id"] for record in recent.last(10)] == ["d-4", "d-3", "d-2"]
    assert [record["id"] for record in recent.last(1)] == ["d-4"]

    async def pages(count: int) -> Any:
        return [recent.last(count), [record_of(finished(id="other", started_at=3.5))]]

    gateways, merged = await RecentDecisions(pages=pages).of_all(3)
    assert gateways == 2 and [record["id"] for record in merged] == ["d-4", "other", "d-3"]


async def test_routers_have_weights_training_scores_and_the_curve(tmp_path: Path) -> None:
    async with site(tmp_path / "router") as g:
        found = (await g.http.get("/admin/routers")).json()
        assert found["default_policy"] == "default"
        default, largest = found["policies"]
        assert (default["router"]["kind"], default["cost_weight"], default["best_single"]) == ("knn", 400.0, "large")
        assert default["router"]["experts"][0]["name"] == "large" and default["curve_problem"] is None
        points = default["curve"]["points"]
        assert points[0]["cost_weight"] == 0 and points[-1]["mean_cost"] < points[0]["mean_cost"] / 5
        assert (
            largest["router"] is None
            and largest["expert"] == "large"
            and "names one expert" in largest["curve_problem"]
        )


def test_a_missing_or_damaged_curve_is_explained(tmp_path: Path) -> None:
    policy = trained(tmp_path, with_curve=False)
    assert "coe router eval DIR --outcomes FILE --save-curve" in router_document(policy)["curve_problem"]
    (tmp_path / CURVE).write_text('{"format": 1, "points": [{"cost_weight": "<b>"}]}')
    document = router_document(policy)
    assert document["curve"] is None and "is not a curve" in document["curve_problem"]


async def test_the_reads_need_a_key_that_may_make_admin_calls(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/registry.db"
    with Registry(url) as store:
        plain = store.create_api_key(KeySpec(name="plain"), time.time())[1]
        admin = store.create_api_key(KeySpec(name="root", admin=True), time.time())[1]
    async with gateway(keyring=Keyring(StoredKeys(url))) as g:
        for path in ("/admin/decisions", "/admin/routers"):
            answers = [
                await g.http.get(path, headers={"authorization": f"Bearer {key}"}) for key in ("x", plain, admin)
            ]
            assert [each.status_code for each in answers] == [401, 403, 200]
        assert (await g.http.get("/ui")).status_code == 200, "the page has no data"


async def test_without_keys_the_reads_are_for_this_machine_only() -> None:
    async with gateway() as g:
        for headers in ({"x-forwarded-for": "10.0.0.1"}, {"origin": "http://evil.example"}):
            for path in ("/admin/decisions", "/admin/routers"):
                refused = await g.http.get(path, headers=headers)
                assert refused.json()["error"]["code"] == "admin_not_allowed"


def test_the_endpoints_are_documented() -> None:
    paths = openapi_document()["paths"]
    assert {"/ui", "/ui/{name}", "/admin/decisions", "/admin/routers"} <= paths.keys()
