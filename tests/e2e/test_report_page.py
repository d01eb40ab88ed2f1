"""The report in a real browser: headless Chromium, driven over its debugging pipe. Skipped where there is none."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import runpy
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from redraft.reports import build_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DATA = runpy.run_path(str(Path(__file__).parents[1] / "report_data.py"))
PATIENCE = 120.0  # seconds; a loaded machine takes long to start a browser


class Browser:
    """One page of a headless Chromium. ``errors`` collects what its console complains of."""

    def __init__(self, program: str, profile: Path) -> None:
        ends = [*os.pipe(), *os.pipe()]
        read_here, write_there, read_there, write_here = (ends[0], ends[1], ends[2], ends[3])
        # The browser reads commands from descriptor 3 and answers on 4; high numbers cannot collide with those.
        handed = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (read_there, write_there)]
        start = "import os, sys; a = sys.argv; os.dup2(int(a[1]), 3); os.dup2(int(a[2]), 4); os.execvp(a[3], a[3:])"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        options += [f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, *map(str, handed), program, *options],
            pass_fds=handed,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (write_there, read_there, *handed):
            os.close(end)
        self.pipe_in, self.pipe_out, self.buffer = read_here, write_here, b""
        self.errors: list[str] = []
        self.loaded = False
        self.number = 0
        self.session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command; what happens in between is noted."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.pipe_out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.pipe_in], [], [], PATIENCE)
            chunk = os.read(self.pipe_in, 1 << 16) if ready else b""
            assert chunk, "the browser says no more"
            self.buffer += chunk
        raw, self.buffer = self.buffer.split(b"\0", 1)
        answer = json.loads(raw)
        self.note(answer.get("method", ""), answer.get("params", {}))
        return answer

    def note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self.loaded = True
        elif event == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str(params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif event == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "about:")):
            self.errors.append(f"fetched {params['request']['url']}")
        elif event == "Page.javascriptDialogOpening":
            self.errors.append(f"dialog {params['message']}")

    def open(self, page: Path, fragment: str = "", width: int = 1200, dark: bool = False, script: bool = True) -> None:
        """Load ``page`` afresh at ``width`` CSS pixels."""
        self.errors.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Emulation.setScriptExecutionDisabled", value=not script)
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        for url in ("about:blank", page.as_uri() + fragment):
            self.loaded = False
            self.send("Page.navigate", url=url)
            while not self.loaded:
                self.receive()

    def value(self, expression: str) -> Any:
        """What JavaScript makes of ``expression``."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        text = {"text": " "} if key == " " else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def picture(self, path: Path, full: bool = True) -> None:
        data = self.send("Page.captureScreenshot", captureBeyondViewport=full, **self._clip(full))["data"]
        path.write_bytes(base64.b64decode(data))

    def _clip(self, full: bool) -> dict[str, Any]:
        if not full:
            return {}
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def close(self) -> None:
        self.session = None
        try:
            self.send("Browser.close")
            self.process.wait(30)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.pipe_in)
        os.close(self.pipe_out)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser on PATH: {', '.join(BROWSERS)}")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section, and a trace whose tokens try to break out."""
    folder = tmp_path_factory.mktemp("report")
    result = DATA["rich_bench"]()
    result["traces"].append(DATA["hostile_trace"]())
    result["server"] = DATA["server"]()
    paths = DATA["fabricate"](folder, result)
    extra = (paths["curve.jsonl"], paths["ledger.json"], paths["summary.json"])
    return build_report([paths["bench.json"]], folder / "report.html", *extra)


SHOWN = (
    "document.querySelectorAll('#r0-trace-{0} .column')[{1}].querySelectorAll('.rd:not(.future)').length"
)  # fmt: skip


