"""Independent parts of one kernel on the threads of a CPU, one part a thread.

A kernel made of many small ATen calls meets its other threads at the end of every one of them, and on a busy
machine each meeting waits for the scheduler. Giving every thread a part of its own, and its ATen calls to that
thread alone, leaves one meeting a kernel.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
State = TypeVar("State")
Result = TypeVar("Result")


def run_parts(
    work: Callable[[State, Item], Result],
    items: Sequence[Item],
    state: Callable[[], State],
    device: torch.device,
    take: Callable[[Result], None] = lambda result: None,
) -> None:
    """Calls ``take(work(state, item))`` for every item, the work on as many threads as torch may use.

    Args:
        work: Called once an item, on any thread, without autograd; items must not write to the same place.
        items: The parts.
        state: Makes what one thread keeps from item to item (buffers).
        device: Where the tensors are; only a CPU has threads to use.
        take: Receives the results in the order of the items, in the thread that called.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or min(threads, len(items)) < 2:
        own = state()
        for item in items:
            take(work(own, item))
        return
    idle: list[State] = []

    def task(item: Item) -> Result:
        try:
            own = idle.pop()
        except IndexError:
            own = state()
        # Autograd is switched off in the thread that called, not in this one.
        with torch.inference_mode():
            result = work(own, item)
        idle.append(own)
        return result

    pool = _pool(threads, os.getpid())
    # OpenMP's number is each thread's own, that of the matrix library is the process's: with it at 2, every part
    # would spread its products over the cores that the other parts need.
    torch.set_num_threads(1)
    try:
        for result in pool.map(task, items):
            take(result)
    finally:
        torch.set_num_threads(threads)


# By process: the threads of a pool do not survive a fork.
@lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads whose ATen calls use that thread alone."""
    pool = ThreadPoolExecutor(threads, "fastattn", _use_one_thread)
    started = threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(started.wait)
    started.wait()
    # Every thread keeps its own number, but the last one set is what threads yet to come start from.
    torch.set_num_threads(threads)
    return pool


def _use_one_thread() -> None:
    # A thread takes over the process's number when it first needs one: after that, its own can be set.
    torch.get_num_threads()
    torch.set_num_threads(1)
