"""Triton's kernels are launched on the device of what they work on, whichever is current: shown without any device."""

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megapre.kernels.triton import library


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The current device of a machine with some, in a list of one; 0 at first."""
    now = [0]

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before, now[0] = now[0], wanted.index
        yield
        now[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    return now


def test_a_kernel_runs_on_the_device_of_its_tensors(current: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def launch(*arguments: Any) -> str:
        ran.append(current[0])
        return "result"

    monkeypatch.setitem(sys.modules, "megapre.kernels.triton.made_up", SimpleNamespace(launch=launch))
    call = library.late("made_up", "launch")
    with FakeTensorMode(allow_non_fake_inputs=True):
        first, second = (torch.empty(2, device=f"cuda:{index}") for index in (0, 1))
        host = torch.empty(2)
    for arguments, device in (
        ((second,), 1),
        ((None, 0.5, second, first), 1),
        (([second, second],), 1),
        ((host, first), 0),
        ((host,), 0),
        (([], None), 0),
    ):
        assert call(*arguments) == "result"
        assert ran.pop() == device and current == [0]
    current[0] = 1
    call(first)
    assert ran == [0] and current == [1]
