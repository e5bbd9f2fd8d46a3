"""Triton's interpreter as tests use it. Triton decides when it is imported whether it interprets."""

import functools
import os
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def compute_as_the_hardware() -> None:
    """The interpreter truncates fp32 to bf16 and multiplies the bits of bf16 matrices as integers.

    A GPU rounds to nearest even and multiplies what the bits mean; so does this.
    """
    import numpy as np
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source.name, target.name) == ("bf16", "fp32"):
            return data.astype(np.uint32) << 16
        if (source.name, target.name) != ("fp32", "bf16"):
            return original(data, source, target, rounding)
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)

    interpreter._convert_float = convert
    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        tl = interpreter.tl
        wide = [
            interpreter.TensorHandle(convert(t.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)
            if t.dtype.scalar == tl.bfloat16
            else t
            for t in (a, b)
        ]
        return dot(self, *wide, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot
