"""When, where and what a test ran against: for the reports, and so that two of them can be told apart."""

import datetime as dt
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

Record = Mapping[str, Any]


def processor() -> str:
    """The CPU's name by /proc/cpuinfo, or the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def circumstances(url: str, version: str, models: list[dict[str, Any]], *, local: bool) -> dict[str, Any]:
    """What the JSON says beside figures and options.

    Args:
        url: Address of the server; a password in it is left out.
        version: the server's own.
        models: what /v1/models said of the tested variants.
        local: whether the server runs on this machine.
    """
    return {
        "date": f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC",
        "machine": {"cpu": processor(), "cpus": os.cpu_count(), "load_15min": os.getloadavg()[2]},
        "server": {"url": without_password(url), "version": version, "local": local},
        "models": models,
    }


def without_password(url: str) -> str:
    return str(httpx.URL(url).copy_with(userinfo=b""))


def about_machine(record: Record) -> str:
    machine = record["machine"]
    where = "client and server on it" if record["server"]["local"] else "only the client on it"
    return (
        f"{machine['cpu']}, {machine['cpus']} CPUs, {where}, "
        f"load average {machine['load_15min']:.1f} over the last 15 minutes"
    )


VARIANT_COLUMNS = (
    "variant",
    "source",
    "family",
    "method",
    "d_k",
    "state bytes",
    "state",
    "device",
    "runtime",
)


def variant_row(model: Record) -> list[str]:
    """The cells of `VARIANT_COLUMNS`, as the server told them; "-" for what it did not tell."""
    told = model["lowkey"]
    names = ("source", "family", "method", "d_k", "state_bytes", "state_dtype", "device", "backend")
    return [str(model["id"]), *(_words(told.get(name)) for name in names)]


def _words(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list) and value and all(isinstance(each, int) for each in value):
        return f"{min(value)} to {max(value)}"  # the widths of the layers
    return str(value)


def sentence(record: Record) -> str:
    """The circumstances of a test in one paragraph."""
    rows = (dict(zip(VARIANT_COLUMNS, variant_row(model), strict=True)) for model in record["models"])
    variants = [
        f"{row['variant']} ({row['source']}, d_k {row['d_k']}, {row['state bytes']} state bytes in {row['state']}, "
        f"on {row['device']}, runtime {row['runtime']})"
        for row in rows
    ]
    return (
        f"{record['date']}, {about_machine(record)}. lowkey {record['server']['version']}; "
        f"variants: {', '.join(variants)}."
    )
