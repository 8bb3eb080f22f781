"""Pictures of the page `/ui` for docs/ui.md: `python tests/support/ui_screenshots.py --out docs/images`."""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from api_server import Gateway
from chromium import browser, missing
from ui_site import ASKED, site

if TYPE_CHECKING:
    from playwright.async_api import Page

DESKTOP, PHONE = {"width": 1120, "height": 720}, {"width": 390, "height": 760}
MOST_BYTES = 200_000
"""Of a picture."""


async def pictures(out: Path) -> None:
    """Take all of them."""
    with tempfile.TemporaryDirectory() as temporary:
        async with (
            site(Path(temporary) / "router") as there,
            browser(Path(temporary) / "profile", viewport=DESKTOP, reduced_motion="reduce") as context,
        ):
            await traffic(there)
            page = await context.new_page()
            await page.goto(f"{there.url}/ui")
            await page.wait_for_selector("#model option", state="attached")
            await playground(page, out)
            await views(page, out)


async def traffic(there: Gateway, count: int = 120) -> None:
    """Requests of the last half minute."""
    rng = random.Random(0)
    for i in range(count):
        text = rng.choice(ASKED[rng.choice((*ASKED, "sql", "math"))])
        model = "large" if i % 17 == 0 else "auto"
        await there.client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}])
        await asyncio.sleep(rng.expovariate(4))


async def ask(page: Page, text: str) -> None:
    await page.fill("#prompt", text)
    await page.click("#send")
    await page.wait_for_function("() => document.querySelector('#stop').disabled")
    await page.wait_for_function("() => !document.querySelector('.answer[aria-busy=true]')")


async def playground(page: Page, out: Path) -> None:
    await ask(page, "Which orders are over 100 euros?")
    await page.click(".turn:last-child .why summary")
    await page.check("#compare")
    for box in await page.locator("#choices input").all():
        await box.set_checked(await box.get_attribute("value") in ("auto", "general", "large"))
    await ask(page, "Ada has 12 apples and eats 5.")
    await page.evaluate("() => scrollTo(0, 0)")
    await shot(page, out / "ui-playground.png", "light", DESKTOP)
    await page.reload()
    await page.wait_for_selector("#model option", state="attached")
    await ask(page, "Which orders are over 100 euros?")
    await page.click(".turn:last-child .why summary")
    await page.set_viewport_size({"width": PHONE["width"], "height": PHONE["height"]})
    await page.locator(".question").scroll_into_view_if_needed()
    await page.evaluate("() => document.querySelector('.question').scrollIntoView()")
    await shot(page, out / "ui-playground-phone.png", "dark", PHONE)


async def views(page: Page, out: Path) -> None:
    for view, theme in (("live", "dark"), ("decisions", "light"), ("router", "light")):
        await page.set_viewport_size({"width": DESKTOP["width"], "height": DESKTOP["height"]})
        await page.click(f"#tab-{view}")
        await page.wait_for_selector(f"#{view} h1")
        await page.wait_for_timeout(4500 if view == "live" else 600)
        await shot(page, out / f"ui-{view}.png", theme, DESKTOP)
    await page.click("#tab-decisions")
    await shot(page, out / "ui-decisions-phone.png", "dark", PHONE)


async def shot(page: Page, path: Path, theme: str, size: dict[str, int]) -> None:
    await page.emulate_media(color_scheme="dark" if theme == "dark" else "light", reduced_motion="reduce")
    await page.set_viewport_size({"width": size["width"], "height": size["height"]})
    await page.wait_for_timeout(700)  # charts are drawn again for the width
    await page.screenshot(path=path)


if __name__ == "__main__":
    if why := missing():
        raise SystemExit(why)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="Folder of the pictures.")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    asyncio.run(pictures(folder))
    for picture in sorted(folder.glob("ui-*.png")):
        size = picture.stat().st_size
        print(f"{picture}  {size:,} bytes{'  TOO LARGE' if size > MOST_BYTES else ''}")
