"""Throughput of a call, robust against whatever else runs on the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """Work per second, the median over samples.

    Attributes
    ----------
    value : float
    best : float
        The largest of the samples.
    spread : float
        (largest - smallest) / median of the samples taken.
    share : float
        Processor time over wall time and threads: 1 when the machine was ours alone and no thread idled.
    """

    value: float
    best: float
    spread: float
    share: float


def throughput(
    call: Callable[[], object], work: float, n_threads: int = 1, repeats: int = 7, least=0.004, limit=1.5
) -> Rate:
    """Time `call`, which does `work` units.

    One thread is timed by its own processor clock, which stands still while other processes run. Several
    threads are timed by the wall clock; samples are drawn until `repeats` of them had 95% of the processors
    or `limit` seconds have passed, and the `repeats` with the largest share count.

    Parameters
    ----------
    call : callable
        Runs in the calling thread when n_threads = 1.
    work : float
    n_threads, repeats : int
    least : float
        Seconds a sample lasts at least; short calls are repeated within a sample.
    limit : float
        Seconds after which no further sample is begun, once `repeats` are there.
    """
    call()
    inner, samples, begin = 1, [], time.perf_counter()
    own_clock = time.thread_time if n_threads == 1 else time.process_time
    while True:
        wall, own = time.perf_counter(), own_clock()
        for _ in range(inner):
            call()
        wall, own = time.perf_counter() - wall, own_clock() - own
        seconds = own if n_threads == 1 else wall
        if seconds < least:
            inner = max(inner + 1, int(1.3 * inner * least / max(seconds, least / 1000)))
            continue
        samples.append((own / (wall * n_threads), work * inner / seconds))
        good = len(samples) if n_threads == 1 else sum(share >= 0.95 for share, _ in samples)
        if good >= repeats or (len(samples) >= repeats and time.perf_counter() - begin > limit):
            break
    best = sorted(samples, reverse=True)[:repeats]
    rates = [rate for _, rate in best]
    middle = statistics.median(rates)
    return Rate(
        middle, max(rates), (max(rates) - min(rates)) / middle, statistics.median(share for share, _ in best)
    )
