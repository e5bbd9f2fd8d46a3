"""What a config derives, refuses and keeps."""

import pytest
from pydantic import ValidationError

from megapre.config import Batch, Config, ConfigError, Data, Layout, Model, Optim, Run, Source, load


def gpt(**changes: object) -> Model:
    shape = {"family": "gpt2", "layers": 2, "hidden": 64, "heads": 4, "context": 32, "vocab": 300}
    return Model.model_validate({**shape, **changes})


def test_a_family_sets_defaults_and_each_can_be_overridden() -> None:
    model = gpt()
    assert (model.norm, model.activation, model.positions, model.bias, model.tied) == (
        "layernorm",
        "gelu",
        "learned",
        True,
        True,
    )
    assert (model.kv_heads, model.head_dim, model.ffn) == (4, 16, 256)
    llama = gpt(family="llama", ffn=100, kv_heads=2, tied=True)
    assert (llama.norm, llama.activation, llama.positions, llama.bias, llama.tied) == (
        "rmsnorm",
        "swiglu",
        "rope",
        False,
        True,
    )
    assert (llama.kv_heads, llama.head_dim, llama.ffn) == (2, 16, 100)
    assert gpt(head_dim=32).head_dim == 32
    assert gpt(bias=False).bias is False


@pytest.mark.parametrize(("vocab", "padded"), [(0, 0), (1, 128), (128, 128), (129, 256), (50257, 50304)])
def test_vocabulary_is_padded_to_128(vocab: int, padded: int) -> None:
    assert gpt(vocab=vocab).vocab_padded == padded


def test_everything_is_frozen() -> None:
    cfg = load("debug")
    for section, field in ((cfg, "name"), (cfg.model, "layers"), (cfg.batch, "micro"), (cfg.data, "seed")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, field, 1)


def test_the_data_seed_is_the_runs_unless_set() -> None:
    assert load("debug", ["run.seed=7"]).data.seed == 7
    assert load("debug", ["run.seed=7", "data.seed=8"]).data.seed == 8
    assert load("debug", ["run.seed=7", "data.seed=0"]).data.seed == 0


def test_micro_batches() -> None:
    batch = Batch(micro=2, global_=24, seq_length=16)
    assert [batch.micro_batches(dp) for dp in (1, 2, 3, 4, 6, 12)] == [12, 6, 4, 3, 2, 1]
    assert batch.tokens == 24 * 16
    with pytest.raises(
        ConfigError, match=r"global = 24 .* micro\*dp = 2\*5 = 10 \(24 % 10 = 4\); nearest: global 20 or"
    ):
        batch.micro_batches(5)


def test_a_whole_float_is_an_integer_and_a_string_is_no_number() -> None:
    assert load("debug", ["run.steps=1e3"]).run.steps == 1000
    for bad in ("run.steps=1.5", "run.steps='10'", "run.steps=true", "optim.lr='3'", "model.tied=1", "run.steps=nan"):
        with pytest.raises(ConfigError, match=bad.split("=")[0]):
            load("debug", [bad])


def test_with_vocab_checks_the_rules_again() -> None:
    cfg = load("debug", ["layout.tp=2"])
    assert cfg.model.vocab == 0
    assert cfg.with_vocab(1000).model.vocab_padded == 1024
    cfg = load(
        "debug",
        ["layout.tp=3", "model.heads=6", "model.hidden=96", "model.kv_heads=3", "layout.sequence_parallel=false"],
    )
    with pytest.raises(ConfigError, match="tp = 3 does not divide the padded vocabulary 1024"):
        cfg.with_vocab(1000)


def test_a_config_made_in_python_obeys_the_rules_too() -> None:
    sections = {"model": gpt(), "optim": Optim(lr=1e-3), "run": Run(steps=10)}
    cfg = Config(batch=Batch(global_=8, seq_length=32), **sections)
    assert cfg.layout == Layout()
    assert cfg.name == "run"
    with pytest.raises(ValueError, match=r"seq_length = 64 is longer than model\.context = 32"):
        Config(batch=Batch(global_=8, seq_length=64), **sections)


def test_sources_are_given_as_text_or_tables() -> None:
    assert Data.model_validate({"train": ["a", {"prefix": "b", "weight": 2}]}).train == (
        Source(prefix="a"),
        Source(prefix="b", weight=2.0),
    )
    assert Data.model_validate({"train": "a"}).train == (Source(prefix="a"),)
