"""What collectives add to stages and to a step, by hand."""

import pytest

from megapre.config import Config, load
from megapre.plan.buffers import Held, elements
from megapre.plan.communication import Shown, of_data, of_tensor
from megapre.plan.link import Link
from megapre.plan.stages import Rates, stage_costs
from megapre.schedule import Costs, build, simulate

LINK = Link(0.0, 1.0)  # a byte a second
FAST, SLOW = 1e30, 1e-30  # FLOP/s: products that hide nothing, and everything


def config(*overrides: str) -> Config:
    return load("llama3-8b", ["layout.tp=4", "layout.pp=2", "batch.seq_length=1024", *overrides])


STREAM = 2 * 1024 * 4096  # bytes of the whole stream of a micro-batch
SHARE = 3 / 4 * STREAM  # that a ring of four sends of it


def test_without_sequence_parallelism_a_layer_sums_twice_each_way() -> None:
    cfg = config("layout.sequence_parallel=false")
    bare, hidden = of_tensor(cfg, LINK, FAST), of_tensor(cfg, LINK, SLOW)
    assert bare.layer == pytest.approx(Shown(4 * SHARE, 4 * SHARE, 4 * SHARE))
    assert hidden.layer == pytest.approx(Shown(4 * SHARE, 4 * SHARE, 0))  # beside dW, but not where W is later
    assert bare.embedding == pytest.approx(Shown(2 * SHARE, 0, 0))
    assert bare.head == pytest.approx(Shown(0, 2 * SHARE, 2 * SHARE))


def test_with_sequence_parallelism_a_layer_gathers_and_scatters_the_same_bytes() -> None:
    bare, hidden = of_tensor(config(), LINK, FAST), of_tensor(config(), LINK, SLOW)
    assert bare.layer == pytest.approx(Shown(4 * SHARE, 6 * SHARE, 6 * SHARE))  # the input of a column layer twice
    assert hidden.layer == pytest.approx(Shown(4 * SHARE, 4 * SHARE, 2 * SHARE))
    assert bare.embedding == pytest.approx(Shown(SHARE, SHARE, SHARE)) == bare.head


def test_pieces_hide_all_but_what_is_longer_than_their_products() -> None:
    assert of_tensor(config("layout.overlap_products=true"), LINK, SLOW).layer.forward == 0
    assert of_tensor(config("layout.overlap_products=true"), LINK, FAST).layer.forward == pytest.approx(4 * SHARE)


def test_stages_wait_for_their_collectives() -> None:
    cfg = config("layout.recompute=['block']", "layout.recompute_layers=2")
    alone, together = (stage_costs(cfg, 1, Rates(FAST, FAST, tensor=link)) for link in (None, LINK))
    extra = {
        name: [b - a for a, b in zip(getattr(alone, name), getattr(together, name), strict=True)]
        for name in ("forward", "input", "weights", "backward")
    }
    assert extra["forward"] == pytest.approx([(16 * 4 + 1) * SHARE] * 2)
    assert extra["input"] == pytest.approx([((16 * 6 + 1) + 2 * 4) * SHARE] * 2)
    assert extra["backward"] == pytest.approx(extra["input"]) and extra["weights"] == [0, 0]
    assert of_tensor(config("layout.tp=1"), LINK, FAST).layer == Shown()


def of_one_rank(dp: int, *overrides: str) -> tuple[float, int, int]:
    """What two replicas add to F [0, 10] B [10, 30] of a whole model, and its buckets and elements."""
    cfg = load("debug", ["model.vocab=300", f"batch.global={2 * dp}", "batch.micro=2", *overrides])
    whole, _ = elements(cfg, Held(2, True, True), dp)
    timeline = simulate(build("1f1b", 1, 1, 1), Costs.of(1, forward=10, backward=20))
    per_second = 4 * whole / 2 / 5  # half of the bytes, what a ring of two sends, takes 5
    return of_data(cfg, timeline, dp, Link(0.0, per_second)), max(round(whole / (cfg.layout.bucket or 25e6)), 1), whole


def test_replicas_add_what_the_last_backward_and_the_first_forward_do_not_hide() -> None:
    assert of_one_rank(1)[0] == 0
    added, buckets, _ = of_one_rank(2)
    assert buckets == 1 and added == pytest.approx(5 + 5)  # one bucket: summed after the end, there before the start
    added, buckets, whole = of_one_rank(2, "layout.bucket=16384")
    # A bucket of n is ready every 20 / n and takes 5 / n: only the last is seen. They come back every 5 / n and are
    # wanted every 10 / n: only the first is.
    assert buckets == round(whole / 16384) > 4 and added == pytest.approx(10 / buckets)
    assert of_one_rank(2, "layout.bucket=16384", "layout.shard_optimizer=false")[0] == pytest.approx(10 / buckets)


def test_a_rank_that_is_done_early_sums_while_others_work() -> None:
    """The last rank of 1F1B ends p - 1 backwards before the first: its sums are hidden there."""
    cfg = load("debug", ["model.vocab=300", "layout.pp=2", "layout.dp=2", "batch.global=16", "layout.bucket=1"])
    timeline = simulate(build("1f1b", 2, 1, 4), Costs.of(2, forward=1, backward=2))
    whole, _ = elements(cfg, Held(1, True, False), 2)
    last, _ = elements(cfg, Held(1, False, True), 2)
    assert last > whole
    quick = of_data(cfg, timeline, 2, Link(0.0, 1e30))
    assert quick == pytest.approx(0, abs=1e-12)
    slow = of_data(cfg, timeline, 2, Link(0.0, 4 * last / 2 / 2))  # the last rank's sums take 2: as long as a B
    assert 0 < slow < 2
