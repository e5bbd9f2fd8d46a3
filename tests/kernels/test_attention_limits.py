"""The heads that a config refuses beforehand are those that the implementations refuse."""

import pytest
import torch

from megapre.config.rules import ATTENTION
from megapre.kernels import attention, table
from megapre.kernels.third_party import flash_attention, torch_sdpa


def test_the_rule_says_what_the_registry_says() -> None:
    """Of each row that names its limits: "head dims ... to N", "of a multiple of 8", "fp16 and bf16"."""
    limits = {
        row.implementation: row.takes for row in table("cpu") if row.op == "attention" and "head dims" in row.takes
    }
    assert set(limits) == set(ATTENTION) - {"native", "triton"}
    for name, text in limits.items():
        rule = ATTENTION[name]
        assert f"to {rule.most}" in text and ("multiple of 8" in text) == (rule.multiple == 8)
        assert text.startswith("fp16 and bf16, ") == (not rule.fp32)
    assert {attention.TAKES_CUDA, torch_sdpa.TAKES_CUDNN, flash_attention.TAKES} <= set(limits.values())


def test_native_attention_takes_heads_to_the_limit_and_no_further() -> None:
    why_not = {(row.op, row.implementation): row.why_not for row in table("cpu")}["attention", "native"]
    if why_not:
        pytest.skip(why_not)
    most = ATTENTION["native"].most
    for head_dim in (most, most + 1):
        q = torch.zeros(1, 16, 1, head_dim)
        if head_dim > most:
            with pytest.raises((ValueError, RuntimeError), match="256"):
                attention.native(q, q, q)
        else:
            assert isinstance(attention.native(q, q, q), torch.Tensor)
