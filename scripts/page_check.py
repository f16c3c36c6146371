"""Use the server's page and the file of ``less-export inspect`` in headless Chromium.

    python scripts/page_check.py BUNDLE [--images docs/images] [--out benchmarks/results/page.json]

The bundle has a chat template. Needs Debian's ``chromium`` and ``chromium-driver``, and the package ``selenium``. Ends
at the first thing that is not as it should be: answers in both modes, tokens while they come, the view beside them, the
selectors, Stop, the console (which has what the content policy forbids), requests to elsewhere.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

import less_export
from less_export._version import __version__
from less_export.runtime.engine import Engine
from less_export.serving.options import ServerOptions
from less_export.serving.server import Listening, Server

ROOT = Path(__file__).parents[1]
KEY, SECONDS = "page-key", 120
HOSTILE = "<img src=x onerror='document.title=1'></script><script>document.title=2</script> & \"quotes\""
STORY = (ROOT / "less_export" / "data" / "held_out" / "austen.txt").read_text(encoding="utf-8")
#: Tokens of an answer that is stopped while it runs.
LONG_ANSWER = 2000
#: What was found to be as it should be.
passed: list[str] = []


def browser() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,900", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))


def ok(what: str) -> None:
    passed.append(what)
    print(f"ok: {what}", flush=True)


def until(what: str, condition: Callable[[], Any]) -> None:
    for _ in range(SECONDS * 10):
        if condition():
            ok(what)
            return
        time.sleep(0.1)
    raise SystemExit(f"it did not happen: {what}")


def clean(chrome: webdriver.Chrome, page: str, origin: str, *allowed: str) -> None:
    """No message in the console but the ``allowed`` ones, and no request to anywhere else."""
    messages = [e["message"] for e in chrome.get_log("browser") if not any(a in e["message"] for a in allowed)]
    assert not messages, messages
    events = [json.loads(e["message"])["message"] for e in chrome.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert urls, "no request was recorded"
    assert all(u.startswith(origin) for u in urls), urls
    ok(f"{page}: no message in the console, no request to elsewhere")


class View:
    """What a page shows of a state."""

    def __init__(self, chrome: webdriver.Chrome) -> None:
        self.chrome = chrome

    @property
    def text(self) -> str:
        return "".join(e.get_property("textContent") for e in self.chrome.find_elements(By.CSS_SELECTOR, ".tokens"))

    @property
    def tokens_seen(self) -> int:
        found = self.chrome.find_elements(By.CSS_SELECTOR, ".tile strong")
        return int(found[0].text.replace(",", "")) if found else 0

    @property
    def first_title(self) -> str:
        return str(self.chrome.find_element(By.CSS_SELECTOR, ".tokens .kept").get_attribute("title"))

    def kept(self) -> frozenset[int]:
        """Places of the tokens that are shown as having a slot."""
        script = (
            "return [...document.querySelectorAll('.tokens span')].flatMap((s, i) => s.className === 'kept' ? [i] : [])"
        )
        return frozenset(self.chrome.execute_script(script))

    def selector(self, name: str) -> Select:
        return Select(self.chrome.find_element(By.CSS_SELECTOR, f"[aria-label={name}]"))

    def check_heads(self) -> None:
        """Of the first layer: the tokens of all heads are those of each, as many as the table says."""
        self.selector("layer").select_by_index(0)
        assert not self.chrome.find_element(By.CSS_SELECTOR, "[aria-label=head]").is_enabled(), "a head without a layer"
        self.selector("layer").select_by_index(1)
        until("scores of a layer", lambda: "score" in self.first_title)
        heads = self.selector("head")
        together, alone = self.kept(), []
        for index in range(1, len(heads.options)):
            heads.select_by_index(index)
            alone.append(self.kept())
        heads.select_by_index(0)
        assert together == self.kept() == frozenset().union(*alone)
        row = self.chrome.find_element(By.CSS_SELECTOR, "tbody tr").text
        assert f" {sum(map(len, alone)) / len(alone):.0f} of " in row, row
        ok("the tokens of each head")


class Page(View):
    """The server's page."""

    def __init__(self, chrome: webdriver.Chrome, origin: str) -> None:
        super().__init__(chrome)
        self.origin = origin

    def at(self, name: str) -> Any:
        return self.chrome.find_element(By.ID, name)

    def enter(self, name: str, value: object) -> None:
        self.chrome.execute_script("arguments[0].value = arguments[1]", self.at(name), value)

    def answer(self) -> str:
        """The latest one, so far."""
        script = "return [...document.querySelectorAll('.message.assistant')].at(-1)?.textContent ?? ''"
        return str(self.chrome.execute_script(script))

    def begin(self, kind: str, tokens: int) -> None:
        """A new conversation, or text; greedy."""
        Select(self.at("kind")).select_by_value(kind)
        self.at("again").click()
        self.enter("temperature", 0)
        self.enter("tokens", tokens)

    def send(self, prompt: str) -> None:
        self.enter("prompt", prompt)
        self.at("send").click()

    def ask(self, prompt: str) -> None:
        self.send(prompt)
        until("an answer", lambda: self.at("send").is_enabled())
        until("its view", lambda: "end" in self.at("status").text and prompt[:60] in self.text)

    def get(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """What the server says to another client."""
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(
            urllib.request.Request(self.origin + path, data, headers), timeout=SECONDS
        ) as reply:
            return bytes(reply.read())

    def check_text(self, picture: Path | None) -> None:
        self.begin("text", 60)
        self.ask(HOSTILE)
        assert HOSTILE in self.text
        assert self.chrome.title == "less-export", "the prompt was taken as markup"
        self.begin("text", 60)
        self.ask(STORY[:2600].rstrip())
        self.check_heads()
        layers = self.selector("layer")
        layers.select_by_index(len(layers.options) - 1)
        self.at("log").click()
        if picture:
            self.chrome.save_screenshot(str(picture))

    def check_chat(self) -> None:
        """Two turns: the second one has the first one before it."""
        self.begin("chat", 30)
        messages: list[dict[str, str]] = []
        for prompt in ("Who are you?", f"And what is this: {HOSTILE}"):
            self.ask(prompt)
            messages.append({"role": "user", "content": prompt})
            body = {"messages": messages, "temperature": 0, "max_tokens": 30}
            want = json.loads(self.get("v1/chat/completions", body))["choices"][0]["message"]
            assert self.answer() == want["content"] != "", (self.answer(), want)
            messages.append(want)
        ok("the answers of a chat are those of the API")

    def check_stop(self) -> None:
        """Tokens and their view come while the answer runs, until Stop."""
        self.begin("text", LONG_ANSWER)
        self.send("Once upon a time")

        def runs() -> bool:
            return bool(self.at("stop").is_enabled())

        until("the begin of an answer", self.answer)
        said = self.answer()
        until("more of it while it runs", lambda: len(self.answer()) > len(said) and runs())
        assert self.answer().startswith(said)
        until("a live view", lambda: self.at("status").text == "live" and runs())
        seen = self.tokens_seen
        until("more tokens in it while the answer runs", lambda: self.tokens_seen > seen and runs())
        self.at("stop").click()
        until("Stop ends the answer", lambda: self.at("send").is_enabled())
        until("Stop frees the row", lambda: b"less_rows_running 0.0" in self.get("metrics"))
        assert b'less_sequences_total{outcome="cancelled"} 1.0' in self.get("metrics")
        until("the view is at its end", lambda: "end" in self.at("status").text)
        assert self.tokens_seen < LONG_ANSWER
        body = {"prompt": f"Once upon a time{self.answer()} And then", "temperature": 0, "max_tokens": 30}
        self.enter("tokens", 30)
        self.ask(" And then")
        want = json.loads(self.get("v1/completions", body))["choices"][0]["text"]
        assert self.answer() == want != "", (self.answer(), want)
        ok("the text goes on from where Stop left it")

    def check(self, picture: Path | None) -> None:
        self.chrome.get(self.origin)
        until("the page asks for the key", lambda: self.at("key").is_displayed())
        self.at("key").send_keys(KEY)
        Select(self.at("kind")).select_by_value("text")
        until("the model's name", lambda: self.at("model").text)
        self.check_chat()
        self.check_stop()
        self.check_text(picture)
        clean(self.chrome, "the page", self.origin, "401 (Unauthorized)")


def check_file(chrome: webdriver.Chrome, bundle: str, folder: Path, picture: Path | None) -> None:
    text, page, view = folder / "austen.txt", folder / "austen.html", View(chrome)
    text.write_text(f"{STORY[:9000]}\n{HOSTILE}", encoding="utf-8")
    argv = [sys.executable, "-m", "less_export", "inspect", bundle, "--prompt-file", str(text), "--html", str(page)]
    subprocess.run(argv, check=True)
    chrome.get(page.as_uri())
    until("the file", lambda: HOSTILE in view.text)
    assert chrome.title.endswith("austen.txt"), "the text was taken as markup"
    view.check_heads()
    layers = view.selector("layer")
    for index in range(1, len(layers.options)):
        layers.select_by_index(index)
        assert "score" in view.first_title
    chrome.find_element(By.TAG_NAME, "h1").click()
    if picture:
        chrome.save_screenshot(str(picture))
    clean(chrome, "the file", "file://")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="a bundle for ONNX Runtime with a tokenizer and a chat template")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="save pictures of both pages")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what was found as JSON")
    args = parser.parse_args()
    pictures = [args.images / f"{name}.png" if args.images else None for name in ("page", "inspect")]
    listening = Listening(port=0)
    with tempfile.TemporaryDirectory() as folder, listening.open() as opened:
        engine = Engine(less_export.open_bundle(args.bundle))
        options = ServerOptions(Path(args.bundle).resolve().name, api_key=KEY)
        server = Server(engine, options, listening, opened)
        thread = threading.Thread(target=server.run)
        thread.start()
        chrome = browser()
        versions = {
            "less-export": __version__,
            "chromium": chrome.capabilities["browserVersion"],
            "selenium": importlib.metadata.version("selenium"),
        }
        try:
            Page(chrome, listening.url(opened).removesuffix("v1")).check(pictures[0])
            check_file(chrome, args.bundle, Path(folder), pictures[1])
        finally:
            chrome.quit()
            server.end()
            thread.join()
    if args.out:
        found = {"versions": versions, "bundle": options.model_name, "passed": passed}
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
