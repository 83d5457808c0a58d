"""Work in threads of our own, for loops of operations that are too small to be shared out one by one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def in_threads(work: Callable[[], None], count: int) -> None:
    """Run ``work`` once in each of ``count`` threads and wait for all; torch runs single-threaded in each.

    The calls share out among themselves what is to be done. Their results do not depend on how many there are where
    each piece is computed by one of them.
    """
    if count == 1:
        return work()
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def alone() -> None:
        torch.get_num_threads()  # when a thread first needs the number, it takes over what any thread set last
        torch.set_num_threads(1)
        try:
            # What a thread starts with is not what its caller has.
            with torch.inference_mode(inference), torch.no_grad():
                work()
        finally:
            # For this thread it no longer matters, but for those that begin later.
            torch.set_num_threads(threads)

    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(alone) for _ in range(count)]
    for one in running:
        one.result()
