"""Every rule: what breaks it is reported with numbers and nearest values, and those values hold."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapre.config import ConfigError, load
from megapre.config.rules import near_divisors, near_multiples

DATA = "data.train=['a']"

# (recipe, overrides, the problem)
BROKEN = [
    (
        "gpt2-124m",
        ["model.layers=26", "layout.pp=4", "layout.vpp=2"],
        "layout: 26 layers cannot be cut into pp*vpp = 4*2 = 8 equal chunks (26 % 8 = 2); nearest: "
        "model.layers 24 or 32, pp=13 vpp=2, pp=2 vpp=1, pp=13 vpp=1, or balance=true for unequal ones",
    ),
    (
        "gpt2-124m",
        ["layout.pp=4", "layout.vpp=2"],
        "layout: 12 layers cannot be cut into pp*vpp = 4*2 = 8 equal chunks (12 % 8 = 4); nearest: "
        "model.layers 8 or 16, pp=3 vpp=2, pp=4 vpp=3, pp=6 vpp=2, or balance=true for unequal ones",
    ),
    (
        "gpt2-124m",
        ["layout.pp=4", "layout.stages=[3, 3, 3]"],
        "layout: stages = [3, 3, 3] are 3 stages of 9 layers, but pp*vpp = 4*1 = 4 stages have model.layers = 12; "
        "nearest: stages [3, 3, 3, 3]",
    ),
    (
        "gpt2-124m",
        ["layout.pp=2", "layout.stages=[7, 5]", "layout.balance=true"],
        "layout: stages and balance are both given, and balance chooses stages; remove one",
    ),
    (
        "gpt2-124m",
        ["layout.vpp=2"],
        "layout: vpp = 2 chunks a rank need a pipeline to interleave in, but pp = 1; nearest: vpp 1, pp 2",
    ),
    (
        "gpt2-124m",
        ["layout.pp=2", "layout.vpp=3", "layout.schedule=1f1b"],
        "layout: schedule '1f1b' needs exactly 1 chunk a rank, but vpp = 3; nearest: vpp 1, schedule interleaved",
    ),
    (
        "gpt2-124m",
        ["layout.pp=2", "layout.schedule=interleaved"],
        "layout: schedule 'interleaved' needs at least 2 chunks a rank, but vpp = 1; nearest: vpp 2, schedule 1f1b or "
        "zb_h1",
    ),
    (
        "gpt2-124m",
        ["layout.pp=2", "layout.vpp=3", "layout.schedule=zbv"],
        "layout: schedule 'zbv' needs exactly 2 chunks a rank, but vpp = 3; nearest: vpp 2, schedule interleaved",
    ),
    (
        "gpt2-124m",
        ["layout.schedule=zb_h1"],
        "layout: schedule 'zb_h1' fills the bubble of a pipeline, but pp = 1; nearest: schedule 1f1b, pp 2",
    ),
    (
        "gpt2-124m",
        ["layout.pp=6", "layout.vpp=2", "layout.schedule=dualpipev", "batch.global=20", "batch.micro=2"],
        "layout: schedule 'dualpipev' needs 2*pp = 2*6 = 12 micro-batches or more, but global/(micro*dp) = 20/(2*1) = "
        "10; nearest: batch.global 24, schedule zbv",
    ),
    (
        "gpt2-124m",
        ["layout.pp=4", "layout.vpp=3", "layout.group=3"],
        "layout: group = 3 micro-batches are fewer than pp = 4 ranks, and the next chunk would wait for them; nearest: "
        "group 4, or 0 (the fewest that work)",
    ),
    (
        "gpt2-124m",
        ["layout.schedule=interleave"],
        "layout.schedule: must be 'gpipe', '1f1b', 'interleaved', 'breadth_first', 'zb_h1', 'zbv', 'dualpipev' or a "
        "file such as schedules/mine.txt, got 'interleave'; did you mean 'interleaved'?",
    ),
    (
        "gpt2-124m",
        ["layout.group=3"],
        "layout: group = 3 is for schedule 'interleaved', not '1f1b'; nearest: group 0",
    ),
    (
        "gpt2-124m",
        ["model.heads=7"],
        "model: hidden = 768 is not a whole number of heads = 7 (768 % 7 = 5); nearest: hidden 763 or 770, "
        "heads 6 or 8, or set head_dim",
    ),
    (
        "llama3-8b",
        ["model.kv_heads=5"],
        "model: heads = 32 cannot share kv_heads = 5 evenly (32 % 5 = 2); nearest: kv_heads 4 or 8, heads 30 or 35",
    ),
    (
        "llama3-8b",
        ["model.ffn=0"],
        "model: ffn is needed for family 'llama' (no rule gives it); the usual 8/3 * hidden = 10923, in "
        "multiples of 256, is 11008",
    ),
    (
        "llama3-8b",
        ["model.head_dim=127"],
        "model: head_dim = 127 is odd, but rope turns features in pairs; nearest: head_dim 126 or 128",
    ),
    (
        "gpt2-124m",
        ["model.rope_scaling={type='linear', factor=2}"],
        "model: rope_scaling needs positions = 'rope', but positions = 'learned'; remove one",
    ),
    (
        "llama3-1b",
        ["model.rope_scaling.original_context=0"],
        "model.rope_scaling: type 'llama3' needs original_context, the context of pretraining; context / factor = "
        "131072/32 = 4096",
    ),
    (
        "llama3-1b",
        ["model.rope_scaling.low_freq_factor=4"],
        "model.rope_scaling: low_freq_factor = 4 must be below high_freq_factor = 4; Llama 3.1 has 1 and 4",
    ),
    (
        "gpt2-124m",
        ["model.vocab=1"],
        "model: vocab = 1 leaves nothing to predict; use 0 (that of the data's tokenizer) or at least 2",
    ),
    (
        "gpt2-124m",
        ["batch.seq_length=2048"],
        "batch: seq_length = 2048 is longer than model.context = 1024 positions; nearest: seq_length 1024, "
        "model.context 2048",
    ),
    (
        "gpt2-124m",
        ["layout.tp=5", "layout.sequence_parallel=false"],
        "layout: tp = 5 does not divide model.heads = 12 (12 % 5 = 2); nearest: tp 4 or 6, model.heads 10 or 15",
    ),
    (
        "llama3-8b",
        ["layout.tp=12", "layout.sequence_parallel=false"],
        "layout: tp = 12 neither divides model.kv_heads = 8 nor is a multiple of it (then several ranks would "
        "hold each); nearest: tp 8 or 16, model.kv_heads 2 or 4",
    ),
    (
        "gpt2-124m",
        ["layout.tp=6", "layout.sequence_parallel=false", "model.vocab=1000"],
        "layout: tp = 6 does not divide the padded vocabulary 1024 (model.vocab = 1000 rounded up to a "
        "multiple of 128; 1024 % 6 = 4); nearest: tp 4 or 8",
    ),
    (
        "gpt2-124m",
        ["layout.cp=2", "layout.tp=4"],
        "layout: cp = 2 cuts each sequence over ranks, but no attention here reads keys of another rank; nearest: "
        "cp 1, with tp 8 or dp 2 in its place",
    ),
    (
        "gpt2-124m",
        ["layout.overlap_products=true"],
        "layout: overlap_products needs tp > 1 and sequence_parallel, whose gathers and scatters it overlaps, but tp = "
        "1 and sequence_parallel = true; nearest: overlap_products=false, tp 2",
    ),
    (
        "gpt2-124m",
        ["layout.tp=2", "layout.sequence_parallel=false", "layout.overlap_products=true"],
        "layout: overlap_products needs tp > 1 and sequence_parallel, whose gathers and scatters it overlaps, but tp = "
        "2 and sequence_parallel = false; nearest: overlap_products=false, sequence_parallel=true",
    ),
    (
        "gpt2-124m",
        ["model.head_dim=320"],
        "model: head_dim = 320 is more than the 256 features that native attention takes; nearest: head_dim 256, "
        "kernels.attention=sdpa",
    ),
    (
        "gpt2-124m",
        ["model.head_dim=136", "kernels.attention=cudnn"],
        "model: head_dim = 136 is more than the 128 features that cudnn attention takes; nearest: head_dim 128, "
        "kernels.attention=sdpa",
    ),
    (
        "gpt2-124m",
        ["model.head_dim=60", "kernels.attention=cuda"],
        "model: head_dim = 60 is no multiple of 8, as cuda attention needs (60 % 8 = 4); nearest: head_dim 56 or 64, "
        "kernels.attention=sdpa",
    ),
    (
        "gpt2-124m",
        ["run.dtype=fp32", "kernels.attention=flash"],
        "run: dtype = 'fp32', but flash attention takes fp16 and bf16 alone; nearest: run.dtype bf16, "
        "kernels.attention=sdpa",
    ),
    (
        "gpt2-124m",
        ["layout.tp=3"],
        "layout: sequence_parallel cuts 1024 tokens over tp = 3 (1024 % 3 = 1); nearest: "
        "batch.seq_length 1023 or 1026, sequence_parallel=false",
    ),
    (
        "gpt2-124m",
        ["batch.micro=7"],
        "batch: global = 512 sequences cannot be cut into micro-batches of micro*dp = 7*1 = 7 (512 % 7 = 1); "
        "nearest: global 511 or 518, micro 4 or 8",
    ),
    (
        "gpt2-124m",
        ["layout.dp=3", "batch.micro=1"],
        "batch: global = 512 sequences cannot be cut into micro-batches of micro*dp = 1*3 = 3 (512 % 3 = 2); "
        "nearest: global 510 or 513, dp 2 or 4",
    ),
    (
        "gpt2-124m",
        ["optim.min_lr=1"],
        "optim: min_lr = 1 is above lr = 0.0006; nearest: min_lr 0.0006, or 0",
    ),
    (
        "gpt2-124m",
        ["run.steps=100"],
        "optim: warmup_steps = 700 is more than run.steps = 100; nearest: run.steps 700, warmup_steps 100",
    ),
    (
        "gpt2-124m",
        ["run.steps=1000", "optim.decay_steps=400"],
        "optim: warmup_steps + decay_steps = 700 + 400 = 1100 is more than run.steps = 1000; nearest: "
        "run.steps 1100, decay_steps 300",
    ),
    (
        "gpt2-124m",
        ["optim.schedule=wsd", "run.steps=1000"],
        "optim: schedule 'wsd' needs decay_steps, the length of its final decay; 10% to 20% of run.steps = "
        "1000 is 100 to 200",
    ),
    (
        "gpt2-124m",
        ["optim.schedule=constant", "optim.decay_steps=5"],
        "optim: schedule 'constant' has no decay, but decay_steps = 5; nearest: decay_steps 0",
    ),
    *(
        (
            "gpt2-124m",
            [f"data.split={split}"],
            f"data.split: {split!r} is not three weights >= 0, for train, valid and test, with a positive sum; "
            f"for example '969,30,1' or '1,0,0'",
        )
        for split in ("90,10", "a,b,c", "0,0,0", "1,-1,1", "1,nan,1", "inf,1,1", "1,1,1,1")
    ),
    (
        "gpt2-124m",
        ["data.train=[{prefix='a', weight=1}, 'b', 'c']"],
        "data.train: 2 of 3 sources have no weight (b, c); give each one, or none (then every sample is seen once)",
    ),
    (
        "gpt2-124m",
        ["data.valid=['a', 'b', 'a']"],
        "data.valid: 'a' is listed 2 times; list it once with the summed weight",
    ),
    (
        "gpt2-124m",
        [DATA, "data.stages=[{train=['b']}]"],
        "data: train and stages are both given, and stages replace train; remove one",
    ),
    (
        "gpt2-124m",
        ["data.stages=[{until_tokens=100, train=['a']}, {until_tokens=100, train=['b']}, {train=['c']}]"],
        "data.stages.1: until_tokens = 100 is not above 100, where the stage begins; stages go up, and only "
        "the last may be 0 (to the end)",
    ),
    (
        "gpt2-124m",
        ["data.stages=[{train=['a']}, {until_tokens=1e12, train=['b']}]"],
        "data.stages.0: until_tokens = 0 is not above 0, where the stage begins; stages go up, and only the "
        "last may be 0 (to the end)",
    ),
    (
        "gpt2-124m",
        ["layout.recompute=norm", "layout.recompute_layers=2"],
        "layout: recompute_layers = 2 is for recompute = ['block'], but that is ['norm']; nearest: recompute block, or "
        "recompute_layers 0",
    ),
    (
        "gpt2-124m",
        ["optim.loss_scale=128"],
        "optim: loss_scale = 128 is for run.dtype = 'fp16', but that is 'bf16', whose range needs none; nearest: "
        "loss_scale 0, run.dtype fp16",
    ),
    (
        "gpt2-124m",
        ["optim.master=none", "run.dtype=fp16"],
        "optim: master = 'none' is for run.dtype = 'bf16', but that is 'fp16', and fp16 weights need one; nearest: "
        "master fp32, run.dtype bf16",
    ),
    (
        "gpt2-124m",
        ["optim.moments=bf16"],
        "optim: moments = 'bf16' is for bf16 weights without a master, but master = 'fp32'; nearest: moments fp32, "
        "master none",
    ),
    (
        "gpt2-124m",
        ["optim.grad_dtype=bf16", "run.dtype=fp16"],
        "optim: grad_dtype = 'bf16' is for run.dtype = 'bf16', but that is 'fp16'; nearest: grad_dtype fp32, "
        "run.dtype bf16",
    ),
    (
        "gpt2-124m",
        ["run.steps=700", "run.trace=[700, 701, 10]"],
        "run: trace = [700, 701, 10] has [701] beyond run.steps = 700; nearest: 700",
    ),
    ("gpt2-124m", ["data.stages=[{train=[]}]"], "data.stages.0: train is empty; name at least one source"),
    (
        "gpt2-124m",
        ["run.steps=1000", "data.stages=[{until_tokens=524288, train=['a']}]"],
        "data.stages.0: the last stage ends at until_tokens = 524288, but the run consumes global*seq_length*steps = "
        "512*1024*1000 = 524288000; nearest: until_tokens 0 (to the end), run.steps 1",
    ),
]


@pytest.mark.parametrize(("recipe", "overrides", "problem"), BROKEN)
def test_a_broken_rule_is_reported(recipe: str, overrides: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(recipe, overrides)
    assert problem in caught.value.problems


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("gpt2-124m", ["layout.pp=4", "layout.vpp=3"]),
        ("gpt2-124m", ["layout.pp=4", "layout.vpp=3", "layout.group=6"]),
        ("gpt2-124m", ["layout.pp=2", "layout.vpp=2", "layout.schedule=zbv"]),
        ("gpt2-124m", ["layout.pp=2", "layout.vpp=2", "layout.schedule=dualpipev"]),
        ("gpt2-124m", ["layout.pp=2", "layout.schedule=zb_h1"]),
        ("gpt2-124m", ["layout.schedule=breadth_first"]),
        ("gpt2-124m", ["layout.pp=2", "layout.vpp=3", "layout.schedule=mine.txt"]),
        ("gpt2-124m", ["layout.pp=6", "layout.tp=4", "layout.dp=8"]),
        ("gpt2-124m", ["layout.tp=4", "layout.overlap_products=true"]),
        ("gpt2-124m", ["model.head_dim=320", "kernels.attention=sdpa"]),
        ("gpt2-124m", ["model.head_dim=256"]),
        ("gpt2-124m", ["model.head_dim=320", "run.device=cuda"]),
        ("gpt2-124m", ["run.dtype=fp32", "kernels.attention=native"]),
        ("llama3-8b", ["layout.tp=16"]),  # two ranks hold each of 8 key-value heads
        ("llama3-8b", ["model.rope_scaling={type='linear', factor=4}"]),
        ("llama3-1b", ["model.rope_scaling=none"]),
        ("gpt2-124m", ["optim.schedule=wsd", "optim.decay_steps=1000"]),
        ("gpt2-124m", ["run.steps=700", "run.trace=[1, 700]"]),
        ("gpt2-124m", ["layout.recompute=['block', 'norm']", "layout.recompute_layers=2", "layout.recompute_group=2"]),
        ("gpt2-124m", ["run.dtype=fp16", "optim.loss_scale=128"]),
        ("gpt2-124m", ["optim.master=none", "optim.moments=bf16"]),
        ("gpt2-124m", ["data.stages=[{until_tokens=1e9, train=['a']}, {train=['a', 'b']}]"]),
        ("gpt2-124m", ["run.steps=1000", "data.stages=[{until_tokens=524288000, train=['a']}]"]),
        ("gpt2-124m", ["data.split='1,0,0'"]),
        ("gpt2-124m", ["model.hidden=100", "model.head_dim=8"]),  # heads need not tile hidden
    ],
)
def test_what_is_possible_is_not_refused(recipe: str, overrides: list[str]) -> None:
    load(recipe, overrides)


@given(st.integers(1, 10_000), st.integers(1, 500))
def test_nearest_multiples_are_the_nearest(value: int, divisor: int) -> None:
    found = [int(number) for number in re.findall(r"\d+", near_multiples(value, divisor))]
    assert all(number % divisor == 0 and number > 0 for number in found)
    above = next(number for number in range(value, value + divisor) if number % divisor == 0)
    below = [number for number in range(max(value - divisor + 1, 1), value + 1) if number % divisor == 0]
    assert set(found) == {above, *below}


@given(st.integers(1, 5_000), st.integers(1, 500))
def test_nearest_divisors_divide_and_none_between_is_missed(value: int, wish: int) -> None:
    found = [int(number) for number in re.findall(r"\d+", near_divisors(value, wish))]
    divisors = [number for number in range(1, value + 1) if value % number == 0]
    assert set(found) <= set(divisors)
    ratios = sorted(max(number / wish, wish / number) for number in divisors)
    assert sorted(max(number / wish, wish / number) for number in found) == pytest.approx(ratios[:2])


@given(
    layers=st.integers(1, 200),
    pp=st.integers(1, 16),
    vpp=st.integers(1, 4),
    micro=st.integers(1, 8),
    total=st.integers(1, 200),
    dp=st.integers(1, 8),
)
def test_layouts_are_refused_exactly_when_they_do_not_divide(
    layers: int, pp: int, vpp: int, micro: int, total: int, dp: int
) -> None:
    overrides = {"model.layers": layers, "layout.pp": pp, "layout.vpp": vpp, "batch.micro": micro}
    overrides |= {"batch.global": total, "layout.dp": dp}
    fits = layers % (pp * vpp) == 0 and not (vpp > 1 and pp == 1) and total % (micro * dp) == 0
    try:
        cfg = load("debug", [f"{key}={value}" for key, value in overrides.items()])
    except ConfigError as error:
        assert not fits
        for problem in error.problems:  # the nearest values do work, one at a time
            for numbers in re.findall(r"global (\d+)(?: or (\d+))?", problem):
                assert all(int(number) % (micro * dp) == 0 for number in numbers if number)
            for numbers in re.findall(r"model.layers (\d+)(?: or (\d+))?", problem):
                assert all(int(number) % (pp * vpp) == 0 for number in numbers if number)
            for numbers in re.findall(r"pp=(\d+) vpp=(\d+)", problem):
                assert layers % (int(numbers[0]) * int(numbers[1])) == 0
    else:
        assert fits
        assert cfg.batch.micro_batches(dp) * micro * dp == total
