"""The page `/ui` in a real browser: what a user does, with mouse and with keyboard, and what hostile texts do."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest
import pytest_asyncio
from api_server import Gateway, expert
from chromium import browser, missing
from ui_site import site

from coe.serve.http.keyring import Keyring, StoredKeys
from registry.keys import KeySpec
from registry.store import Registry

if TYPE_CHECKING:
    from playwright.async_api import BrowserContext, Page, Route

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]

ATTACK = '<img src=x onerror="document.title=1"><script>document.title=1</script>"\'>&lt;b&gt;'
EVIL = "evil<img src=x onerror=document.title=1>"
SLOW = "word " * 400
CHECKS = (Path(__file__).parent / "page_checks.js").read_text()
QUESTION = "Which orders are over 100 euros?"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    experts = [expert("echo"), expert("evil", f"fake://script?{urlencode({'default': ATTACK})}")]
    async with site(tmp_path_factory.mktemp("site") / "router", experts) as there:
        yield there


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[BrowserContext]:
    async with browser(tmp_path_factory.mktemp("profile"), viewport={"width": 1200, "height": 800}) as context:
        yield context


@pytest_asyncio.fixture(loop_scope="module")
async def page(service: Gateway, chromium: BrowserContext) -> AsyncIterator[Page]:
    """The page in a tab of its own; a test fails for an error of a script, or of the content policy."""
    tab = await chromium.new_page()
    problems: list[str] = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda line: problems.append(line.text) if "Content Security Policy" in line.text else None)
    await tab.goto(f"{service.url}/ui")
    tab.set_default_timeout(10_000)
    await tab.wait_for_selector("#model option", state="attached")
    yield tab
    await tab.close()
    assert not problems


async def ask(page: Page, text: str, model: str = "auto") -> Any:
    """Send a message; the answer once it is complete."""
    await page.select_option("#model", model)
    await page.fill("#prompt", text)
    await page.click("#send")
    return await done(page)


async def done(page: Page) -> Any:
    await page.wait_for_selector(".turn:last-child .answer[aria-busy=false]")
    await page.wait_for_function("() => document.querySelector('#stop').disabled")
    return page.locator(".turn").last.locator(".answer").last


async def test_a_chat_streams_an_answer_and_says_who_gave_it_and_why(page: Page) -> None:
    answer = await ask(page, QUESTION)
    assert "SELECT id, total" in await answer.locator(".text pre").inner_text()
    who = await answer.locator(".who").inner_text()
    assert who.startswith("sql for auto · policy default · confidence 0.")
    assert " tokens · $0.0000" in who
    await answer.locator("summary", has_text="Why sql").click()
    rows = [re.split(r"\t", line) for line in (await answer.locator(".why tbody").inner_text()).splitlines()]
    assert rows[0][0] == "sql" and rows[0][4] == "answered"
    utilities = [float(row[3]) for row in rows]
    assert utilities == sorted(utilities, reverse=True) and len(rows) == 6
    assert await page.locator("#status").inner_text() == "Complete: sql."
    second = await ask(page, "Now delete the file old.log.", "shell")
    assert await second.locator(".text").inner_text() == "rm old.log"
    assert (await second.locator(".who").inner_text()).startswith("shell · ")


async def test_experts_that_are_ruled_out_are_named_with_the_constraint(page: Page) -> None:
    await page.click(".options summary")
    tools = '[{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]'
    await page.fill("#tools", tools)
    answer = await ask(page, "How is the weather in Rome?")
    assert "get_weather" in await answer.locator(".call").inner_text()
    assert '"city": "Rome"' in await answer.locator(".call pre").inner_text()
    await answer.locator(".why summary").click()
    out = await answer.locator(".why tr.out", has_text="sql").inner_text()
    assert "ruled out" in out and "tools" in out


async def test_the_same_message_goes_to_several_models_side_by_side(page: Page) -> None:
    await page.check("#compare")
    for name in ("auto", "coe/default", "math", "large"):
        await page.locator(f'#choices input[value="{name}"]').set_checked(name != "coe/default")
    await page.fill("#prompt", "Add 17 and 25.")
    await page.press("#prompt", "Enter")
    await page.wait_for_selector(".turn")
    await page.wait_for_function("() => document.querySelectorAll('.answer[aria-busy=false]').length === 3")
    heads = await page.locator(".answer .who").all_inner_texts()
    assert [head.split(" · ")[0] for head in heads] == ["math for auto", "math", "large"]
    boxes = [await page.locator(".answer").nth(i).bounding_box() for i in range(3)]
    assert len({round(box["y"]) for box in boxes if box}) == 1, "in columns"


async def test_a_stream_can_be_stopped(page: Page, service: Gateway) -> None:
    before = len(service.log.lines)
    await page.select_option("#model", "echo")
    await page.fill("#prompt", SLOW)
    await page.click("#send")
    await page.wait_for_function("() => document.querySelector('.text').textContent.length > 50")
    assert await page.locator(".answer").get_attribute("aria-busy") == "true"
    await page.press("body", "Escape")
    answer = await done(page)
    assert (await answer.locator(".who").inner_text()).endswith("stopped")
    assert len(await answer.locator(".text").inner_text()) < len(SLOW)
    await service.log.ended(before + 1)
    assert service.log.lines[-1].error == "cancelled", "the service has stopped, too"


async def test_errors_are_shown_in_full_with_what_to_do(page: Page) -> None:
    failed = await ask(page, "hello", "broken")
    text = await failed.locator(".error").inner_text()
    assert "500 engine_error" in text and "'broken' failed" in text and "log of the service" in text
    await page.click(".options summary")
    await page.fill("#max-tokens", "0")
    refused = await ask(page, "hello", "echo")
    assert "max_tokens" in await refused.locator(".error").inner_text()
    await page.fill("#max-tokens", "")
    await page.fill("#schema", '{"type": ')
    await page.fill("#prompt", "hello")
    await page.click("#send")
    assert await page.locator("#schema-problem").inner_text() != ""
    assert await page.locator("#schema").get_attribute("aria-invalid") == "true"
    assert await page.evaluate("document.activeElement.id") == "schema"


async def test_a_service_that_is_gone_is_an_error_and_not_a_hang(page: Page) -> None:
    await page.route("**/v1/chat/completions", lambda route: route.abort())
    failed = await ask(page, "hello", "echo")
    text = await failed.locator(".error").inner_text()
    assert "did not answer" in text and "Check that the service runs" in text


async def test_texts_of_experts_and_names_are_never_html(page: Page, service: Gateway) -> None:
    answer = await ask(page, ATTACK, "evil")
    assert await answer.locator(".text").inner_text() == ATTACK
    assert await page.locator(".question").text_content() == f"You: {ATTACK}"
    assert await page.locator("#log img, #log script").count() == 0
    bodies = {
        "v1/models": {"data": [{"id": EVIL, "coe": {"kind": "model", "description": EVIL}}]},
        "admin/routers": {"default_policy": EVIL, "policies": [policy(EVIL)]},
        "admin/decisions*": {"gateways": 1, "kept": 9, "decisions": [record(EVIL)]},
        "admin/residency": {"object": "x", "hosts": [host(EVIL)]},
    }
    for path, body in bodies.items():
        await page.route(f"**/{path}", partial(answered_with, body))
    await page.reload()
    for view in ("playground", "live", "decisions", "router"):
        await page.click(f"#tab-{view}")
        place = "#model" if view == "playground" else f"#{view}"
        await page.wait_for_function(f"() => document.querySelector('{place}').textContent.includes('evil<img')")
        assert await page.locator("main img, main script").count() == 0
        assert await page.title() != "1"
    with pytest.raises(Exception, match="TrustedHTML"):
        await page.evaluate("document.body.innerHTML = '<b>x</b>'")


async def test_live_shows_memory_and_requests_and_rests_while_it_is_hidden(page: Page, service: Gateway) -> None:
    await ask(page, "Add 17 and 25.", "math")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "residency" in request.url else None)
    await page.click("#tab-live")
    await page.wait_for_selector("#live .host")
    weights = await page.locator("#live table", has_text="unloads in").inner_text()
    assert re.search(r"math\tresident\t24\.0 MiB", weights)
    tiers = await page.locator(".tier").all_inner_texts()
    assert "of 512 MiB" in tiers[0] and tiers[1].startswith("host") and "48.0 MiB of 256 MiB" in tiers[1]
    latencies = await page.locator("#live table", has_text="first text, median").inner_text()
    assert re.search(r"^math\t\d+\t[\d.]+ m?s", latencies, re.MULTILINE)
    await page.wait_for_timeout(2600)
    seen = len(asked)
    assert seen >= 2, "it refreshes"
    await page.click("#tab-playground")
    await page.wait_for_timeout(2600)
    assert len(asked) <= seen + 1, "not while it is hidden"


async def test_decisions_and_router_show_costs_and_the_working_point(page: Page) -> None:
    await ask(page, QUESTION)
    await page.click("#tab-decisions")
    saved = await page.locator("#decisions table", has_text="most expensive allowed").inner_text()
    assert "best mean score on the training table" in saved and "\tlarge\t" in saved
    assert re.search(r"\(\d+\s?%\)", saved), saved  # of all decisions so far
    assert await page.locator("#decisions svg[role=img]").count() == 2
    await page.click("#tab-router")
    await page.wait_for_selector("#router svg .at")
    assert "works here" in str(await page.locator("#router svg text.strong").text_content())
    await page.click("#points summary")
    assert await page.locator("#points tr.best").count() == 1
    await page.select_option("#policy", "largest")
    assert "names one expert" in await page.locator("#router .empty").inner_text()


async def test_everything_can_be_done_with_the_keyboard(page: Page) -> None:
    await page.keyboard.press("Tab")
    assert await focused(page) == "Skip to the view"
    await page.keyboard.press("Tab")
    assert await focused(page) == "Playground"
    for key, view in (("ArrowRight", "Live"), ("End", "Router"), ("ArrowRight", "Playground"), ("ArrowLeft", "Router")):
        await page.keyboard.press(key)
        assert await focused(page) == view
        assert await page.locator("[role=tab][aria-selected=true]").inner_text() == view
        assert await page.locator("[role=tabpanel]:visible").get_attribute("id") == view.lower()
    await page.keyboard.press("Home")
    await page.focus("#prompt")
    await page.keyboard.type("Delete the file old.log.")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.press("Enter")
    answer = await done(page)
    assert await page.evaluate("document.activeElement.id") == "prompt"
    await answer.locator(".why summary").focus()
    await page.keyboard.press("Enter")
    assert await answer.locator(".why table").is_visible()
    outline = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is visible"


async def test_every_field_has_a_name_and_every_view_a_heading(page: Page) -> None:
    await ask(page, QUESTION)
    for view in ("playground", "live", "decisions", "router"):
        await page.click(f"#tab-{view}")
        await page.wait_for_selector(f"#{view} h1")
        assert await check(page, "nameless()") == [], view
        assert await check(page, "repeatedIds()") == [], view
    assert await page.locator("main, header").count() == 2 and await page.get_attribute("html", "lang") == "en"


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_texts_have_contrast_in_light_and_dark(page: Page, theme: str) -> None:
    await page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
    await ask(page, "hello", "broken")
    await (await ask(page, QUESTION)).locator(".why summary").click()
    for view in ("playground", "live", "decisions", "router"):
        await page.click(f"#tab-{view}")
        await page.wait_for_selector(f"#{view} h1")
        assert await check(page, "lowContrast(4.5)") == [], view
    body = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", body)[:3])) > 600) == (theme == "light")


async def test_the_theme_can_be_chosen_and_is_kept(page: Page) -> None:
    await page.emulate_media(color_scheme="light")
    for _ in range(2):
        await page.click("#theme")
    assert await page.locator("#theme").inner_text() == "Theme: dark"
    await page.reload()
    body = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert body == "rgb(22, 24, 26)"
    await page.click("#theme")


async def test_nothing_is_wider_than_a_phone(page: Page) -> None:
    await page.set_viewport_size({"width": 360, "height": 740})
    await page.emulate_media(reduced_motion="reduce")
    await (await ask(page, f"{QUESTION} {'x' * 300}", "coe/default")).locator(".why summary").click()
    for view in ("playground", "live", "decisions", "router"):
        await page.click(f"#tab-{view}")
        await page.wait_for_selector(f"#{view} h1")
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360, view
    await page.click("#tab-playground")
    assert await page.evaluate("getComputedStyle(document.querySelector('.text'), '::after').animationName") == "none"


async def test_where_keys_are_needed_the_page_asks_for_one(chromium: BrowserContext, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/registry.db"
    with Registry(url) as store:
        plain = store.create_api_key(KeySpec(name="plain", experts=("sql",)), time.time())[1]
        admin = store.create_api_key(KeySpec(name="root", admin=True), time.time())[1]
    async with site(tmp_path / "router", keyring=Keyring(StoredKeys(url))) as there:
        page = await chromium.new_page()
        await page.goto(f"{there.url}/ui")
        await page.wait_for_selector("#key-form:visible")
        assert await page.evaluate("document.activeElement.id") == "key"
        assert "invalid_api_key" in await page.locator("#log .error").inner_text()
        await page.keyboard.type(plain)
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#model option[value=sql]", state="attached")
        assert await page.locator("#model option[value=large]").count() == 0, "what the key may not use is not shown"
        assert await page.evaluate("Object.keys(localStorage).join() + document.cookie") == "coe.theme"
        await page.click("#tab-decisions")
        assert "--admin" in await page.locator("#decisions .error .advice").inner_text()
        await page.click("#key-toggle")
        await page.fill("#key", admin)
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#decisions .empty, #decisions table")
        await page.reload()
        await page.wait_for_selector("#decisions .empty, #decisions table")
        await page.close()


async def answered_with(body: Any, route: Route) -> None:
    await route.fulfill(json=body)


async def check(page: Page, call: str) -> Any:
    """What a function of `page_checks.js` finds."""
    return await page.evaluate(f"() => {{ {CHECKS}\nreturn {call}; }}")


async def focused(page: Page) -> str:
    return str(await page.evaluate("document.activeElement.textContent"))


def policy(name: str) -> dict[str, Any]:
    point = {"cost_weight": 0.0, "mean_cost": 0.1, "accuracy": 0.5, "low": 0.4, "high": 0.6}
    curve = {"router": "x", "measured": name, "table": name, "rows": 1, "created": name, "points": [point]}
    single = {"name": name, "mean_cost": 0.1, "accuracy": 0.5}
    router = {"kind": name, "created": name, "n_queries": 1, "experts": [{"name": name, "mean_score": 0.5}]}
    weights = {"cost_weight": 0.0, "latency_weight": 0.0, "switch_weight": 0.0, "select": {"kind": name}}
    texts = {"policy": name, "composition": name, "fallback": name, "best_single": name, "expert": None}
    return {**weights, **texts, "router": router, "curve": {**curve, "experts": [single]}, "curve_problem": None}


def record(name: str) -> dict[str, Any]:
    numbers = {
        "time": 1.0,
        "confidence": 0.5,
        "status": 200,
        "calls": 1,
        "cost_usd": 0.1,
        "first_s": 0.1,
        "total_s": 0.1,
    }
    other = {"expert": name, "cost_usd": 0.2}
    return {
        **numbers,
        **dict.fromkeys(("id", "endpoint", "key", "policy", "expert", "label", "error"), name),
        "chosen": [name],
        "abstained": False,
        "fallback": False,
        "estimated": {"cost_usd": 0.1, "most_expensive": other, "best_single": other},
    }


def host(name: str) -> dict[str, Any]:
    weights = {
        "name": name,
        "version": None,
        "state": name,
        "size_bytes": 1,
        "requests": 0,
        "idle_s": 0.0,
        "ttl_s": None,
    }
    each = {**weights, "pinned": False, "priority": 0, "reason": name, "unload_in_s": None}
    copies = {"experts": [name], "used_bytes": 1, "budget_bytes": 2}
    return {"pool": name, "process": name, "used_bytes": 1, "budget_bytes": 2, "weights": [each], "copies": copies}
