"""Compiles the model for the machine at hand, once: the library is kept in the user's cache directory."""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path

from lowkey.files import OutputError
from lowkey.publishing import replacing
from modeling.runtime.interface import UnavailableError

logger = logging.getLogger("lowkey.modeling")

HERE = Path(__file__).parent
SOURCES = (HERE / "model.cpp", *sorted(HERE.glob("*.h")))
FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # Neither changes a result: they let loops with square roots, roundings and selections vectorise.
    *("-fno-math-errno", "-fno-trapping-math"),
)
COMPILE_TIMEOUT_S = 900


def _cpu() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(line for line in lines if line.split(":")[0].strip() in names)


def _compiler() -> list[str]:
    """$CXX, or g++. The sources use its vector extensions."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(command[0]) is None:
        raise UnavailableError(
            f"there is no C++ compiler ({command[0]!r} is not on PATH); install g++ or set CXX"
        )
    return command


def _compile(target: Path) -> None:
    """Compile the library `target`, which is there whole or not at all."""
    compiler = _compiler()
    began = time.monotonic()
    logger.info("compiling the model for this CPU, once (some seconds): %s", target)
    with replacing(target) as library:
        try:
            done = subprocess.run(
                [*compiler, *FLAGS, str(SOURCES[0]), "-o", str(library)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=COMPILE_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise UnavailableError(f"{compiler[0]} took more than {COMPILE_TIMEOUT_S} s") from None
        if done.returncode:
            raise UnavailableError(f"{compiler[0]} failed: {done.stderr.strip()[-2000:]}")
    logger.info("compiled the model in %.1f s", time.monotonic() - began)


def cache_directory() -> Path:
    """`lowkey` in $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowkey"


@cache
def compiled() -> ctypes.CDLL:
    """The compiled library, compiled now if this CPU has none of these sources yet.

    Processes that start at once compile it once: the others wait for the first.

    Raises:
        UnavailableError: no compiler, or it failed; nowhere to write; or the library does not load.
    """
    digest = hashlib.sha256()
    for part in (*(source.read_text() for source in SOURCES), *FLAGS, _cpu()):
        digest.update(part.encode() + b"\0")
    try:
        folder = cache_directory()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = folder / f"model-{digest.hexdigest()[:24]}.so"
        if not target.exists():
            with (folder / "model.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not target.exists():
                    _compile(target)
        return ctypes.CDLL(str(target))
    except (OSError, OutputError, RuntimeError) as e:  # RuntimeError: no home directory
        raise UnavailableError(
            f"{e} (the library is kept in $XDG_CACHE_HOME/lowkey or ~/.cache/lowkey)"
        ) from e
