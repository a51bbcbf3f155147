# SPDX-License-Identifier: Apache-2.0
"""The report's page in a real browser: headless Chromium, over its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import select
import subprocess
import time
import urllib.parse
from typing import TYPE_CHECKING, Any

import pytest

from tests.recordings import START_NS, Made, record
from tests.test_recorder import HOSTILE
from tracer.filters import Filters
from tracer.report.page import render
from tracer.report.report import make

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PATIENCE_S = 120.0
# Whatever would show that a name was obeyed.
ATTACKS = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    "${window.hacked = 3}",
    "\u2028window.hacked = 4\u2029",
    "--><svg onload=window.hacked=5>",
    *HOSTILE,
]
SIZES = {"desktop": (1200, 900), "phone": (390, 800)}


class Browser:
    """One page, by commands of the DevTools protocol over a pair of pipes."""

    def __init__(self, profile: Path) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        command = [
            "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--remote-debugging-pipe",
            "about:blank",
        ]  # fmt: skip

        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "chromium", *command],
            pass_fds=[theirs_in, theirs_out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._in = os.fdopen(ours_in, "rb", buffering=0)
        self._out = os.fdopen(ours_out, "wb", buffering=0)
        self._numbers = itertools.count(1)
        self._rest = b""
        self._session = ""
        self.events: list[dict[str, Any]] = []
        page = self._first_page()
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]  # fmt: skip
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Page.setLifecycleEventsEnabled", enabled=True)

    def _first_page(self) -> str:
        """Its id. It comes a little after the browser."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline_s:
            for target in self.send("Target.getTargets")["targetInfos"]:
                if target["type"] == "page":
                    return str(target["targetId"])
            time.sleep(0.05)
        raise AssertionError("the browser opens no page")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Its result; events that come meanwhile are kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._in], [], [], _PATIENCE_S)[0], "the browser says nothing"
            part = self._in.read(1 << 20)
            assert part, "the browser died"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, page: Path) -> None:
        """Loads a file, and waits until it is there."""
        self.events.clear()
        loader = self.send("Page.navigate", url=page.as_uri())["loaderId"]
        while not any(_is_loaded(event, loader) for event in self.events):
            self.events.append(self._next())

    def run(self, script: str) -> Any:
        """The value of an expression."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        """Errors, and requests to anywhere but the page itself."""
        bad = {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"}
        found = [event for event in self.events if event.get("method") in bad]
        for event in self.events:
            if event.get("method") == "Network.requestWillBeSent":
                url = urllib.parse.urlsplit(event["params"]["request"]["url"])
                if url.scheme not in ("file", "data"):
                    found.append(event)
        return found

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self._session = ""
            self.send("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._in.close()
        self._out.close()


def _is_loaded(event: dict[str, Any], loader: str) -> bool:
    """That it is; an event may still be of the page before."""
    if event.get("method") != "Page.lifecycleEvent":
        return False
    return (event["params"]["name"], event["params"]["loaderId"]) == ("load", loader)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hostile")
    made = [
        Made(
            time_ns=START_NS + n * 10**8,
            latency_ns=1_000_000 * (n + 1),
            name=text,
            pod=text,
            namespace=text,
            backend=text,
            comm=text,
        )
        for n, text in enumerate(ATTACKS)
    ]
    made.append(Made(status="dropped", latency_ns=None, rcode=None, reason=ATTACKS[0], name=ATTACKS[1]))  # fmt: skip
    record(directory, made, node=ATTACKS[1], problem=ATTACKS[0])
    path = directory / "page.html"
    path.write_text(render(make([directory], Filters())), "utf-8")
    return path


def test_page_runs_without_complaint_and_obeys_no_name(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.complaints() == []
    assert browser.run("typeof window.hacked") == "undefined"
    assert browser.run("document.querySelectorAll('script, img, svg, iframe, object').length") == 2
    shown = browser.run("document.body.innerText")
    for text in ATTACKS[:3]:
        assert text in shown
    assert browser.run("document.querySelectorAll('canvas').length") == 1


def test_page_asks_nothing_of_the_network(page: Path) -> None:
    text = page.read_text("utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text)
    # What names hold cannot end the element that they are in.
    data = text.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(data)["event"] == "report"
    assert not re.search("[<>&\u2028\u2029]", data)


def test_tables_sort_by_any_column(browser: Browser, page: Path) -> None:
    browser.open(page)
    column = """(n) => {
        const table = [...document.querySelectorAll('section')]
            .find((s) => s.querySelector('h2').textContent === 'By client pod').querySelector('table');
        const cells = () => [...table.tBodies[0].rows].map((row) => row.cells[n].textContent);
        const before = cells();
        table.tHead.rows[0].cells[n].querySelector('button').click();
        const down = cells();
        table.tHead.rows[0].cells[n].querySelector('button').click();
        return [before, down, cells(), table.tHead.rows[0].cells[n].getAttribute('aria-sort')];
    }"""
    before, down, up, order = browser.run(f"({column})(5)")
    assert sorted(down) == sorted(before)
    assert len(set(down)) > 5
    assert down == up[::-1]
    assert order == "ascending"
    assert float(down[0].split()[0]) > float(down[-1].split()[0])
    _, names, _, _ = browser.run(f"({column})(0)")
    assert sorted(names) == sorted(browser.run(f"({column})(0)")[0])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_page_is_light_and_dark(browser: Browser, page: Path, theme: str) -> None:
    browser.send(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}]
    )
    browser.open(page)
    luminance = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert (sum(browser.run(luminance)) > 380) == (theme == "light")
    browser.run("document.getElementById('theme').click()")
    assert (sum(browser.run(luminance)) > 380) == (theme == "dark")
    assert browser.complaints() == []


@pytest.mark.parametrize("size", SIZES)
def test_page_fits_the_screen_and_something_is_drawn(
    browser: Browser, page: Path, size: str
) -> None:
    width, height = SIZES[size]
    browser.send(
        "Emulation.setDeviceMetricsOverride",
        width=width, height=height, deviceScaleFactor=1, mobile=size == "phone",
    )  # fmt: skip
    browser.open(page)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    drawn = """(() => {
        const canvas = document.getElementById('heat');
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return data.filter((value, at) => at % 4 === 3 && value > 0).length;
    })()"""
    assert browser.run(drawn) > 1000
    picture = base64.b64decode(browser.send("Page.captureScreenshot")["data"])
    assert picture.startswith(b"\x89PNG")
    browser.send("Emulation.clearDeviceMetricsOverride")
