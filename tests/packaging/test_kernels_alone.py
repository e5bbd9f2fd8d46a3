"""The kernels can be lifted out and used under another name: they need torch and nothing of megapre."""

import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels"

ELSEWHERE = """
import sys, torch
sys.modules["megapre"] = None  # importing it raises ImportError
import lifted
ops = lifted.choose("cpu")
print(float(ops.rms_norm(torch.ones(2, 8), torch.ones(8)).sum()))
"""


def test_kernels_stand_alone(tmp_path: Path) -> None:
    (tmp_path / "lifted").symlink_to(KERNELS)
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - 16) < 1e-3
