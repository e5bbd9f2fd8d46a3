"""Whether a library is installed, and new enough, without importing it: some initialise CUDA when they are imported."""

import importlib.metadata
import importlib.util
import re

import torch


def why_not(device: str, library: str, modules: tuple[str, ...], distribution: str = "", least: str = "") -> str:
    """What stands in the way of `library` on "cpu" or "cuda"; empty where nothing does.

    `modules` are top-level ones that it needs. `least` is the oldest version of `distribution` that will do.
    """
    if device != "cuda":
        return f"{library} runs on CUDA alone"
    missing = [module for module in modules if not there(module)]
    if missing:
        return f"{library} is not installed: there is no module {missing[0]}"
    if not least:
        return ""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return (
            f"{library} {least} or later is needed; what is here does not tell its version (no {distribution} package)"
        )
    return "" if _numbers(version) >= _numbers(least) else f"{library} {version} is too old; {least} or later is needed"


def there(module: str) -> bool:
    """Whether a top-level module could be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module that is loaded and does not say from where
        return True


def needs_capability(least: tuple[int, int], library: str) -> str:
    """Why the CUDA device at hand is too old; empty where it is not, or where there is none to ask."""
    if not torch.cuda.is_available() or (here := torch.cuda.get_device_capability()) >= least:
        return ""
    return f"{library} needs compute capability {least[0]}.{least[1]}; this device has {here[0]}.{here[1]}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])
