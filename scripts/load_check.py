"""Load a server with two load generators of the field, guidellm and aiperf: every request must succeed.

    PYTHONPATH=benchmarks python scripts/load_check.py BUNDLE --guidellm PROGRAM --aiperf PROGRAM [--out FILE]

Runs in the environment of the tests. The programs come from virtual environments of their own, made by
``pip install guidellm`` and ``pip install aiperf``. Each sends 16 requests, four at a time. Ends at the first failure.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_common import machine
from free_ports import free_ports

from less_export._version import __version__
from less_export.bundle.artifact import Bundle

REQUESTS, AT_A_TIME = 16, 4
PROMPT_TOKENS, NEW_TOKENS = 64, 16
SECONDS = 300
MODEL = "model"


@contextlib.contextmanager
def server(bundle: Path, folder: Path) -> Iterator[str]:
    """A running server; yields its address."""
    (port,) = free_ports(1)
    argv = [sys.executable, "-m", "less_export", "serve", str(bundle), "--port", str(port), "--max-rows", "4"]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen([*argv, "--served-model-name", MODEL], stdout=log, stderr=subprocess.STDOUT)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server did not start: {(folder / 'server.log').read_text()[-2000:]}")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        if process.wait(60) != 0:
            raise SystemExit(f"the server ended with code {process.returncode}")


def tokenizer(bundle: Path, folder: Path) -> Path:
    """The bundle's tokenizer as a folder that transformers reads."""
    target = folder / "tokenizer"
    target.mkdir()
    shutil.copy(bundle / "tokenizer.json", target)
    (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return target


def run(argv: list[str], folder: Path) -> None:
    """Run a program in ``folder``. (aiperf refuses folders of tokenizers where HF_HUB_OFFLINE is set.)"""
    environment = {n: v for n, v in os.environ.items() if n != "HF_HUB_OFFLINE"} | {"HF_HOME": str(folder / "home")}
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise SystemExit(f"{Path(argv[0]).name} failed: {(done.stdout + done.stderr)[-3000:]}")


def version(program: str) -> str:
    """Version of the package that a program in a virtual environment belongs to."""
    name = Path(program).name
    code = f"import importlib.metadata; print(importlib.metadata.version('{name}'))"
    return subprocess.check_output([str(Path(program).parent / "python"), "-c", code], text=True).strip()


def guidellm(program: str, url: str, names: Path, folder: Path) -> tuple[int, int]:
    """Requests that succeeded, and that did not."""
    options = {
        "backend": f"kind=openai_http,target={url},model={MODEL},request_format=/v1/completions",
        "profile": f"kind=concurrent,streams={AT_A_TIME}",
        "constraint": f"kind=max_requests,count={REQUESTS}",
        "tokenizer": f"kind=huggingface_auto,model={names}",
        "data": f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={NEW_TOKENS}",
        "output": f"kind=json,path={folder / 'guidellm.json'}",
    }
    run([program, "run", "--disable-console", *(x for n, v in options.items() for x in (f"--{n}", v))], folder)
    (benchmark,) = json.loads((folder / "guidellm.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    return totals["successful"], totals["total"] - totals["successful"]


def aiperf(program: str, url: str, names: Path, folder: Path) -> tuple[int, int]:
    """Requests that succeeded, and that did not."""
    argv = [program, "profile", "--model", MODEL, "--url", url, "--endpoint-type", "completions", "--streaming"]
    argv += ["--request-count", str(REQUESTS), "--concurrency", str(AT_A_TIME), "--tokenizer", str(names)]
    argv += ["--synthetic-input-tokens-mean", str(PROMPT_TOKENS), "--output-tokens-mean", str(NEW_TOKENS)]
    run([*argv, "--ui-type", "none", "--artifact-dir", str(folder / "aiperf")], folder)
    (file,) = (folder / "aiperf").rglob("profile_export_aiperf.json")
    found: dict[str, Any] = json.loads(file.read_text())
    failed = sum(x["count"] for x in found.get("error_summary", []))
    return int(found["request_count"]["avg"]), failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--guidellm", required=True, metavar="PROGRAM")
    parser.add_argument("--aiperf", required=True, metavar="PROGRAM")
    parser.add_argument("--out", type=Path, help="write what was found as JSON")
    args = parser.parse_args()
    results: dict[str, Any] = {
        "machine": machine(),
        "model": Bundle.open(args.bundle).manifest.model["name"],
        "versions": {"less-export": __version__},
        "requests": REQUESTS,
        "at_a_time": AT_A_TIME,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
    }
    with tempfile.TemporaryDirectory() as name, server(args.bundle.resolve(), Path(name)) as url:
        names = tokenizer(args.bundle, Path(name))
        for load in (guidellm, aiperf):
            program = str(Path(getattr(args, load.__name__)).absolute())
            succeeded, failed = load(program, url, names, Path(name))
            results[load.__name__] = {"succeeded": succeeded, "failed": failed}
            results["versions"][load.__name__] = version(program)
            print(f"{load.__name__}: {succeeded} requests succeeded, {failed} failed")
            if (succeeded, failed) != (REQUESTS, 0):
                raise SystemExit(f"{load.__name__}: not all of {REQUESTS} requests succeeded")
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
