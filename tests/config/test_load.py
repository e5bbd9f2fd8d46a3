"""Recipes, overrides, TOML and what is said when they are wrong."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapre.config import Config, ConfigError, describe, help_text, load, recipe_names, reference, to_toml
from megapre.errors import UserError


def problems(recipe: str | Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(str(recipe), overrides)
    assert isinstance(caught.value, UserError)
    return caught.value.problems


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_is_named_and_round_trips(name: str, tmp_path: Path) -> None:
    cfg = load(name)
    assert cfg.name == name
    assert load(f"{name}.toml") == cfg
    copy = tmp_path / "another-name.toml"
    copy.write_text(to_toml(cfg))
    assert load(str(copy)) == cfg
    assert to_toml(load(str(copy))) == to_toml(cfg)


def test_the_asked_for_recipes_are_shipped() -> None:
    families = {"gpt2-124m", "gpt2-1.5b", "llama3-1b", "llama3-8b", "llama3-70b", "llama3-405b", "demo", "debug"}
    assert families <= set(recipe_names())


text = st.text(st.characters(codec="utf-8"), max_size=20)


@given(
    prefix=text.filter(bool),
    tokenizer=text,
    weights=st.none() | st.lists(st.floats(1e-300, 1e300), min_size=2, max_size=2),
    lr=st.floats(1e-30, 1e30),
    beta=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**32 - 1),
    kernels=st.dictionaries(text, text, max_size=3),
)
def test_any_config_round_trips_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    prefix: str,
    tokenizer: str,
    weights: list[float] | None,
    lr: float,
    beta: float,
    seed: int,
    kernels: dict[str, str],
) -> None:
    train = [{"prefix": p, "weight": w} for p, w in zip((prefix, prefix + "'"), weights or (None, None), strict=True)]
    raw = load("llama3-1b").model_dump(by_alias=True)
    raw["optim"] |= {"lr": lr, "beta2": beta, "min_lr": 0.0}
    raw["data"] = {"train": train, "tokenizer": tokenizer, "seed": seed}
    raw["kernels"] = kernels
    cfg = Config.model_validate(raw)
    file = tmp_path_factory.mktemp("toml") / "config.toml"
    file.write_bytes(to_toml(cfg).encode())
    again = load(str(file))
    assert again == cfg
    assert again.optim.lr.hex() == cfg.optim.lr.hex()
    assert to_toml(again) == to_toml(cfg)


def test_overrides_take_toml_literals_and_bare_strings() -> None:
    cfg = load(
        "gpt2-124m",
        [
            "optim.lr=3e-4",
            " layout.tp = 2 ",
            "model.tied=false",
            "name=second-try",
            "data.train=['a', {prefix = \"b=c\"}]",
            "data.valid=runs/data/valid",
            "data.split=90,10,0",
            "data.tokenizer=/some where/tokenizer.json",
            "run.dir=2024",
            "kernels.attention=sdpa",
            "run.steps=1e4",
            "optim.lr=2e-4",
        ],
    )
    assert (cfg.optim.lr, cfg.layout.tp, cfg.model.tied, cfg.name) == (
        2e-4,
        2,
        False,
        "second-try",
    )  # the last one wins
    assert [source.prefix for source in cfg.data.train] == ["a", "b=c"]
    assert [source.prefix for source in cfg.data.valid] == ["runs/data/valid"]
    assert (cfg.data.split, cfg.data.tokenizer) == ("90,10,0", "/some where/tokenizer.json")
    assert cfg.run.dir == "2024"
    assert cfg.kernels == {"attention": "sdpa"}
    assert cfg.run.steps == 10_000


def test_text_knobs_take_text_that_looks_like_something_else() -> None:
    assert load("debug", ["name=123"]).name == "123"
    assert load("debug", ["run.dir=true"]).run.dir == "true"
    assert load("debug", ["run.dir='1e5'"]).run.dir == "1e5"


def test_nested_tables_are_made_and_taken_away() -> None:
    cfg = load("llama3-8b", ["model.rope_scaling.type=linear", "model.rope_scaling.factor=2"])
    assert cfg.model.rope_scaling is not None
    assert cfg.model.rope_scaling.factor == 2.0
    assert load("llama3-1b", ["model.rope_scaling=none"]).model.rope_scaling is None


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optim.lrr=1", "optim.lrr: no such key; did you mean optim.lr?"),
        ("modle.layers=1", "modle: no such key; did you mean model?"),
        ("lr=1", "lr: no such key; did you mean optim.lr?"),
        ("learning_rate=1", "learning_rate: no such key; known here: "),
        ("warmup_step=1", "warmup_step: no such key; did you mean optim.warmup_steps?"),
        (
            "model.rope_scaling.factr=2",
            "model.rope_scaling.factr: no such key; did you mean model.rope_scaling.factor?",
        ),
        ("data.train=[{prefx='a'}]", "data.train.0.prefx: no such key; did you mean data.train.0.prefix?"),
        (
            "layout.zz=1",
            "layout.zz: no such key; known here: balance, bucket, comm_profile, cp, dp, group, overlap_products, pp, "
            "recompute, recompute_group, recompute_layers, schedule, sequence_parallel, "
            "shard_optimizer, stages, tp, vpp",
        ),
        ("model.layers=many", "model.layers: must be a whole number, got 'many'"),
        ("model.layers=1.5", "model.layers: must be a whole number, got 1.5"),
        ("model.layers=true", "model.layers: must be a whole number, got true"),
        ("model.layers=0", "model.layers: must be at least 1, got 0"),
        ("model.hidden=-8", "model.hidden: must be at least 1, got -8"),
        ("model.hidden=9e18", "model.hidden: must be less than 2147483648, got 9e+18"),
        ("optim.lr=fast", "optim.lr: must be a number, got 'fast'"),
        ("optim.lr=0", "optim.lr: must be greater than 0.0, got 0"),
        ("optim.lr=inf", "optim.lr: must be finite, got inf"),
        ("optim.beta2=1", "optim.beta2: must be less than 1.0, got 1"),
        ("optim.beta1=-0.1", "optim.beta1: must be at least 0.0, got -0.1"),
        ("optim.schedule=cosin", "'wsd', 'linear' or 'constant', got 'cosin'; did you mean 'cosine'?"),
        ("model.tied=yes", "model.tied: must be true or false, got 'yes'"),
        ("model=3", "model: must be a table, got 3"),
        ("data.train=3", "data.train: must be a list, got 3"),
        ("data.train=[3]", "data.train.0: must be a table, got 3"),
        ("data.train=['']", "data.train.0.prefix: must not be empty, got ''"),
        ("data.train=[{prefix='a', weight=0}]", "data.train.0.weight: must be greater than 0.0, got 0"),
        ("data.train=[{weight=1}]", "data.train.0.prefix: missing, and it has no default"),
        ("run.seed=4294967296", "run.seed: must be less than 4294967296, got 4294967296"),
        (
            "name=../up",
            "name: must be letters, digits, '.', '_' and '-', and begin with a letter or digit, got '../up'",
        ),
        ("kernels.attention=3", "kernels.attention: must be text, got 3"),
        ("data.train=[a", "override 'data.train=[a': not a TOML value"),
        ("data.train='a", 'override "data.train=\'a": not a TOML value'),
        ("nonsense", "override 'nonsense': not of the form section.key=value, as in optim.lr=3e-4"),
        ("=3", "override '=3': not of the form"),
        ("model..layers=3", "override 'model..layers=3': not of the form"),
        ("model.layers.x=3", "override 'model.layers.x=3': model.layers is a value, not a table"),
        ("run.steps=1\nrun.seed=2", "override 'run.steps=1\\nrun.seed=2': one value only, on one line"),
    ],
)
def test_a_slip_is_explained(override: str, problem: str) -> None:
    assert any(problem in line for line in problems("debug", override)), problems("debug", override)


def test_unknown_keys_in_toml_nested_too(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("naem = 'x'\n[optim]\nlr = 1e-3\nbeta_2 = 0.9\n[trian]\nsteps = 3\n")
    found = problems(file)
    assert "naem: no such key; did you mean name?" in found
    assert "optim.beta_2: no such key; did you mean optim.beta2?" in found
    assert "trian: no such key; did you mean train?" not in found
    assert any(line.startswith("trian: no such key") for line in found)
    assert "model: missing, and it has no default" in found


def test_all_problems_at_once_and_none_invented() -> None:
    found = problems(
        "gpt2-124m",
        "model.layers=26",
        "layout.pp=4",
        "model.tied=1",
        "optim.lrr=3",
        "batch.micro=7",
        "run.steps=abc",
        "optim.schedule=wsd",
        "optim.decay_steps=soon",
    )
    starts = [line.split(":")[0] for line in found]
    assert sorted(starts) == ["batch", "layout", "model.tied", "optim.decay_steps", "optim.lrr", "run.steps"]
    message = str(ConfigError(found, "gpt2-124m.toml"))
    assert message.splitlines()[0] == "gpt2-124m.toml: 6 problems"
    assert len(message.splitlines()) == 7


def test_a_missing_section_and_a_missing_knob(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("[model]\nfamily = 'gpt2'\nlayers = 1\nhidden = 8\n[optim]\n[run]\nsteps = 1\n")
    assert problems(file) == [
        "model.heads: missing, and it has no default (query heads)",
        "model.context: missing, and it has no default (most positions a sequence may have)",
        "batch: missing, and it has no default",
        "optim.lr: missing, and it has no default (peak learning rate)",
    ]


def test_toml_syntax_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("[model]\nlayers = 12\nhidden = = 3\n")
    assert problems(file) == ["not TOML: Invalid value (at line 3, column 10): hidden = = 3"]
    file.write_text("a = 1\na = 2\n")
    assert "line 2" in problems(file)[0]


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    assert problems("gpt2-124")[0].startswith(
        "no such file, and no shipped recipe of that name; did you mean 'gpt2-124m'?"
    )
    assert "shipped: debug, demo" in problems(tmp_path / "nothing.toml")[0]
    assert problems(tmp_path) == [f"a folder, not a recipe; did you mean {tmp_path / 'config.toml'}?"]
    binary = tmp_path / "b.toml"
    binary.write_bytes(b"a = '\xff'\n")
    assert problems(binary) == ["not UTF-8 text: byte 5 is 0xff"]


PLAIN = {"none": None, '""': "", "true": True, "false": False, "[]": (), "{}": {}}


def test_every_knob_has_a_meaning_and_its_default_is_the_true_one(tmp_path: Path) -> None:
    least = {"batch.global": 1, "batch.seq_length": 8, "optim.lr": 1, "run.steps": 1}
    least |= {"model.family": "gpt2", "model.layers": 1, "model.hidden": 8, "model.heads": 2, "model.context": 8}
    derived = {"name", "model.kv_heads", "model.head_dim", "model.ffn", "data.seed"}
    file = tmp_path / "least.toml"
    file.write_text("")
    cfg = load(str(file), [f"{key}={value}" for key, value in least.items()])
    for knob in describe():
        assert knob.description, knob.key
        assert (knob.default == "") == (
            knob.key in least or knob.key.endswith((".type", ".factor", ".prefix", "].train"))
        )
        if knob.default == "" or "[]" in knob.key or knob.key.startswith("model.rope_scaling.") or knob.key in derived:
            continue
        value: object = cfg
        for part in knob.key.split("."):
            value = getattr(value, part)
        stated = knob.default.split(" (gpt2)")[0]
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert float(stated) == value, knob.key
        else:
            assert PLAIN.get(stated, stated) == value, knob.key


def test_help_fits_a_terminal_and_the_reference_names_every_knob() -> None:
    lines = help_text(100).splitlines()
    assert max(map(len, lines)) <= 100
    page = reference()
    for knob in describe():
        if not knob.repeated:
            assert any(line.startswith(f"  {knob.key} ") for line in lines), knob.key
            assert f"| `{knob.key}` |" in page
    assert sum(line.startswith("## ") for line in page.splitlines()) == 9
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert all(line.replace("\\|", "").count("|") == 6 for line in rows)


NUMBERS = st.integers(-3, 300) | st.sampled_from([2**31 - 1, 2**31, 2**62, 10**30])
VALUES = st.one_of(
    NUMBERS.map(str),
    st.floats().map(str),
    st.sampled_from(
        ["true", "none", "[]", "{}", "[1]", "['a']", "{prefix='a'}", "[{train=['a']}]", "1979-05-27", "''"]
    ),
    st.text(max_size=8),
)


@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from([knob.key.replace("[]", "") for knob in describe()]), VALUES, max_size=6))
def test_whatever_is_given_ends_in_a_config_or_in_its_problems(changes: dict[str, str]) -> None:
    for recipe in ("gpt2-124m", "llama3-1b"):
        try:
            cfg = load(recipe, [f"{key}={value}" for key, value in changes.items()])
        except ConfigError as error:
            assert error.problems
            assert all(problem and "\n" not in problem for problem in error.problems)
        else:
            assert Config.model_validate(cfg.model_dump(by_alias=True)) == cfg
