"""``less-export serve`` as a process on 127.0.0.1, with OpenAI's client for it."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai

#: Seconds after which a test fails that waits for something.
LONG = 90


class Process:
    """A server process; ``url`` is that of its API. It is killed after ``seconds``, so that no test waits for ever."""

    def __init__(
        self, bundle: Path, *arguments: object, environment: dict[str, str] | None = None, seconds: float = LONG
    ) -> None:
        argv = [sys.executable, "-m", "less_export", "serve", str(bundle), "--port", "0", "--threads", "1"]
        self.child = subprocess.Popen(
            [*argv, *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self._deadline = threading.Timer(seconds, self.child.kill)
        self._deadline.daemon = True
        self._deadline.start()
        assert self.child.stderr is not None
        self.lines: list[str] = []
        for line in self.child.stderr:
            self.lines.append(line)
            if match := re.search(r"serving (\S+) at (http\S+)", line):
                self.name, self.url = match.groups()
                break
        else:
            raise AssertionError("".join(self.lines))
        self.client = openai.OpenAI(base_url=self.url, api_key="key", max_retries=0, timeout=LONG)

    def health(self) -> int | None:
        """Status of /health; None if nobody listens."""
        place = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=LONG)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        except OSError:
            return None
        finally:
            connection.close()

    def wait(self) -> int:
        """The exit code, once it has ended."""
        code = self.child.wait(LONG)
        assert self.child.stderr is not None
        self.lines += self.child.stderr.readlines()
        return code

    def close(self) -> None:
        self._deadline.cancel()
        self.client.close()
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        assert self.child.stderr is not None
        self.child.stderr.close()


@contextlib.contextmanager
def process(bundle: Path, *arguments: object, **options: Any) -> Iterator[Process]:
    server = Process(bundle, *arguments, **options)
    try:
        yield server
    finally:
        server.close()
