"""The container file and the manifest for Kubernetes: linted, and true to the server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from less_export.cli import serve
from less_export.serving.options import ServerOptions

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "container"
MANIFEST, IMAGE = FOLDER / "kubernetes.yaml", FOLDER / "Dockerfile"
YAML_RULES = "{extends: default, rules: {line-length: {max: 120}, braces: {max-spaces-inside: 0}}}"


def documents() -> dict[str, Any]:
    """The manifest's objects; those of the same kind by their names."""
    objects = list(yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8")))
    return {o["kind"] if o["kind"] != "PersistentVolumeClaim" else o["metadata"]["name"]: o for o in objects}


def instruction(name: str) -> str:
    lines = IMAGE.read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix(name).strip() for line in lines if line.startswith(f"{name} "))


def test_the_manifest_is_clean() -> None:
    argv = [sys.executable, "-m", "yamllint", "--strict", "-d", YAML_RULES, str(MANIFEST)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["Deployment", "Service", "less-export-bundle", "less-export-sessions"])
def test_kubernetes_takes_every_object(name: str) -> None:
    kubernetes_validate.validate(documents()[name], kubernetes_validate.latest_version(), strict=True)


def test_the_container_file_is_clean() -> None:
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    assert hadolint is not None
    done = subprocess.run([hadolint, str(IMAGE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_has_what_it_installs() -> None:
    """The context leaves out everything that is not named."""
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"}
    assert {"less_export", "models", "plugins_trt", "pyproject.toml", "README.md", "LICENSE"} <= kept
    assert all((ROOT / name).exists() for name in kept)
    assert "scripts/constraints.txt" in kept


def test_the_objects_fit_together() -> None:
    objects = documents()
    deployment, pod = objects["Deployment"]["spec"], objects["Deployment"]["spec"]["template"]
    labels, (server,) = pod["metadata"]["labels"], pod["spec"]["containers"]
    assert deployment["selector"]["matchLabels"] == objects["Service"]["spec"]["selector"] == labels
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] == server["ports"][0]["name"]
    volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
    assert {m["name"] for m in server["volumeMounts"]} == set(volumes)
    claims = [v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v]
    assert set(claims) <= set(objects)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": "http"}


def test_the_server_takes_the_arguments() -> None:
    pod = documents()["Deployment"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    mounts = {m["mountPath"] for m in server["volumeMounts"]}
    args = serve.parser().parse_args(server["args"])
    assert {args.bundle, str(args.state_dir)} <= mounts
    assert args.port == server["ports"][0]["containerPort"] == int(instruction("EXPOSE"))
    assert pod["terminationGracePeriodSeconds"] > args.timeout == ServerOptions("m").timeout
    assert server["resources"]["limits"]["cpu"] == str(args.threads)
    assert server["env"][0]["name"] == "LESS_EXPORT_API_KEY"
    assert json.loads(instruction("ENTRYPOINT")) == ["less-export", "serve"]
    alone = serve.parser().parse_args(json.loads(instruction("CMD")))
    assert (alone.bundle, alone.host, alone.port, str(alone.state_dir)) == ("/bundle", "0.0.0.0", 8000, "/sessions")
    assert f"install -d -o less -g less -m 700 {alone.state_dir}" in IMAGE.read_text(encoding="utf-8")
    assert instruction("USER") == f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
