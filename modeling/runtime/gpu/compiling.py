"""Triton kernels compiled before they are needed, in threads beside each other.

A kernel's first launch compiles it, which takes a second or more, and a model's first step launches a dozen of them one
after the other. Most of that time is spent in LLVM, ptxas and the C compiler, which need no Python meanwhile, so that
threads do it at once. What is compiled lies on disk (TRITON_CACHE_DIR): other processes and later starts find it there.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from triton import AsyncCompileMode, FutureKernel
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

logger = logging.getLogger("lowkey.modeling")

PROGRESS_S = 2.0
"""How often the log says how far it is. From the cache on disk all are there sooner than that."""


def compile_ahead(work: Callable[[], object]) -> None:
    """Compile the Triton kernels that `work` launches, all configurations of those that are tuned.

    `work` runs once, but its launches do nothing, so that what it computes means nothing: it must not depend on values,
    and what it leaves in tensors has to be thrown away. Nothing is raised: if this fails, the log says so, and each
    kernel is compiled at its first launch.
    """
    began = time.monotonic()
    threads = len(os.sched_getaffinity(0))
    launched: set[JITFunction[Any]] = set()
    with _parsed_one_at_a_time(), ThreadPoolExecutor(threads) as pool:
        compiler = _Compiler(pool)
        try:
            with AsyncCompileMode(compiler, ignore_errors=True):
                try:
                    with _compiled_instead_of_launched(launched):
                        work()
                    compiler.wait()
                except BaseException:
                    compiler.cancel()  # leaving the mode, Triton waits for all
                    raise
        except Exception as e:  # whatever it is, the launches that are meant will show it in its place
            logger.warning(
                "kernels will be compiled when they are first launched: %s: %s", type(e).__name__, e
            )
        finally:
            _forget_failures(launched)
    taken, count = time.monotonic() - began, len(compiler.futures)
    logger.info("%d kernels are ready after %.1f s", count - compiler.failed, taken)


class _Compiler:
    """What `AsyncCompileMode` gives the compilations to. Beside the kernel itself it compiles what launches it from
    Python, a small C module that Triton makes for each signature of arguments."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.futures: list[Future[Any]] = []
        self._pool = pool

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:
        self.futures.append(self._pool.submit(self._compile, compile_kernel))
        return self.futures[-1]

    @staticmethod
    def _compile(compile_kernel: Callable[[], Any]) -> Any:
        kernel = compile_kernel()
        driver.active.launcher_cls(kernel.src, kernel.metadata)  # in the cache on disk from now on
        return kernel

    @property
    def failed(self) -> int:
        return sum(future.cancelled() or future.exception() is not None for future in self.futures)

    def cancel(self) -> None:
        """Give up those that have not begun."""
        for future in self.futures:
            future.cancel()

    def wait(self) -> None:
        """Until all are compiled, telling the log how far it is."""
        left = self.futures
        while left := list(wait(left, timeout=PROGRESS_S).not_done):
            done = len(self.futures) - len(left)
            logger.info(
                "compiling %d kernels, for the first start on this kind of card: %d done",
                len(self.futures),
                done,
            )


@contextmanager
def _compiled_instead_of_launched(launched: set[JITFunction[Any]]) -> Iterator[None]:
    """Within, a launch only compiles. `launched` gets the kernels."""
    run = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launched.add(self)
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def every_configuration(self: Autotuner, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    with patch.object(JITFunction, "run", compile_only), patch.object(Autotuner, "run", every_configuration):
        yield


@contextmanager
def _parsed_one_at_a_time() -> Iterator[None]:
    """Within, no two threads parse the source of a kernel at once: Python before 3.11.9 and 3.12.3 may then raise a
    SystemError."""
    parse, parsing = JITFunction.parse, threading.Lock()

    def parse_alone(self: JITFunction[Any]) -> Any:
        with parsing:
            return parse(self)

    with patch.object(JITFunction, "parse", parse_alone):
        yield


def _forget_failures(launched: set[JITFunction[Any]]) -> None:
    """Triton keeps an empty place for a kernel that was not compiled; without it, the kernel's launch says why."""
    for function in launched:
        for kernels, *_ in function.device_caches.values():
            for key in [key for key, kernel in kernels.items() if isinstance(kernel, FutureKernel)]:
                del kernels[key]
