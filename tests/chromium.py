"""A headless Chromium, spoken to by its DevTools protocol."""

import asyncio
import base64
import io
import itertools
import json
import shutil
import subprocess
from pathlib import Path

import aiohttp
import numpy as np
from PIL import Image

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def program():
    """Its path; .ci/run installs it."""
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    assert found, f"none of {', '.join(PROGRAMS)} is installed: apt-get install chromium"
    return found


class Browser:
    """One page. `async with Browser(folder, width, height) as page: await page.open(url)`."""

    def __init__(self, folder, width=1280, height=1000):
        self.folder, self.size, self.numbers, self.errors = Path(folder), (width, height), itertools.count(1), []

    async def __aenter__(self):
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        flags += ["--remote-debugging-port=0", f"--user-data-dir={self.folder}", "--no-first-run"]
        flags += [f"--window-size={self.size[0]},{self.size[1]}", "--disable-background-networking", "about:blank"]
        # Only what this machine serves is reached; pages ask for fonts elsewhere and do without.
        flags.insert(0, "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
        self.process = subprocess.Popen([program(), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = await self._until(lambda: self._port(), "Chromium to start")
        self.http = aiohttp.ClientSession()
        pages = await (await self.http.get(f"http://127.0.0.1:{port}/json/list")).json()
        url = next(p["webSocketDebuggerUrl"] for p in pages if p["type"] == "page")
        self.socket = await self.http.ws_connect(url, max_msg_size=0)
        await self.call("Page.enable")
        await self.call("Runtime.enable")
        return self

    def _port(self):
        file = self.folder / "DevToolsActivePort"
        return file.read_text().split()[0] if file.exists() and file.read_text().strip() else None

    async def __aexit__(self, *args):
        await self.socket.close()
        await self.http.close()
        self.process.terminate()
        self.process.wait()

    async def call(self, method, **params):
        """One command of the protocol and its result; what else arrives meanwhile is looked through for errors."""
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = json.loads((await self.socket.receive()).data)
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(message["params"]["exceptionDetails"].get("text"))
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    async def open(self, url):
        await self.call("Page.navigate", url=url)

    async def run(self, script):
        """The value of a JavaScript expression."""
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{script}: {found['exceptionDetails']}"
        return found["result"].get("value")

    async def until(self, script, seconds=120):
        """Waits for a true value of a JavaScript expression, and returns it."""
        return await self._until(lambda: self.run(script), script, seconds)

    async def _until(self, function, what, seconds=120):
        for _ in range(int(seconds / 0.2)):
            value = function()
            value = await value if asyncio.iscoroutine(value) else value
            if value:
                return value
            await asyncio.sleep(0.2)
        raise AssertionError(f"waited {seconds} s for {what}")

    async def click(self, x, y):
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def stroke(self, points):
        """Moves along the points with the button held down."""
        for kind, point in (("mouseMoved", points[0]), ("mousePressed", points[0])):
            await self.mouse(kind, *point, held=kind == "mousePressed")
        for point in points:
            await self.mouse("mouseMoved", *point, held=True)
        await self.mouse("mouseReleased", *points[-1])

    async def mouse(self, kind, x, y, held=False):
        button = "none" if kind == "mouseMoved" and not held else "left"
        params = {"type": kind, "x": x, "y": y, "button": button, "buttons": int(held), "clickCount": 1}
        await self.call("Input.dispatchMouseEvent", **params)

    async def type(self, selector, text):
        """Replaces what is in a field, and leaves it."""
        await self.press(selector)
        await self.run(f"document.querySelector({json.dumps(selector)}).select()")
        await self.call("Input.insertText", text=text)
        await self.run(f"document.querySelector({json.dumps(selector)}).blur()")

    async def pixels(self, selector):
        """What an <img> holds, uint8 [H, W, 3], once it does: decode() fails while the page puts another picture in."""
        script = (
            f"(async () => {{ const i = document.querySelector({json.dumps(selector)});"
            " try { await i.decode(); } catch (e) { return null; }"
            " const c = document.createElement('canvas'); c.width = i.naturalWidth; c.height = i.naturalHeight;"
            " c.getContext('2d').drawImage(i, 0, 0); return c.toDataURL('image/png').split(',')[1]; })()"
        )
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(await self.until(script, 20)))).convert("RGB"))

    async def press(self, selector):
        """A click in the middle of an element."""
        await self.click(*await self.at(selector, 0.5, 0.5))

    async def at(self, selector, x, y):
        """Where a share of an element's width and height is on the screen, after it is scrolled there, once it is
        there, has come to rest and nothing lies over it."""
        script = (
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;"
            " e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            f" const p = [r.x + r.width * {x}, r.y + r.height * {y}], top = document.elementFromPoint(...p);"
            " return (e.complete ?? true) && (top === e || e.contains(top)) ? p : null; })()"
        )
        before = None

        async def rests():
            nonlocal before
            now = await self.run(script)
            same, before = now is not None and now == before, now
            return now if same else None

        return await self._until(rests, f"{selector} at rest")

    async def screenshot(self, path):
        found = await self.call("Page.captureScreenshot", format="png")
        Path(path).write_bytes(base64.b64decode(found["data"]))
