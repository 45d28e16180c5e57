"""What to expect before there are past runs: measured elsewhere, so the band is as wide as from a GPU to a CPU.

`tests/service/costs/test_costs.py` derives each number anew from the files named here.
"""

from __future__ import annotations

from app.costs.regression import Band

GPU_FLOP_PER_SECOND = (6.06e11, 2.25e12)
"""Slowest and fastest fit in `benchmarks/results/quality-books-llama-31m.json`: one NVIDIA H200, several fits at a time."""
CPU_FLOP_PER_SECOND = (1.02e10, 5.94e10)
"""`stream-8b-cpu.json`, and the fastest of `compare-books-llama-31m-cpu.json`: one thread of a 2-core Xeon."""
START_SECONDS = (9.14, 11.77)
"""Fastest and slowest start of a runner in `runner-start.json`: 2 cores of a Xeon, busy with other work."""
PROCESS_BYTES = 345_000_000
"""A runner without a model, from the same file."""

MEASURED_ON = "one NVIDIA H200 (low) and one thread of a 2-core Xeon (high)"


def expect(flop: float, *, steps: int) -> Band:
    """The middle is that of the ratios: as far from the fast end as from the slow one."""
    fast, slow = flop / GPU_FLOP_PER_SECOND[1], flop / CPU_FLOP_PER_SECOND[0]
    low, high = START_SECONDS[0] * steps + fast, START_SECONDS[1] * steps + slow
    return Band(low, (low * high) ** 0.5, high)
