"""A real Chromium, Debian's, driven by Playwright; none is downloaded."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
NO_BROWSER = f"no browser here: none of {', '.join(PROGRAMS)} is installed"


@contextmanager
def launched() -> Iterator[Browser]:
    """Launch the browser; skips the test where there is none."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(NO_BROWSER)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def complaints(page: Page) -> list[str]:
    """Return the list that the page's errors and warnings will be in."""
    found: list[str] = []

    def console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            found.append(message.text)

    page.on("console", console)
    page.on("pageerror", lambda error: found.append(str(error)))
    return found


def keep_screenshot(page: Page, name: str, folder: Path) -> Path:
    """Write a picture of the whole page, into $ESPER_ARTEFACTS if that is set."""
    target = Path(os.environ.get("ESPER_ARTEFACTS", folder)) / f"{name}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=target, full_page=True)
    return target
