"""Chromium for tests of pages: one browser a module, a new profile every time, and nothing that it would fetch."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
WAIT = 180
"""Seconds until a page counts as stuck; on a busy machine Chromium alone may take 30 to start."""
NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """Returns the browser's program: CHROMIUM, or the first that is installed."""
    found = os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)
    assert found, "The browser tests need Chromium: apt-get install chromium, or name it in CHROMIUM."
    return found


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """Runs Chromium with a profile of its own; hands out Playwright's browser context."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        context = play.chromium.launch_persistent_context(
            str(profile),
            executable_path=chromium(),
            args=list(FLAGS),
            viewport={"width": 1280, "height": 720},
            timeout=WAIT * 1000,
        )
        context.set_default_timeout(WAIT * 1000)
        yield context
        context.close()


class Watched:
    """A page that notes what it must not do: requests beyond its own address, and messages on the console."""

    def __init__(self, context: Any):
        self.page = context.new_page()
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.messages.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.messages.append(f"error: {error}"))

    def open(self, address: str, ready: str = "window.difffract?.scenes.left.timings.full > 0") -> Any:
        """Opens an address and waits until the page has drawn."""
        self.page.goto("about:blank")
        self.requests.clear()
        self.page.goto(address)
        until(self.page, ready)
        return self.page

    def beyond(self, address: str) -> list[str]:
        """Returns the requests that left the page: all but its own address, and what lies in it."""
        own = address.partition("#")[0]
        return [url for url in self.requests if url.partition("#")[0] != own and not url.startswith(("data:", "blob:"))]


def until(page: Any, expression: str, argument: Any = None, seconds: float = WAIT) -> None:
    """Waits until an expression holds. Playwright's own wait evaluates text in the page, which its policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression, argument):
        assert time.monotonic() < end, f"It never came to hold: {expression} ({argument})"
        page.wait_for_timeout(20)


def downloaded(page: Any, act: Callable[[], None]) -> tuple[str, bytes]:
    """Returns name and content of the file that an act downloads."""
    with page.expect_download() as started:
        act()
    return started.value.suggested_filename, Path(started.value.path()).read_bytes()
