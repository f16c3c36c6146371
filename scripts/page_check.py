"""Use the server's page and the file of ``less-export inspect`` in headless Chromium, and save screenshots of both.

    python scripts/page_check.py BUNDLE [--images docs/images]

Needs Debian's ``chromium`` and ``chromium-driver``, and the package ``selenium``. Ends at the first thing that is not
as it should be: answers, the view beside them, the console (which has what the content policy forbids), requests.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

import less_export
from less_export.runtime.engine import Engine
from less_export.serving.options import ServerOptions
from less_export.serving.server import Listening, Server

ROOT = Path(__file__).parents[1]
KEY, SECONDS = "page-key", 120
HOSTILE = "<img src=x onerror='document.title=1'></script><script>document.title=2</script> & \"quotes\""
STORY = (ROOT / "less_export" / "data" / "held_out" / "austen.txt").read_text(encoding="utf-8")


def browser() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,900", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))


def until(what: str, condition: Callable[[], Any]) -> None:
    for _ in range(SECONDS * 10):
        if condition():
            print(f"ok: {what}", flush=True)
            return
        time.sleep(0.1)
    raise SystemExit(f"it did not happen: {what}")


def clean(chrome: webdriver.Chrome, origin: str, *allowed: str) -> None:
    """No message in the console but the ``allowed`` ones, and no request to anywhere else."""
    messages = [e["message"] for e in chrome.get_log("browser") if not any(a in e["message"] for a in allowed)]
    assert not messages, messages
    events = [json.loads(e["message"])["message"] for e in chrome.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert urls, "no request was recorded"
    assert all(u.startswith(origin) for u in urls), urls
    print("ok: no message in the console, no request to elsewhere")


def shown_text(chrome: webdriver.Chrome) -> str:
    return "".join(e.get_property("textContent") for e in chrome.find_elements(By.CSS_SELECTOR, ".tokens"))


def first_title(chrome: webdriver.Chrome) -> str:
    return str(chrome.find_element(By.CSS_SELECTOR, ".tokens .kept").get_attribute("title"))


def layers_of(chrome: webdriver.Chrome) -> Select:
    return Select(chrome.find_element(By.CSS_SELECTOR, "[aria-label=layer]"))


def check_page(chrome: webdriver.Chrome, origin: str, picture: Path) -> None:
    def at(name: str) -> Any:
        return chrome.find_element(By.ID, name)

    def enter(name: str, value: object) -> None:
        chrome.execute_script("arguments[0].value = arguments[1]", at(name), value)

    def ask(prompt: str) -> None:
        enter("prompt", prompt)
        at("send").click()
        until("an answer", lambda: at("send").is_enabled())
        until("its view", lambda: "end" in at("status").text and prompt[:60] in shown_text(chrome))

    chrome.get(origin)
    until("the page asks for the key", lambda: at("key").is_displayed())
    at("key").send_keys(KEY)
    Select(at("kind")).select_by_value("text")
    until("the model's name", lambda: at("model").text)
    enter("temperature", 0)
    enter("tokens", 60)
    ask(HOSTILE)
    assert HOSTILE in shown_text(chrome)
    assert chrome.title == "less-export", "the prompt was taken as markup"
    at("again").click()
    ask(STORY[:2600].rstrip())
    layers_of(chrome).select_by_index(len(layers_of(chrome).options) - 1)
    until("scores of a layer", lambda: "score" in first_title(chrome))
    at("log").click()
    chrome.save_screenshot(str(picture))
    clean(chrome, origin, "401 (Unauthorized)")


def check_file(chrome: webdriver.Chrome, bundle: str, folder: Path, picture: Path) -> None:
    text, page = folder / "austen.txt", folder / "austen.html"
    text.write_text(f"{STORY[:9000]}\n{HOSTILE}", encoding="utf-8")
    argv = [sys.executable, "-m", "less_export", "inspect", bundle, "--prompt-file", str(text), "--html", str(page)]
    subprocess.run(argv, check=True)
    chrome.get(page.as_uri())
    until("the file", lambda: HOSTILE in shown_text(chrome))
    assert chrome.title.endswith("austen.txt"), "the text was taken as markup"
    for index in range(1, len(layers_of(chrome).options)):
        layers_of(chrome).select_by_index(index)
        assert "score" in first_title(chrome)
    layers_of(chrome).select_by_index(len(layers_of(chrome).options) - 1)
    chrome.find_element(By.TAG_NAME, "h1").click()
    chrome.save_screenshot(str(picture))
    clean(chrome, "file://")


def main() -> None:
    parser = argparse.ArgumentParser(description="Use the pages in headless Chromium")
    parser.add_argument("bundle", help="a bundle for ONNX Runtime with a tokenizer")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    listening = Listening(port=0)
    with tempfile.TemporaryDirectory() as folder, listening.open() as opened:
        engine = Engine(less_export.open_bundle(args.bundle))
        options = ServerOptions(Path(args.bundle).resolve().name, api_key=KEY)
        server = Server(engine, options, listening, opened)
        thread = threading.Thread(target=server.run)
        thread.start()
        chrome = browser()
        try:
            check_page(chrome, listening.url(opened).removesuffix("v1"), args.images / "page.png")
            check_file(chrome, args.bundle, Path(folder), args.images / "inspect.png")
        finally:
            chrome.quit()
            server.end()
            thread.join()


if __name__ == "__main__":
    main()
