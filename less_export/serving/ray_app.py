"""A bundle behind Ray Serve: replicas of the server that come and go with the load."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from fastapi import FastAPI

from ..errors import UsageError, install_hint
from ..runtime.engine import Engine, StoppedError
from ..runtime.open import open_bundle
from .app import build_app
from .options import ServerOptions

#: Names the replica that answered.
REPLICA_HEADER = "x-less-replica"
#: Seconds between two looks at a replica, and after which one that does not answer is replaced.
_HEALTH_PERIOD, _HEALTH_TIMEOUT = 10.0, 30.0


class Replica:
    """One engine and the application over it, as Ray Serve runs them: on every replica its own."""

    def __init__(
        self,
        bundle: str,
        options: ServerOptions,
        model: Mapping[str, Any],
        rows: int,
        max_queue: int,
        piece: int | None,
    ) -> None:
        opened = open_bundle(bundle, **model)
        self._engine = Engine(opened, rows=rows, piece=piece, max_queue=max_queue)
        self._options = options

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray sends the requests to; called once, after the constructor."""
        app = build_app(self._engine, self._options)
        app.add_middleware(_Named, name=_replica_name())
        return app

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica that raises.

        Raises:
            StoppedError: the engine has failed.
        """
        if not self._engine.accepts:
            raise StoppedError("the engine of this replica has failed or stopped")

    def close(self) -> None:
        """Stop the engine; Ray ends the process of a replica and need not call it."""
        self._engine.stop()


def application(
    bundle: str | os.PathLike[str],
    options: ServerOptions,
    *,
    rows: int,
    max_queue: int = 64,
    piece: int | None = None,
    min_replicas: int = 1,
    max_replicas: int = 1,
    model: Mapping[str, Any] | None = None,
    actor: Mapping[str, Any] | None = None,
    autoscaling: Mapping[str, Any] | None = None,
) -> Any:
    """What ``ray.serve.run`` runs: the API of ``less-export serve`` over replicas of a bundle.

    Args:
        bundle: its path on every machine that may run a replica; less-export must be installed there.
        options: as for the server. Sessions move between replicas that share ``state_dir``, a folder or a URL of
            fsspec.
        rows: sequences that run at a time in a replica: Ray adds replicas where there are more for each.
        max_queue: sequences that may wait in a replica, and requests that may wait for one.
        piece: tokens of a prompt that are fed at a time; default the bundle's chunk.
        min_replicas, max_replicas: how many replicas there may be.
        model: options of :func:`less_export.open_bundle`, such as ``{"threads": 2}``.
        actor: Ray's options of a replica's actor, such as ``{"num_cpus": 2}``.
        autoscaling: fields of Ray's ``AutoscalingConfig`` that replace those made of the arguments.

    Raises:
        UsageError: Ray is not installed; ``min_replicas`` and ``max_replicas`` are no range.
    """
    try:
        from ray import serve
    except ImportError:
        raise UsageError(f"Ray Serve is not installed: {install_hint('ray')}") from None
    settings = deployment_settings(options, rows, max_queue, min_replicas, max_replicas, actor, autoscaling)
    deployment = serve.deployment(**settings)(serve.ingress()(Replica))
    return deployment.bind(os.path.abspath(bundle), options, dict(model or {}), rows, max_queue, piece)


def deployment_settings(
    options: ServerOptions,
    rows: int,
    max_queue: int,
    min_replicas: int,
    max_replicas: int,
    actor: Mapping[str, Any] | None,
    autoscaling: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Arguments of ``ray.serve.deployment``; see :func:`application`.

    A replica is sent twice as many requests as it has rows, so that one is ready whenever a row becomes free; the
    others wait where a new replica can take them.
    """
    if not 1 <= min_replicas <= max_replicas:
        raise UsageError(f"min_replicas and max_replicas must be a range from 1, not {min_replicas} to {max_replicas}")
    if rows < 1 or max_queue < 1:
        raise UsageError(f"rows and max_queue must be at least 1, not {rows} and {max_queue}")
    scale = {"min_replicas": min_replicas, "max_replicas": max_replicas, "target_ongoing_requests": rows}
    return {
        "name": "less-export",
        "autoscaling_config": {**scale, **(autoscaling or {})},
        "max_ongoing_requests": 2 * rows,
        "max_queued_requests": max_queue,
        "ray_actor_options": dict(actor or {}),
        "graceful_shutdown_timeout_s": options.timeout,
        "health_check_period_s": _HEALTH_PERIOD,
        "health_check_timeout_s": _HEALTH_TIMEOUT,
    }


def _replica_name() -> str:
    """Ray's name of this replica; that of the process outside of Ray."""
    try:
        from ray import serve

        return str(serve.get_replica_context().replica_id.unique_id)
    except Exception:  # no Ray, or no replica of it
        return str(os.getpid())


_Message = MutableMapping[str, Any]


class _Named:
    """Adds the name of the replica to every reply."""

    def __init__(self, app: Callable[..., Awaitable[None]], name: str) -> None:
        self._app, self._header = app, (REPLICA_HEADER.encode(), name.encode())

    async def __call__(self, scope: _Message, receive: Any, send: Callable[[_Message], Awaitable[None]]) -> None:
        async def named(message: _Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), self._header]}
            await send(message)

        await self._app(scope, receive, named)
