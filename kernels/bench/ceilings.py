"""The rates that bound a kernel, measured in the run that they are held against."""

from collections.abc import Callable
from functools import partial

import torch

from .timer import Work, seconds

COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}  # read and written
PRODUCT_SIDE = {"cpu": 1024, "cuda": 8192}


class Ceilings:
    """The best rates of a copy, and of a square product in each dtype, on random numbers.

    A CPU without instructions for a 16-bit dtype multiplies it best through fp32, whose rate is the bound then: torch's
    own product of such can be a hundred times as slow.
    """

    def __init__(self, device: str) -> None:
        kind = device.split(":")[0]
        self._source = torch.rand(COPY_BYTES[kind] // 8, device=device)
        self._target = torch.empty_like(self._source)
        self._side, self._device = PRODUCT_SIDE[kind], device
        self._square: dict[torch.dtype, torch.Tensor] = {}
        self.best: dict[str, float] = {}

    def probe(self, bound: str, dtype: torch.dtype) -> Work:
        """A call that measures "copy" or "product" once."""
        if bound == "copy":
            return lambda: self._target.copy_(self._source)
        if dtype not in self._square:
            square = torch.randn(self._side, self._side, device=self._device)
            self._square[dtype] = square.to(self._multiplied_as(dtype))
        square = self._square[dtype]
        return lambda: square @ square

    def _multiplied_as(self, dtype: torch.dtype) -> torch.dtype:
        if self._device != "cpu" or dtype.itemsize > 2:
            return dtype
        small = {kind: torch.randn(256, 256).to(kind) for kind in (dtype, torch.float32)}
        works: dict[torch.dtype, Callable[[], object]] = {kind: partial(torch.mm, a, a) for kind, a in small.items()}
        times = {kind: [seconds(work) for _ in range(3)] for kind, work in works.items()}
        return min(times, key=lambda kind: min(times[kind]))

    def note(self, bound: str, dtype: str, milliseconds: float) -> None:
        """Keeps the best rate: GB/s read and written of "copy", TFLOP/s of "product <dtype>"."""
        if bound == "copy":
            key, rate = "copy", 2 * self._source.nbytes / milliseconds / 1e6
        else:
            key, rate = f"product {dtype}", 2 * self._side**3 / milliseconds / 1e9
        self.best[key] = max(rate, self.best.get(key, 0.0))

    def rate(self, bound: str, dtype: str) -> float:
        return self.best["copy" if bound == "copy" else f"product {dtype}"]
