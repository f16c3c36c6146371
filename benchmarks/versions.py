"""Record which releases a session of ``nox`` tested: ``python benchmarks/versions.py SESSION RESULTS.xml``."""

from __future__ import annotations

import json
import platform
import sys
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path

from less_export.versions import TESTED

RESULTS = Path(__file__).parent / "results" / "versions.json"


def main(session: str, results: str) -> None:
    suite = next(ElementTree.parse(results).getroot().iter("testsuite"))
    tests, failed = int(suite.attrib["tests"]), int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows[session] = {
        "python": platform.python_version(),
        "packages": {package: metadata.version(package) for package in TESTED},
        "passed": tests - failed - int(suite.attrib["skipped"]),
        "failed": failed,
    }
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
