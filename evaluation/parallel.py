"""A map in several processes that survives the crash of one of them."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from utils import end_with_parent


class ParallelMap:
    """A function like `map` that runs in `workers` processes, or in this process if `workers` is 1.

    The results are the same, in the order of the items:

        with ParallelMap(workers) as parallel_map:
            for result in parallel_map(function, items, crashed):
    """

    def __init__(self, workers: int):
        self.workers = workers
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "ParallelMap":
        if self.workers > 1:
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # NumPy's threads in the workers
        else:
            torch.set_num_threads(1)
        return self

    def __exit__(self, *_) -> None:
        self._close()

    def __call__(self, function: Callable, items: Iterable, crashed: Callable) -> Iterator:
        """Yields function(item) for each item, or crashed(item) if it ends its process.

        If a library crashes or memory runs out, a process dies. The remaining items are computed
        in new processes.
        """
        todo = deque(items)
        while todo:
            is_alone = True
            try:
                for result in self._run(function, [*todo]):
                    todo.popleft()
                    is_alone = False
                    yield result
            except BrokenProcessPool:
                self._close()
                if is_alone:
                    yield crashed(todo.popleft())

    def _run(self, function: Callable, items: list) -> Iterator:
        """Yields the results. The first item runs alone.

        numba compiles for it and fills its cache, which several processes must not write at once.
        """
        if self.workers <= 1:
            yield from map(function, items)
            return
        if self.pool is None:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.workers, context, _prepare_worker)
        yield self.pool.submit(function, items[0]).result()
        yield from self.pool.map(function, items[1:])

    def _close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            self.pool = None


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    end_with_parent()
