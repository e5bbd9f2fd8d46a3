"""A clock in place of the stopwatch: each call takes what a link of known latency and bandwidth would, and noise."""

import random
from collections.abc import Callable
from typing import Any

from megapre.plan import Link


class FakeLink:
    """5% of jitter either way; one time in twelve is 2 to 30 times as long. The same on every rank with one seed."""

    def __init__(self, link: Link, seed: int = 0) -> None:
        self.link, self.rng = link, random.Random(seed)

    def __call__(self, call: Any, calls: int = 1) -> float:
        seconds = call.messages * self.link.seconds(call.collective, call.size, call.group.size)
        return self.noisy(seconds)

    def noisy(self, seconds: float) -> float:
        seconds *= self.rng.uniform(0.95, 1.05)
        return seconds * self.rng.uniform(2, 30) if self.rng.random() < 1 / 12 else seconds

    def most(self, number: float) -> float:
        return number


class FakeTrial:
    """Takes `seconds`, gives `result`."""

    def __init__(self, seconds: float, result: str = "right") -> None:
        self.seconds, self.result = seconds, result

    def __call__(self) -> None:
        pass

    def checksum(self) -> str:
        return self.result


class FakeWatch(FakeLink):
    """Of trials, by what each says it takes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(Link(0, 1), seed)

    def __call__(self, call: Callable[[], object], calls: int = 1) -> float:
        assert isinstance(call, FakeTrial)
        return self.noisy(call.seconds)
