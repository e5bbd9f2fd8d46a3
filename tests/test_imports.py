"""What importing may not do: need torch where the design says no torch, compile, reach the network, touch a GPU."""

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import megapre

NO_TORCH = ("cli", "config", "errors", "launch", "mesh", "observe", "plan", "recipes", "schedule")
"""Rooms that start without torch; `kernels.cost` is pure Python too, in a package that is lazy."""


def modules() -> list[str]:
    found = [info.name for info in pkgutil.walk_packages(megapre.__path__, "megapre.", onerror=lambda _: None)]
    return [name for name in found if name.split(".")[1] not in {"_host", "__main__"}]


def run(script: str, *arguments: str) -> str:
    root = Path(megapre.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=root, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_room_is_walked() -> None:
    found = modules()
    for name in (
        "megapre.cli",
        "megapre.plan.box",
        "megapre.kernels.registry",
        "megapre.train.loop",
        "megapre.data.blend",
    ):
        assert name in found


WITHOUT_TORCH = """
import importlib, importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "triton", "transformers", "safetensors", "tokenizers", "tensorboard"}:
            raise ImportError(f"{name} is blocked: this module must not need it")

sys.meta_path.insert(0, Blocked())
for name in sys.argv[1:]:
    for loaded in [module for module in sys.modules if module.split(".")[0] == "megapre"]:
        del sys.modules[loaded]  # each module stands on its own, whatever was imported before
    importlib.import_module(name)
    print(name)
"""


def test_plan_config_and_their_like_import_without_torch() -> None:
    names = [name for name in modules() if name.split(".")[1] in NO_TORCH]
    assert len(names) > 20
    assert run(WITHOUT_TORCH, *names).split() == names


def test_the_block_of_torch_blocks() -> None:
    with pytest.raises(AssertionError, match=r"torch is blocked"):
        run(WITHOUT_TORCH, "megapre.model.transformer")


QUIETLY = """
import contextlib, importlib, json, os, sys
import numpy, torch
with contextlib.suppress(ImportError):
    import triton  # so that it is imported once, not by every child

FORBIDDEN = {"socket.connect", "socket.bind", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec",
             "os.posix_spawn", "os.fork", "os.mkdir", "os.rename", "os.remove", "urllib.Request"}

def watch(event, arguments):
    if event in FORBIDDEN:
        raise RuntimeError(f"import did {event} {arguments}")
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        raise RuntimeError(f"import opened {arguments[0]} for writing")
    if event == "ctypes.dlopen" and arguments[0] and "cuda" in str(arguments[0]):
        raise RuntimeError(f"import loaded {arguments[0]}")

def check(name):
    sys.dont_write_bytecode = True
    sys.addaudithook(watch)
    threads = torch.get_num_threads()
    importlib.import_module(name)
    assert not torch.cuda.is_initialized(), "CUDA was initialised"
    assert not torch.distributed.is_initialized(), "a process group was made"
    assert not torch.ops.loaded_libraries, f"native code was loaded: {torch.ops.loaded_libraries}"
    assert torch.get_num_threads() == threads, "the number of threads was changed"
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled(), "a global of torch was changed"

outcome = {}
for name in sys.argv[1:]:
    read, write = os.pipe()
    child = os.fork()  # a fresh megapre each time, but torch is imported once
    if child == 0:
        try:
            check(name)
            text = "ok"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text[:2000].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        outcome[name] = pipe.read()
    os.waitpid(child, 0)
print(json.dumps(outcome))
"""


def test_importing_any_module_does_nothing_else() -> None:
    names = modules()
    outcome = json.loads(run(QUIETLY, *names))
    assert {name: text for name, text in outcome.items() if text != "ok"} == {}
    assert set(outcome) == set(names)


def test_training_starts_without_what_it_may_not_need() -> None:
    """The first step line waits for every import of the loop, so slow and optional packages come later."""
    script = "import sys, megapre.train.loop; print(*sys.modules)"
    loaded = set(run(script).split())
    for slow in (
        "tensorboard",
        "matplotlib",
        "transformers",
        "torch.distributed.checkpoint",
        "torch._dynamo",
        "pyarrow",
    ):
        assert slow not in loaded
