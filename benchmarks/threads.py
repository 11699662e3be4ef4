"""Threads that wait by spinning: what GOMP_SPINCOUNT changes on two threads, alone and beside busy processes.

    python benchmarks/threads.py                    writes benchmarks/results/threads.json (two minutes)

PyTorch's CPU builds share work out by GNU OpenMP, whose idle threads spin for a while before they sleep. On a busy core
they spin in the place of the thread that they wait for.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import tyro


@dataclass
class Bench:
    results: str = "benchmarks/results/threads.json"
    """Where the numbers go."""
    turns: tuple[str, ...] = ("as it is", "10000", "0")
    """Values of GOMP_SPINCOUNT."""
    beside: tuple[int, ...] = (0, 3)
    """Numbers of other busy processes."""
    seconds: float = 5.0
    """Of each measurement."""
    rounds: int = 3
    """Measurements of each, in turns; medians are kept."""
    child: bool = False
    """Print steps a second of a small layer on two threads, and nothing else (used by the script itself)."""


def steps_a_second(seconds: float) -> float:
    """Of a small layer, forward and backward, on two threads."""
    torch.set_num_threads(2)
    layer = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.SiLU(), torch.nn.Linear(256, 128))
    x, ends = torch.randn(2000, 128), []
    while len(ends) <= 5 or ends[-1] - ends[4] < seconds:  # the first five steps warm up
        layer(x).square().mean().backward()
        ends.append(time.perf_counter())
    return (len(ends) - 5) / (ends[-1] - ends[4])


def main(bench: Bench) -> dict | None:
    if bench.child:
        return print(steps_a_second(bench.seconds))
    found: dict[str, dict[str, list[float]]] = {}
    for beside in bench.beside:
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
        try:
            for _ in range(bench.rounds):
                for turns in bench.turns:
                    set_here = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")
                    environment = {k: v for k, v in os.environ.items() if k not in set_here}
                    environment |= {} if turns == "as it is" else {"GOMP_SPINCOUNT": turns}
                    command = [sys.executable, __file__, "--child", "--seconds", str(bench.seconds)]
                    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
                    found.setdefault(f"beside {beside} busy processes", {}).setdefault(turns, []).append(float(out))
        finally:
            for process in busy:
                process.kill()
    results = {
        "command": " ".join(["python", "benchmarks/threads.py", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "steps_per_second": {
            load: {turns: statistics.median(values) for turns, values in by.items()} for load, by in found.items()
        },
    }  # fmt: skip
    with open(bench.results, "w") as file:
        file.write(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results["steps_per_second"], indent=2))
    return results


if __name__ == "__main__":
    main(tyro.cli(Bench, use_underscores=True))
