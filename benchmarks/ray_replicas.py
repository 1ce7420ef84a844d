"""One and two replicas on Ray Serve against plain `lowkey-serve`: tokens/s, latencies in a closed loop of streams, and
the processor time of everything but the engines.

    python benchmarks/ray_replicas.py --streams 16 --requests 48

All are up for the whole run and take turns, on one machine: two replicas need cores of their own to be faster.
Needs the extra `ray`.
"""

import argparse
import asyncio
import os
import socket
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

os.environ |= {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
}

import httpx
import psutil
import ray
from _serving import MODEL, Server, table, variants, workload
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from loadtest.client import closed_loop, summarise
from modeling.checkpoint import open_checkpoint

START_S = 300.0


def deploy(config: Path, streams: int) -> dict[str, str]:
    """Applications of one and of two replicas; their addresses by name."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    addresses = {f"{n} replica{'s' * (n > 1)}": f"http://127.0.0.1:{port}/{n}" for n in (1, 2)}
    front = {"name": "Front", "ray_actor_options": {"num_cpus": 0}}
    document = {
        "applications": [
            {
                "name": name.replace(" ", "-"),
                "route_prefix": f"/{n}",
                "import_path": "server.ray_app:build",
                "args": {"config": str(config)},
                "deployments": [
                    front,
                    {"name": "Lowkey", "num_replicas": n, "max_ongoing_requests": streams},
                ],
            }
            for n, name in enumerate(addresses, 1)
        ]
    }
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(document))
    deadline = time.monotonic() + START_S
    for (name, url), n in zip(addresses.items(), (1, 2), strict=True):
        while running(url) != n:
            if time.monotonic() > deadline:
                raise SystemExit(f"{name} never came up: {serve.status()}")
            time.sleep(0.5)
    return addresses


def running(url: str) -> int:
    """How many replicas answer."""
    response = httpx.get(f"{url}/metrics", timeout=60)
    return response.text.count("\nlowkey_engine_up{") // 2 if response.status_code == 200 else 0


def ray_cpu_seconds() -> float:
    """Processor time so far of Ray's proxy, fronts and replicas, without the engines."""
    total = 0.0
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith(("ray::ServeReplica", "ray::ProxyActor")):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--requests", type=int, default=48, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    vocab = open_checkpoint(str(options.model)).spec.vocab_size
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="ray-") as directory:
        checkpoints = variants(Path(directory), options.model)
        config = Path(directory) / "lowkey.toml"
        lines = [f'{name} = "{path}"' for name, path in checkpoints.items()]
        config.write_text("\n".join([f"max_requests = {options.streams}", "[variants]", *lines]))
        os.environ["RAY_TMPDIR"] = directory
        ray.init(num_cpus=3, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
        server = Server(checkpoints, "--max-requests", str(options.streams))
        try:
            addresses = {"lowkey-serve": server.url, **deploy(config, options.streams)}
            for number in range(options.rounds):
                completions = workload(options.requests, vocab, (64, 128), (64, 128), seed=number)
                for name, url in addresses.items():
                    spent = server.cpu_seconds if url == server.url else ray_cpu_seconds
                    before = spent()
                    results, seconds = asyncio.run(
                        closed_loop(url, "dense", completions, options.streams, temperature=0)
                    )
                    summary = summarise(results, seconds)
                    if summary.errors:
                        raise SystemExit(f"{name}: {next(r.error for r in results if r.error)}")
                    cpu = 1e6 * (spent() - before) / summary.tokens
                    found.setdefault(name, []).append({**asdict(summary), "cpu_us_per_token": cpu})
                    print(f"round {number + 1}, {name}: {summary.tokens_per_second:.0f} tok/s", flush=True)
        finally:
            server.stop()
            serve.shutdown()
            ray.shutdown()
    print()
    print(report(found))


def report(found: dict[str, list[dict[str, float]]]) -> str:
    """Medians over rounds; ratios are of the same round."""
    one = [r["tokens_per_second"] for r in found["1 replica"]]
    rows = []
    for name, rounds in found.items():
        ratios = [r["tokens_per_second"] / o for r, o in zip(rounds, one, strict=True)]
        middle = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        rows.append(
            (
                name,
                f"{middle['tokens_per_second']:.0f}",
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f}-{max(ratios):.2f}",
                f"{1e3 * middle['ttft_median_s']:.0f}",
                f"{1e3 * middle['itl_median_s']:.1f}",
                f"{1e3 * middle['itl_p99_s']:.1f}",
                f"{middle['cpu_us_per_token']:.0f}",
            )
        )
    return table(("", "tok/s", "to 1 replica", "spread", "TTFT ms", "ITL ms", "p99", "CPU us"), rows)


if __name__ == "__main__":
    main()
