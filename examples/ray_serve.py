"""Serve a bundle by Ray Serve: the API of less-export serve over replicas that come and go with the load.

    pip install 'less-export[ray]'
    python examples/ray_serve.py BUNDLE --state-dir /shared/sessions --max-replicas 4

Sessions move between replicas through the folder, which all machines of the cluster share.
"""

import argparse
import os
import signal
import threading
from pathlib import Path

import ray
from ray import serve

from less_export.serving.options import ServerOptions
from less_export.serving.ray_app import application

parser = argparse.ArgumentParser(description="Serve a bundle by Ray Serve")
parser.add_argument("bundle", type=Path)
parser.add_argument("--host", default="127.0.0.1")
parser.add_argument("--port", type=int, default=8000)
parser.add_argument("--rows", type=int, default=4, help="sequences that run at a time in a replica")
parser.add_argument("--max-replicas", type=int, default=2)
parser.add_argument("--cpus", type=float, default=1, help="of a replica")
parser.add_argument("--state-dir", help="folder or URL of sessions that all replicas share")
args = parser.parse_args()

key = os.environ.get("LESS_EXPORT_API_KEY")
options = ServerOptions(args.bundle.resolve().name, api_key=key, state_dir=args.state_dir)
ray.init(address=os.environ.get("RAY_ADDRESS"))
serve.start(http_options={"host": args.host, "port": args.port})
threads = {"threads": max(1, int(args.cpus))}
serve.run(
    application(
        args.bundle,
        options,
        rows=args.rows,
        max_replicas=args.max_replicas,
        model=threads,
        actor={"num_cpus": args.cpus},
    )
)
print(f"serving {options.model_name} at http://{args.host}:{args.port}/v1 (Ctrl-C ends it)", flush=True)
ended = threading.Event()
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: ended.set())
ended.wait()
serve.shutdown()
