"""Launches a person can read: fewer than 20 arguments each, constants of the compiler included."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels" / "triton"
LIMIT = 20


def jitted(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """The functions under @triton.jit, with or without settings."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f.name: f for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)}


def launched(tree: ast.Module) -> set[str]:
    """Names in `name[grid](...)`."""
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {f.value.id for f in calls if isinstance(f, ast.Subscript) and isinstance(f.value, ast.Name)}


def arguments() -> dict[str, int]:
    """Of every kernel that is launched by the module it stands in: how many arguments it takes."""
    found = {}
    for path in sorted(KERNELS.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kernels, names = jitted(tree), launched(tree)
        assert {name for name in kernels if name.endswith("_kernel")} == names, f"{path.name}: launched are {names}"
        for name in sorted(names):
            taken = kernels[name].args
            assert taken.vararg is None, f"{path.name} {name}: *{taken.vararg} takes any number"
            found[f"{path.stem}.{name}"] = len(taken.posonlyargs + taken.args + taken.kwonlyargs)
    return found


@pytest.mark.parametrize("kernel, count", arguments().items())
def test_a_launch_takes_fewer_than_20_arguments(kernel: str, count: int) -> None:
    assert count < LIMIT, f"{kernel} takes {count} arguments; tuples (launch.Heads) or shapes can carry some of them"
