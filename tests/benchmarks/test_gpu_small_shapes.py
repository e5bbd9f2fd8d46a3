"""What compute-sanitizer runs on a GPU, on the CPU: every op has a case, and every case runs."""

import subprocess
import sys
from pathlib import Path

from megapre import kernels
from megapre.kernels.bench.case import IN_PLACE, implementations

ROOT = Path(__file__).parents[2]


def test_every_implementation_of_every_op_runs_once() -> None:
    command = [sys.executable, "benchmarks/gpu_small_shapes.py", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line.split()[:3] for line in done.stdout.splitlines()]
    assert all(line[2] == "ok" for line in told)
    known = [[row.op, row.implementation] for row in kernels.table("cpu") if row.available]
    in_place = [[op, row.name] for op in IN_PLACE for row in implementations(op) if not row.why_not("cpu")]
    assert [line[:2] for line in told] == in_place + known
