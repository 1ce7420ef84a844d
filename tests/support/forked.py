"""Code in processes of their own that have torch and Triton imported already: imports take seconds, a fork takes none.

Run as a script, this file is the process that is forked.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

SECONDS = 120
"""How long the code may run."""


class Forks:
    """Runs code, each time in a fork of one process that has done nothing but its imports."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, code: str, *paths: Path) -> str:
        """What the code writes to standard error; `paths` come first where it imports from."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"code": code, "paths": [str(path) for path in paths]}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status, written = json.loads(self._process.stdout.readline())
        assert status == 0, written[-4000:]
        return str(written)


@contextlib.contextmanager
def forks() -> Iterator[Forks]:
    """The process that is forked, for as long as the block runs."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, __file__], text=True, **pipes) as process:
        yield Forks(process)
        assert process.stdin is not None
        process.stdin.close()


def _child(code: str, paths: list[str]) -> int:
    signal.alarm(SECONDS)
    sys.path[:0] = paths
    try:
        exec(code, {"__name__": "__main__"})  # noqa: S102
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _main() -> None:
    import torch  # noqa: F401
    import triton.language  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile("w+", encoding="utf-8") as written:
            pid = os.fork()
            if not pid:
                os.dup2(written.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_RDWR), 1)
                status = _child(request["code"], request["paths"])
                sys.stderr.flush()
                os._exit(status)
            _, status = os.waitpid(pid, 0)
            written.seek(0)
            print(json.dumps([status, written.read()]), flush=True)


if __name__ == "__main__":
    _main()
