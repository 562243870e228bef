"""A headless browser for the tests of the page: the system's Chromium, found or not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = "no Chromium here: sudo apt-get install chromium"


def find_browser() -> str | None:
    """Path of a Chromium, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def run_browser(page: Path, work: Path, *flags: str) -> str:
    """Open a page that is a file, with no network at hand; what the browser prints.

    Args:
        page: the file.
        work: for the profile of the browser.
        flags: e.g. ``--dump-dom``.
    """
    browser = find_browser()
    assert browser is not None, MISSING
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--hide-scrollbars", "--virtual-time-budget=2000",
        "--proxy-server=127.0.0.1:9", f"--user-data-dir={work}", *flags, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout
