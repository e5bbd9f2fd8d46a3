"""Hugging Face with Liger as a peer of the training step: its loss is that of the next tokens, not shifted again."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """step_providers.py, with plain torch where Liger would be."""
    patched = ModuleType("liger_kernel.transformers")
    patched.LigerFusedLinearCrossEntropyLoss = lambda: lambda weight, x, labels: F.cross_entropy(x @ weight.T, labels)
    patched.asked = []
    patched._apply_liger_kernel_to_instance = lambda model, **terms: patched.asked.append(terms)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", patched)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("step_providers", BENCHMARKS / "step_providers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_its_loss_is_the_models_own(providers: ModuleType, kind: str) -> None:
    sizes = {
        "gpt2": {"n_layer": 1, "n_embd": 16, "n_head": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        "llama": {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24},
    }[kind]
    settings = transformers.CONFIG_MAPPING[kind].from_dict({**sizes, "vocab_size": 40, "use_cache": False})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").train()
    line = torch.randint(40, (2, 9))
    loss = providers.through_liger(model)
    tokens, labels = line[:, :-1], line[:, 1:].contiguous()
    own = model.loss_function(model(input_ids=tokens).logits, None, vocab_size=40, shift_labels=labels)
    torch.testing.assert_close(loss(tokens, labels), own)
    assert sys.modules["liger_kernel.transformers"].asked == [
        {"cross_entropy": False, "fused_linear_cross_entropy": False}
    ]
