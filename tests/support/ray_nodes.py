"""A Ray cluster of two nodes on this machine, for tests and measurements."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # no token in the home directory
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # other processes of the machine are not Ray's to judge
}


def processes(command: str) -> list[psutil.Process]:
    """The processes below this one that have the text in their command line: other clusters are not ours."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if command in " ".join(process.cmdline()):
                found.append(process)
    return found


@contextmanager
def two_nodes(cpus: int, **environment: str) -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` of two nodes of `cpus` CPUs each. All of its processes are gone at the end."""
    before = dict(os.environ)
    directory = tempfile.mkdtemp(prefix="ray-")  # short: sockets lie in it
    os.environ.update(QUIET | {"RAY_TMPDIR": directory} | environment)
    import ray
    from ray.cluster_utils import Cluster

    options = {"num_cpus": cpus, "object_store_memory": 100 * 2**20}
    cluster = Cluster()
    try:
        cluster.add_node(include_dashboard=False, **options)
        cluster.add_node(**options)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        left = [p for p in psutil.process_iter(["cmdline"]) if directory in " ".join(p.info["cmdline"] or [])]
        for process in left:
            process.kill()
        psutil.wait_procs(left)
        shutil.rmtree(directory, ignore_errors=True)
        os.environ.clear()
        os.environ.update(before)
