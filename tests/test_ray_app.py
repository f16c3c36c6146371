"""What Ray Serve runs, without Ray; ``scripts/ray_check.py`` runs the same in Ray itself."""

from __future__ import annotations

import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from less_export import open_bundle
from less_export.errors import UsageError
from less_export.runtime.engine import StoppedError
from less_export.serving.options import ServerOptions
from less_export.serving.ray_app import REPLICA_HEADER, Replica, application, deployment_settings

from .bundles import PROMPT

pytest_plugins = ["tests.bundles"]
#: What the deployments of Ray 2.60 take of the settings.
SETTINGS = {
    "name", "autoscaling_config", "max_ongoing_requests", "max_queued_requests", "ray_actor_options",
    "graceful_shutdown_timeout_s", "health_check_period_s", "health_check_timeout_s",
}  # fmt: skip


def test_replicas_answer_as_the_server_and_share_sessions(plain: Path, tmp_path: Path) -> None:
    """The options arrive pickled."""
    options = pickle.loads(pickle.dumps(ServerOptions("m", state_dir=tmp_path, api_key="k")))
    replicas = [Replica(str(plain), options, {"threads": 1}, 2, 4, None) for _ in range(2)]
    one, other = (TestClient(r.__serve_build_asgi_app__(), headers={"Authorization": "Bearer k"}) for r in replicas)
    (alone,) = open_bundle(plain).generate([PROMPT], max_new_tokens=6, ignore_eos=True)
    body = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    texts = []
    for second in (one, other):
        first = one.post("/v1/completions", json={**body, "prompt": PROMPT, "session_id": "new"}).json()
        assert first["choices"][0]["text"] == alone.text
        more = {**body, "prompt": " a cat", "session_id": first["session_id"]}
        reply = second.post("/v1/completions", json=more)
        assert reply.headers[REPLICA_HEADER]
        texts.append(reply.json()["choices"][0]["text"])
    assert (
        texts[0]
        == texts[1]
        != other.post("/v1/completions", json={**body, "prompt": " a cat"}).json()["choices"][0]["text"]
    )
    assert TestClient(one.app).get("/v1/models").status_code == 401
    for replica, client in zip(replicas, (one, other), strict=True):
        replica.check_health()
        replica.close()
        with pytest.raises(StoppedError, match="has failed or stopped"):
            replica.check_health()
        assert client.get("/health").status_code == 503


def test_what_ray_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    class Deployment:
        def bind(self, *args: Any) -> tuple[Any, ...]:
            return args

    def deployment(**settings: Any) -> Any:
        told.update(settings)
        return lambda replica: Deployment() if replica is Replica else None

    ray = types.ModuleType("ray")
    ray.serve = types.SimpleNamespace(deployment=deployment, ingress=lambda: lambda replica: replica)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    options = ServerOptions("m", timeout=90)
    bound = application(
        "b", options, rows=3, max_queue=8, max_replicas=4, actor={"num_cpus": 2}, autoscaling={"upscale_delay_s": 1}
    )
    assert bound == (str(Path("b").absolute()), options, {}, 3, 8, None)
    assert set(told) == SETTINGS
    assert told["autoscaling_config"] == {
        "min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 3, "upscale_delay_s": 1,
    }  # fmt: skip
    assert (told["max_ongoing_requests"], told["max_queued_requests"]) == (6, 8)
    assert (told["ray_actor_options"], told["graceful_shutdown_timeout_s"]) == ({"num_cpus": 2}, 90)


@pytest.mark.parametrize(
    ("sizes", "match"),
    [((2, 8, 0, 1), "a range from 1, not 0 to 1"), ((2, 8, 3, 2), "3 to 2"), ((0, 8, 1, 1), "rows and max_queue")],
)
def test_impossible_settings(sizes: tuple[int, int, int, int], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        deployment_settings(ServerOptions("m"), *sizes, None, None)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'less-export\[ray\]'"):
        application("b", ServerOptions("m"), rows=1)
