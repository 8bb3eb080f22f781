"""Chromium without a window, driven by Playwright; for tests and pictures of the page `/ui`."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from playwright.async_api import BrowserContext

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS: Final = (
    "--no-sandbox",
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


def missing() -> str | None:
    """Why no browser can be driven here; None if one can."""
    if find_spec("playwright") is None:
        return "playwright is not installed (extra `dev`)"
    return None if CHROMIUM else "chromium is not installed (`apt-get install chromium`)"


@asynccontextmanager
async def browser(profile: Path, **options: Any) -> AsyncIterator[BrowserContext]:
    """A browser with an empty profile; closed at the end.

    Args:
        profile: a new folder. options: of the context, such as `viewport`.
    """
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        context = await playwright.chromium.launch_persistent_context(
            str(profile), executable_path=CHROMIUM, args=list(ARGUMENTS), headless=True, **options
        )
        try:
            yield context
        finally:
            await context.close()
