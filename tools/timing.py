"""A stopwatch for the benchmarks."""

import time

import torch


def fastest(job, device: str = "cpu", repeats: int = 3) -> float:
    """Seconds of the fastest of `repeats` runs, after one to warm up."""
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        job()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
