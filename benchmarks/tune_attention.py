"""Finds the fastest tiles of the Triton attention kernels on the GPU at hand and writes them down for this user.

    python benchmarks/tune_attention.py                       heads of 64 and 128, dense causal and in documents
    python benchmarks/tune_attention.py --head-dim 96

Only tiles that fit by arithmetic are compiled and timed (megapre/kernels/triton/tiles.py). Prints a line a tile. It has
not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from megapre.kernels.triton import attention, attention_backward, tiles
from megapre.kernels.triton.tiles import Kind, Tiles

POLICIES = {
    "forward": (attention, "policy"),
    "keys": (attention_backward, "key_policy"),
    "queries": (attention_backward, "query_policy"),
}


def work(kind: Kind, length: int) -> Callable[[], object]:
    """A call that launches the kernel of `kind`, on causal bf16 heads 32 to 8."""

    def random(heads: int) -> Tensor:
        return torch.randn(16384 // length, length, heads, kind.head_dim, device="cuda", dtype=torch.bfloat16)

    q, k, v, do = random(32), random(8), random(8), random(32)
    cuts = torch.arange(0, 16384 + 1, length // 4, dtype=torch.int32, device="cuda")
    scale = 1.0 / math.sqrt(kind.head_dim)
    documents = None if kind.dense else cuts
    o, lse, bounds = attention.forward_with_documents(q, k, v, True, documents, None, scale)
    if kind.kernel == "forward":
        return lambda: attention.forward(q, k, v, True, None if kind.dense else bounds, None, scale)
    return lambda: attention_backward.backward(do, None, q, k, v, o, lse, bounds, True, None, scale)


def timed(kind: Kind, call: Callable[[], object]) -> Callable[[Tiles], float]:
    """Seconds of `call` with given tiles; infinite where they do not run."""
    from triton.testing import do_bench

    module, name = POLICIES[kind.kernel]

    def seconds(given: Tiles) -> float:
        policy = getattr(module, name)
        setattr(module, name, lambda *_: given)
        try:
            took = do_bench(call, warmup=10, rep=40, return_mode="min") / 1e3
        except Exception as error:  # out of resources, or what the compiler could not do
            print(f"{kind.label:24} {tuple(given)!s:20} {type(error).__name__}", flush=True)
            return math.inf
        finally:
            setattr(module, name, policy)
        print(f"{kind.label:24} {tuple(given)!s:20} {took * 1e3:8.3f} ms", flush=True)
        return took

    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence, of 16384 in all")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device to measure on")
        return 2
    shared = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    found: dict[Kind, Tiles] = {}
    for head_dim in arguments.head_dim:
        for dense in (True, False):
            for kernel in POLICIES:
                kind = Kind(kernel, head_dim, 2, dense)
                best, times = tiles.tune(kind, timed(kind, work(kind, arguments.length)), shared)
                if math.isfinite(times[best]):
                    found[kind] = best
                    print(f"{kind.label:24} {tuple(best)!s:20} is the fastest", flush=True)
    print(f"written to {tiles.write(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
