"""The prediction and the box that shows it."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapre.config import ConfigError, load, recipe_names
from megapre.mesh import Mesh
from megapre.plan import Plan, fullest_rank, per_token, predict, render
from megapre.plan.box import counted, gib, scaled
from megapre.plan.hardware import DEVICES
from megapre.train import planned


def test_plan_json_holds_what_was_predicted() -> None:
    cfg = load("gpt2-124m", ["batch.global=64", "run.steps=1000"])
    plan = predict(cfg, Mesh(4), "cuda", "NVIDIA H200")
    found = json.loads(json.dumps(plan.as_json()))
    assert found["parameters"]["total"] == 124_439_808
    assert found["layout"]["dp"] == 4
    assert found["micro_batches"] == 2
    assert found["tokens"] == 64 * 1024 * 1000
    assert found["flops_per_token"] == per_token(cfg.model, 1024, "half")
    assert found["flops"] == found["flops_per_token"] * found["tokens"]
    assert found["memory_bytes"] == fullest_rank(cfg, 4, "cuda").as_json()
    assert found["flops_convention"] == "causal attention counted as half"


def test_mfu_is_the_share_of_the_dense_peak_of_all_devices() -> None:
    plan = predict(load("gpt2-124m"), Mesh(2), "cuda", "NVIDIA H100 80GB HBM3")
    full_speed = 2 * 989.4e12 / plan.flops_per_token
    assert plan.mfu(full_speed) == pytest.approx(1)
    assert plan.mfu(full_speed / 4) == pytest.approx(0.25)
    assert predict(load("gpt2-124m"), Mesh(2), "cpu").mfu(1e9) is None
    assert predict(load("gpt2-124m"), Mesh(2), "cuda", "NVIDIA H300").as_json()["peak_flops_per_s"] is None


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize("replicas", [1, 8])
def test_boxes_are_boxes(recipe: str, replicas: int) -> None:
    cfg = load(recipe)
    cfg = cfg if cfg.model.vocab else cfg.with_vocab(4096)
    layout = cfg.layout
    mesh = Mesh(layout.model_parallel * replicas, tp=layout.tp, pp=layout.pp, cp=layout.cp)
    if cfg.batch.global_ % (cfg.batch.micro * replicas):
        with pytest.raises(ConfigError, match="global"):
            predict(cfg, mesh)
        return
    for name in ("", DEVICES[5].names[0]):
        lines = render(
            predict(cfg, mesh, "cuda", name), {"data": "a very/" + "long/" * 40 + "path\n\nshort"}
        ).splitlines()
        assert {len(line) for line in lines} == {96}
        assert lines[0].startswith(f"╭─ {cfg.name}: ")
        assert all(line[0] + line[-1] == "││" for line in lines[1:-1])


def test_what_a_user_looks_for_is_there() -> None:
    text = render(predict(load("gpt2-124m"), Mesh(1), "cpu"), {"blend": "web 70%"})
    for part in (
        "124,439,808",
        "797.8 MFLOP a token",
        "counted as half",
        "854.4 MFLOP as full",
        "mfu n/a",
        "blend       web",
    ):
        assert part in text
    assert "524,288 tokens a step" in text
    largest = render(predict(load("llama3-405b"), Mesh(144, tp=8, pp=18), "cuda"))
    assert re.search(r"\d EFLOP a step, [\d.]+ YFLOP in all", largest) and "e+" not in largest
    assert "8 in a micro-batch x 64 micro-batches x 1 replica " in text
    assert "mesh        1 rank" in text


def test_what_does_not_fit_is_told_in_numbers() -> None:
    cfg, mesh = load("llama3-405b", ["layout.tp=8", "layout.pp=2"]), Mesh(16, tp=8, pp=2)

    def words(plan: Plan) -> str:
        return " ".join(render(plan).replace("│", " ").split())

    plan = predict(cfg, mesh, "cuda", "NVIDIA H100 80GB HBM3")
    assert plan.as_json()["device_memory_bytes"] == plan.room == 80 * 2**30
    told = f"DOES NOT FIT: {gib(plan.memory.total)} of 80 GiB on NVIDIA H100 80GB HBM3. Ways out: more ranks"
    assert plan.memory.total > 400 * 2**30 and told in words(plan)
    for room in (plan.memory.total, None):
        assert "FIT" not in words(replace(plan, room=room))
    assert "DOES NOT FIT" in words(replace(plan, room=plan.memory.total - 1))


@given(st.floats(1, 1e26))
def test_scaled_keeps_four_digits(value: float) -> None:
    number, _, prefix = scaled(value).partition(" ")
    factor = 1000.0 ** ("", "k", "M", "G", "T", "P", "E", "Z", "Y").index(prefix)
    assert float(number) * factor == pytest.approx(value, rel=6e-4)


def test_bytes_for_people() -> None:
    assert [gib(size) for size in (0, 999, 1024, 1.5 * 2**30, 80 * 2**30, 1200 * 2**30)] == [
        "0 B",
        "999 B",
        "1 KiB",
        "1.5 GiB",
        "80 GiB",
        "1,200 GiB",
    ]


def test_the_box_says_what_serves_which_calls() -> None:
    names = {"attention": "cudnn_or_triton", "rope": "triton"}
    text = planned.box(predict(load("debug", ["model.vocab=300"]), Mesh(1)), names, "runs/x")
    words = " ".join(text.replace("│", " ").split())
    assert (
        "cudnn_or_triton: attention (dense: cudnn, or sdpa where that cannot; documents, windows, lse: triton)" in words
    )
    assert "triton: rope " in words


def test_one_thing_is_no_plural() -> None:
    assert [counted(n, "micro-batch") for n in (1, 1200)] == ["1 micro-batch", "1,200 micro-batches"]
    assert [counted(n, "replica") for n in (0, 1)] == ["0 replicas", "1 replica"]
