"""A real browser for the tests of pages: the system's Chromium, driven by Playwright."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


def needs_browser() -> None:
    """Skips where there is no Chromium, or no Playwright to drive it."""
    pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    if not CHROMIUM:
        pytest.skip("needs a Chromium")


@contextmanager
def open_browser(*more_flags: str) -> Iterator:
    """Yields a Playwright browser."""
    from playwright.sync_api import sync_playwright

    # Chromium has no sandbox for root, who runs the tests in a container.
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    flags += ["--autoplay-policy=no-user-gesture-required", *more_flags]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        try:
            yield browser
        finally:
            browser.close()
