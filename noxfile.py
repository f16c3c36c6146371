"""The core of the test suite with the oldest, the pinned and the newest releases of what less-export depends on.

``nox`` runs all sessions, ``nox -s lowest`` one of them. Each writes its row of ``benchmarks/results/versions.json``;
``benchmarks/tables.py`` then renews the table in the documentation. The newest torch is a CUDA build of several GB.
"""

import re
import tomllib
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
#: Discovery of the families, export, parity, generation, check.
CORE = [f"tests/test_{n}.py" for n in ("surgery", "agreement", "ops", "generate", "runtime", "commands")]
TOOLS = ["pytest", "hypothesis"]
EXTRAS = ".[export,cpu]"


@nox.session
def lowest(session: nox.Session) -> None:
    """The lower bounds of the extras ``export`` and ``cpu``."""
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    bounds = [re.fullmatch(r"([\w-]+)>=([\w.]+).*", r) for name in ("export", "cpu") for r in extras[name]]
    constraints = Path(session.create_tmp()) / "lowest.txt"
    constraints.write_text("".join(f"{b[1]}=={b[2]}\n" for b in bounds if b))
    _test(session, "-c", str(constraints))


@nox.session
def pinned(session: nox.Session) -> None:
    """The versions that continuous integration installs."""
    _test(session, "-c", "scripts/constraints.txt")


@nox.session
def newest(session: nox.Session) -> None:
    """The newest releases."""
    _test(session, "--upgrade")


def _test(session: nox.Session, *options: str) -> None:
    session.install(*options, "-e", EXTRAS, *TOOLS)
    results = Path(session.create_tmp()).resolve() / "results.xml"
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    session.run("python", "-m", "pytest", "-m", "not slow and not exhaustive", f"--junit-xml={results}", *CORE, env=env)
    session.run("python", "benchmarks/versions.py", session.name, str(results))
