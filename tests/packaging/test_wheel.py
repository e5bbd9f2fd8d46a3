"""The wheel: built from the tree, installed into an environment of its own, imported from somewhere else."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """What the command printed; AssertionError with all of it if it failed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}: exit status {done.returncode}\n{done.stdout[-4000:]}"
    return done.stdout


def tracked(*patterns: str) -> list[str]:
    return run("git", "ls-files", *patterns, cwd=ROOT).split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git tracks: leftovers of the working tree must not find their way in."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked("megapre", "kernels", "csrc", "*.toml", "setup.py", "CMakeLists.txt", "README.md", "LICENSE"):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        else:
            target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "pip", "wheel", source, "--no-build-isolation", "--no-deps", "-w", out),
        cwd=out,
        MEGAPRE_NATIVE="1",
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a clean environment that holds the wheel; other packages come from this one's."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    interpreter = environment / "bin" / "python"
    site = run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=environment).strip()
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps", wheel, cwd=environment)
    # Appended to the path by hand: as a .pth it would be processed recursively and bring the editable install with it.
    ours = sysconfig.get_path("purelib")
    (Path(site) / "borrowed.pth").write_text(f"import sys; sys.path.append({ours!r})\n")
    return interpreter


def test_holds_what_the_tree_holds(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {name for name in tracked("megapre/*.py", "megapre/*.toml")}
    wanted |= {"megapre/" + name for name in tracked("kernels/*.py")}
    wanted |= {"megapre/kernels/_native/libmegapre_ops.so", "megapre/_host" + sysconfig.get_config_var("EXT_SUFFIX")}
    assert not wanted - names, f"missing: {sorted(wanted - names)}"
    extra = {name for name in names - wanted if ".dist-info/" not in name} - {"megapre/py.typed"}
    assert not extra, f"unexpected: {sorted(extra)}"


def test_imports_from_the_wheel(python: Path, tmp_path: Path) -> None:
    code = (
        "import json, megapre, megapre.kernels, megapre._host, torch\n"
        "from megapre.kernels import native\n"
        "ops = megapre.kernels.choose('cpu')\n"
        "print(json.dumps([megapre.__file__, native.status(), ops.names['rms_norm'],"
        " ops.rms_norm(torch.ones(2, 8), torch.ones(8)).sum().item()]))"
    )
    file, status, name, total = json.loads(run(python, "-c", code, cwd=tmp_path).splitlines()[-1])
    assert Path(file).is_relative_to(python.parent.parent)
    assert status == [True, ""]
    assert name == "native"
    assert total == pytest.approx(16, rel=1e-4)


def test_the_command_is_there(python: Path, tmp_path: Path) -> None:
    command = python.parent / "megapre"
    assert "train" in run(command, "--help", cwd=tmp_path)
    assert "native" in run(command, "doctor", cwd=tmp_path)


def test_runs_the_demo_recipe(python: Path, tmp_path: Path) -> None:
    """Text to samples by the installed package alone, from a folder that holds the demo's text and nothing else."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    overrides = ("run.steps=3", "optim.warmup_steps=1", "run.eval_batches=1", "run.tensorboard=false")
    run(python, "examples/demo/run.py", *overrides, cwd=tmp_path, OMP_NUM_THREADS="1", PYTHONSAFEPATH="1")
    metrics = (tmp_path / "runs" / "demo" / "metrics.jsonl").read_text().splitlines()
    assert sorted({json.loads(line)["step"] for line in metrics}) == [1, 2, 3]


def test_without_native_code_it_is_a_pure_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "megapre").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "setup.py", "megapre/__init__.py"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    run(
        *(sys.executable, "-m", "pip", "wheel", source, "--no-build-isolation", "--no-deps", "-w", tmp_path),
        cwd=tmp_path,
        MEGAPRE_NATIVE="0",
    )
    assert [path.name.split("-", 2)[2] for path in tmp_path.glob("*.whl")] == ["py3-none-any.whl"]
