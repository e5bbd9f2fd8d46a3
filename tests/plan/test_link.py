"""The latency-bandwidth fit: a known link comes back out of noisy times, and what is no link is refused."""

import random
from collections.abc import Iterator

import pytest

from megapre.observe.bench_comm import linked, row
from megapre.plan import Link
from megapre.plan.link import FACTORS, FitError, fit

SIZES = [2**power for power in range(10, 29)]


def times_of(link: Link, collective: str, ranks: int, seed: int) -> Iterator[tuple[int, list[float]]]:
    """By size 25 times of a link with 5% of jitter either way, one in twelve of them 2 to 30 times as long."""
    rng = random.Random(seed)
    for size in SIZES:
        true = link.seconds(collective, size, ranks)
        times = [true * rng.uniform(0.95, 1.05) for _ in range(25)]
        yield size, [time * rng.uniform(2, 30) if rng.random() < 1 / 12 else time for time in times]


@pytest.mark.parametrize("collective", FACTORS)
@pytest.mark.parametrize("ranks", [2, 8])
def test_latency_and_bandwidth_of_a_noisy_link_come_back_within_2_per_cent(collective: str, ranks: int) -> None:
    for seed in range(40):
        rng = random.Random(1000 + seed)
        link = Link(10 ** rng.uniform(-5.3, -3), 10 ** rng.uniform(9, 11.6))
        rows = [row("dp", ranks, collective, size, times) for size, times in times_of(link, collective, ranks, seed)]
        found = linked(rows)
        assert isinstance(found, Link), found
        assert found.latency == pytest.approx(link.latency, rel=0.02), seed
        assert found.bandwidth == pytest.approx(link.bandwidth, rel=0.02), seed
        assert found.error < 0.02 and found.error <= found.worst < 0.1


def test_without_noise_the_fit_is_exact() -> None:
    link = Link(2e-5, 4e10)
    found = fit("all_reduce", 4, {size: link.seconds("all_reduce", size, 4) for size in SIZES})
    assert found.latency == pytest.approx(2e-5, rel=1e-9) and found.bandwidth == pytest.approx(4e10, rel=1e-9)
    assert found.worst < 1e-9
    assert link.seconds("all_reduce", 1e9, 4) == pytest.approx(2e-5 + 1.5e9 / 4e10)  # 2 (n - 1) / n
    assert link.seconds("all_reduce", 1e9, 1) == 0


def test_small_and_large_messages_count_alike() -> None:
    """Plain least squares would give the latency away for the last 1% of the largest time."""
    link = Link(1e-5, 1e10)
    times = {size: link.seconds("broadcast", size, 2) for size in SIZES}
    times[SIZES[-1]] *= 1.02
    assert fit("broadcast", 2, times).latency == pytest.approx(1e-5, rel=0.005)


def test_a_size_far_off_does_not_bend_the_line_and_is_told() -> None:
    link = Link(1e-5, 1e10)
    times = {size: link.seconds("broadcast", size, 2) * (1 + 0.001 * (-1) ** n) for n, size in enumerate(SIZES)}
    times[SIZES[9]] *= 3
    found = fit("broadcast", 2, times)
    assert found.latency == pytest.approx(1e-5, rel=0.02) and found.bandwidth == pytest.approx(1e10, rel=0.02)
    assert found.worst == pytest.approx(2 / 3, abs=0.01) and found.error < 0.005


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ({1024: 1e-5, 2048: 1e-5}, "2 sizes give no latency"),
        ({1024: 1e-5, 2048: 0.9e-5, 4096: 0.5e-5}, "do not grow with the size, 1e-05 s at 1,024 bytes"),
        ({1024: 1e-5, 2048: 0.0, 4096: 1e-5}, "a time of 0 s is none"),
    ],
)
def test_what_is_no_link_is_refused(times: dict[int, float], message: str) -> None:
    with pytest.raises(FitError, match=message):
        fit("broadcast", 2, times)


def test_a_link_without_latency_has_none_below_zero() -> None:
    found = fit("broadcast", 2, {size: size / 1e9 * (0.99 if size < 10000 else 1) for size in SIZES})
    assert found.latency == 0.0 and found.bandwidth == pytest.approx(1e9, rel=0.01)
