"""The files of the pages, and the document that shows one text: nothing in them comes from outside."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
#: The files of the server's page, by their paths in the server, with their types.
FILES = {
    "/": ("chat.html", "text/html; charset=utf-8"),
    "/page/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "/page/view.js": ("view.js", "text/javascript; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
}
#: What these files may do: load one another, and call the server that they come from.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_DOCUMENT = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<body>
<main class="document"><h1>{title}</h1><div id="view"></div></main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
<script>{start}</script>
</body>
</html>
"""
_START = (
    'LessView.create(document.getElementById("view")).update(JSON.parse(document.getElementById("data").textContent));'
)


def read(name: str) -> bytes:
    """One of the page's files."""
    return (_FOLDER / name).read_bytes()


def document(view: dict[str, Any], title: str) -> str:
    """An HTML file that shows a view (:func:`less_export.view.occupancy.view`) by itself, offline."""
    style, script = (read(n).decode() for n in ("page.css", "view.js"))
    policy = "; ".join(
        (
            "default-src 'none'",
            f"style-src {_hash(style)}",
            f"script-src {_hash(script)} {_hash(_START)}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    # In a script element, only "<" could end the data.
    data = json.dumps(view, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return _DOCUMENT.format(
        policy=html.escape(policy), title=html.escape(title), style=style, data=data, script=script, start=_START
    )


def _hash(content: str) -> str:
    """How a policy names a script or style inside of the document."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
