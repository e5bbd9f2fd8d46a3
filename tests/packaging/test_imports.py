"""What an import may do: no torch where none is needed, no network, no GPU, no process group, no compiler, ever."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megapre"


def modules(*parts: str) -> list[str]:
    """Every module below the given names of rooms, or of the whole package."""
    found = []
    for part in parts or ("",):
        base = PACKAGE / part
        files = [base.with_suffix(".py")] if base.with_suffix(".py").is_file() else sorted(base.rglob("*.py"))
        for file in files:
            path = file.relative_to(ROOT).with_suffix("")
            found.append(".".join(path.parts[:-1] if path.name == "__init__" else path.parts))
    return [name for name in found if not name.endswith("__main__")]


def python(code: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


WITHOUT_TORCH = """
import importlib, sys
for name in ("torch", "triton", "transformers"):
    sys.modules[name] = None  # importing it raises ImportError
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_rooms_that_need_no_torch() -> None:
    names = modules("config", "schedule", "plan", "mesh", "errors", "cli", "kernels/cost")
    assert len(names) > 8
    done = python(WITHOUT_TORCH, *names)
    assert done.returncode == 0, done.stderr


HARMLESS = """
import importlib, os, socket, subprocess, sys
import torch, torch.distributed

def forbidden(what):
    def call(*args, **kwargs):
        raise AssertionError(f"importing {current} {what}")
    return call

socket.socket.connect = forbidden("opens a connection")
socket.getaddrinfo = forbidden("looks up a host")
torch.cuda._lazy_init = torch._C._cuda_init = forbidden("initialises CUDA")
torch.distributed.init_process_group = forbidden("starts a process group")
torch.ops.load_library = forbidden("loads the native library")
subprocess.Popen = os.system = os.posix_spawn = forbidden("starts a process")
for current in sys.argv[1:]:
    importlib.import_module(current)
assert torch.get_num_threads() == int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
assert torch.get_default_dtype() == torch.float32
"""


def test_imports_do_nothing_but_import() -> None:
    names = modules()
    assert len(names) > 40
    done = python(HARMLESS, *names)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "heavy", ["tensorboard", "matplotlib", "torch.distributed.checkpoint", "torch._dynamo", "transformers"]
)
def test_the_training_path_starts_light(heavy: str) -> None:
    """The first step line of a run waits for everything that is imported at the top of these modules."""
    code = "import sys, megapre.train.loop, megapre.model, megapre.data; sys.exit(sys.argv[1] in sys.modules)"
    before = python("import sys, torch; sys.exit(sys.argv[1] in sys.modules)", heavy)
    if before.returncode:
        pytest.skip(f"torch itself imports {heavy}")
    done = python(code, heavy)
    assert done.returncode == 0, f"{heavy} is imported at start-up: {done.stderr}"


def test_kernels_stand_alone(tmp_path: Path) -> None:
    """The folder can be lifted out and used under another name: it needs torch and nothing of megapre."""
    (tmp_path / "lifted").symlink_to(ROOT / "kernels")
    code = (
        "import sys, torch; sys.modules['megapre'] = None; import lifted\n"
        "ops = lifted.choose('cpu'); print(float(ops.rms_norm(torch.ones(2, 8), torch.ones(8)).sum()))"
    )
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - 16) < 1e-3
