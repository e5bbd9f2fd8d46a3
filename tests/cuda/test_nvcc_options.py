"""What the binary of the CUDA kernels holds for which device."""

import re
from pathlib import Path

OPTIONS = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "nvcc.options"


def test_later_devices_get_code_that_knows_clusters() -> None:
    """Clusters are launched from capability 9.0 on; sm_90a code runs on no later device, which compiles PTX instead."""
    targets = re.findall(r"code=\[?([\w,]+)", OPTIONS.read_text())
    code = {target for targets_of_one in targets for target in targets_of_one.split(",")}
    assert {"sm_80", "sm_90a"} <= code
    ptx = [int(re.sub(r"\D", "", target)) for target in code if target.startswith("compute_")]
    assert ptx and min(ptx) >= 90, "in PTX for earlier devices every block would take itself for a whole cluster"