@pytest.mark.parametrize("width", [1200, 768, 360, 320])
def test_nothing_overflows_and_nothing_complains(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    assert browser.value("innerWidth") == width
    for state in ("0", "document.querySelectorAll('details').forEach((d) => { d.open = true; })"):
        browser.value(state)
        assert browser.value("document.documentElement.scrollWidth") <= width
        poking_out = (
            "[...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1"
            " && !e.closest('.scroll, pre, svg, [hidden]')).map((e) => e.outerHTML.slice(0, 120))"
        )
        assert browser.value(poking_out) == []
    assert browser.errors == []


def test_steps_by_button_key_slider_and_address(browser: Browser, page: Path) -> None:
    browser.open(page, "#r0-trace-0-round-3")
    assert [browser.value(SHOWN.format(0, column)) for column in (0, 1)] == [3, 3]
    assert browser.value("document.querySelectorAll('#r0-trace-0 .rd.now').length") == 2
    panel = browser.value("document.querySelector('#r0-trace-0 .now-panel').innerText")
    assert "round 3: " in panel and "running \u03c4 " in panel and "proposed" in panel and "kept" in panel

    browser.value("document.querySelector('#r0-trace-0 [data-do=next]').click()")
    assert browser.value(SHOWN.format(0, 1)) == 4
    assert browser.value("location.hash") == "#r0-trace-0-round-4"
    browser.value("document.querySelector('#r0-trace-0 .stage').focus()")
    for key, shown in (("ArrowRight", 5), ("ArrowLeft", 4), ("ArrowLeft", 3), ("Home", 0)):
        browser.press(key)
        assert browser.value(SHOWN.format(0, 1)) == shown, key
    assert "first token" in browser.value("document.querySelector('#r0-trace-0 .now-panel').innerText")
    browser.value(
        "(() => { const s = document.querySelector('#r0-trace-0 input'); s.value = 7;"
        " s.dispatchEvent(new Event('input')); })()"
    )
    assert browser.value(SHOWN.format(0, 0)) == 7
    browser.value("document.querySelector('#r0-trace-0 [data-do=all]').click()")
    assert browser.value("document.querySelectorAll('#r0-trace-0 .future, #r0-trace-0 .now').length") == 0
    assert browser.value("document.querySelector('#r0-trace-1').open") is False
    browser.value("location.hash = '#r0-trace-1-round-2'")
    browser.value("new Promise((done) => setTimeout(done, 50))")
    assert browser.value("document.querySelector('#r0-trace-1').open") is True
    assert browser.errors == []


def test_plays_and_pauses(browser: Browser, page: Path) -> None:
    browser.open(page, "#r0-trace-0-round-0")
    browser.value("document.querySelector('#r0-trace-0 .stage').focus()")
    browser.press(" ")
    assert browser.value("document.querySelector('#r0-trace-0 [data-do=play]').textContent") == "Pause"
    waiting = (
        "new Promise((done) => { const look = setInterval(() => {"
        f" if ({SHOWN.format(0, 1)} >= 2) {{ clearInterval(look); done(true); }} }}, 50); }})"
    )
    assert browser.value(waiting) is True
    browser.press(" ")
    assert browser.value("document.querySelector('#r0-trace-0 [data-do=play]').textContent") == "Play"
    assert browser.errors == []


def test_hostile_tokens_are_text(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.value("document.scripts.length") == 1
    assert browser.value("document.images.length") == 0
    text = browser.value("document.querySelector('#r0-trace-3').textContent")
    assert "</script>" in text and "<img src=x onerror=alert(1)>" in text and "&amp;" in text
    assert "\x1b" not in text and "\u202e" not in text
    # A page that were not escaped would still be held by its own policy.
    script = "Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'})"
    browser.value(f"document.body.append({script})")
    assert browser.value("window.ran") is None
    assert any("Content Security Policy" in error for error in browser.errors)


def test_light_and_dark(browser: Browser, page: Path) -> None:
    back = "getComputedStyle(document.body).backgroundColor"
    browser.open(page)
    light = browser.value(back)
    browser.open(page, dark=True)
    dark = browser.value(back)
    assert light != dark
    browser.value("document.querySelector('#theme').click()")
    assert browser.value(back) == light
    browser.value("document.querySelector('#theme').click()")
    assert browser.value(back) == dark
    assert browser.errors == []


def test_readable_without_scripts(browser: Browser, page: Path) -> None:
    browser.open(page, width=360, script=False)
    found = browser.send("DOM.getDocument", depth=0)
    root = found["root"]["nodeId"]
    for selector, present in ((".js", False), (".future", False), ("#r0-trace-0 .t.accepted", True)):
        nodes = browser.send("DOM.querySelectorAll", nodeId=root, selector=selector)["nodeIds"]
        assert bool(nodes) is present, selector
    controls = browser.send("DOM.querySelector", nodeId=root, selector=".controls")["nodeId"]
    style = browser.send("CSS.enable") or browser.send("CSS.getComputedStyleForNode", nodeId=controls)
    assert {"name": "display", "value": "none"} in style["computedStyle"]
    browser.send("CSS.disable")


def test_everything_to_press_has_a_name(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.send("Accessibility.enable")
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    browser.send("Accessibility.disable")
    roles: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            role, name = node.get("role", {}).get("value"), node.get("name", {}).get("value", "")
            roles.setdefault(role, []).append(name)
    for role in ("button", "slider", "link", "image", "region", "group"):
        assert roles.get(role), role
        assert all(roles[role]) or role == "group", (role, roles[role])
    assert any("acceptance length" in name for name in roles["image"])
