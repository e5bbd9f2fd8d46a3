"""Tiles of the Triton attention kernels: the arithmetic that prunes them, and the file that keeps what was measured."""

import json
import re
from pathlib import Path

import pytest
import torch

from megapre.kernels import profile
from megapre.kernels.triton import tiles
from megapre.kernels.triton.tiles import Kind, Tiles

TABLE = Path(__file__).parents[1] / "triton" / "aot_table.json"
ROW = re.compile(
    r"sm_(?P<arch>\d+) attention (?P<dim>\d+): (?P<kernel>forward|key|query)_kernel\[bfloat16 .*BLOCK_M=(?P<m>\d+) "
    r"BLOCK_N=(?P<n>\d+) BLOCK_D=\d+ .*num_stages=(?P<s>\d+) num_warps=(?P<w>\d+)\]"
)
KINDS = {"forward": "forward", "key": "keys", "query": "queries"}


def test_the_arithmetic_is_what_triton_allocates() -> None:
    """Of every 16-bit attention kernel in the ahead-of-time table of sm_90."""
    checked = 0
    for label, row in json.loads(TABLE.read_text())["rows"].items():
        found = ROW.match(label)
        if found is None or found["arch"] != "90":
            continue
        kind = Kind(KINDS[found["kernel"]], int(found["dim"]), 2, True)
        given = Tiles(*(int(found[name]) for name in "mnws"))
        assert 0 <= row["shared"] - tiles.shared_bytes(kind, given) <= 1024, label
        checked += 1
    assert checked > 10


@pytest.mark.parametrize("kernel", KINDS.values())
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("shared", [tiles.SHARED, 163 * 1024])
def test_candidates_fit_and_are_few(kernel: str, head_dim: int, shared: int) -> None:
    kind = Kind(kernel, head_dim, 2, True)
    found = list(tiles.candidates(kind, shared))
    assert 1 <= len(found) <= 40 < 3 * 3 * 2 * 3 and len(set(found)) == len(found)
    for one in found:
        assert tiles.shared_bytes(kind, one) < shared and tiles.numbers(kind, one) <= tiles.NUMBERS
    sizes = [one.queries * one.keys / (one.queries + one.keys) for one in found]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_tiles_of_the_table_are_among_them(head_dim: int) -> None:
    pytest.importorskip("triton")
    from megapre.kernels.triton import attention, attention_backward

    policies = {
        "forward": attention.policy,
        "keys": attention_backward.key_policy,
        "queries": attention_backward.query_policy,
    }
    for kernel, policy in policies.items():
        for dense in (True, False):
            assert policy(head_dim, 2, dense) in list(tiles.candidates(Kind(kernel, head_dim, 2, dense))), kernel


@pytest.mark.parametrize("room", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_default_tiles_fit_the_gpu_at_hand(head_dim: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """99 KiB are those of sm_86, sm_89 and sm_120, where the tiles for sm_90 cannot be launched."""
    pytest.importorskip("triton")
    from megapre.kernels.triton import attention, attention_backward

    monkeypatch.setattr(tiles, "shared_here", lambda: room)
    tiles.within.cache_clear()
    for kernel, policy in (
        ("forward", attention.policy),
        ("keys", attention_backward.key_policy),
        ("queries", attention_backward.query_policy),
    ):
        for dense in (True, False):
            chosen = Tiles(*policy(head_dim, 2, dense))
            assert tiles.shared_bytes(Kind(kernel, head_dim, 2, dense), chosen) + 1024 <= room, kernel
    tiles.within.cache_clear()


def test_the_fastest_is_written_and_used_where_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("MEGAPRE_KERNEL_PROFILE", str(tmp_path / "profile.json"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(profile, "hardware", lambda device: "A GPU")
    kind, other = Kind("forward", 128, 2, True), Kind("keys", 128, 2, False)
    wanted = Tiles(64, 64, 4, 3)
    best, times = tiles.tune(kind, lambda one: 1.0 if one == wanted else 2.0 if one.stages < 3 else float("inf"))
    assert best == wanted and len(times) == len(list(tiles.candidates(kind)))
    tiles.measured.cache_clear()
    assert tiles.measured(kind) is None
    file = tiles.write({kind: best})
    tiles.write({other: Tiles(32, 64, 4, 2)})
    assert file.parent == tmp_path and tiles.measured(kind) == wanted
    assert tiles.measured(other) == Tiles(32, 64, 4, 2) and tiles.measured(Kind("forward", 64, 2, True)) is None

    tiles.write({kind: Tiles(128, 128, 4, 4)})  # by hand, or of an older rule: it does not fit
    assert tiles.measured(kind) is None
    tiles.write({kind: wanted})
    monkeypatch.setattr(profile, "hardware", lambda device: "Another GPU")
    tiles.measured.cache_clear()
    assert tiles.measured(kind) is None
    monkeypatch.setattr(profile, "hardware", lambda device: "A GPU")
    for text in ("no JSON", "[]", '{"format": 2, "tiles": {}}', '{"format": 1, "tiles": {"x": {"y": ["a", 1, 2, 3]}}}'):
        file.write_text(text)
        tiles.measured.cache_clear()
        assert tiles.measured(kind) is None
    monkeypatch.setenv("MEGAPRE_KERNEL_PROFILE", "off")
    with pytest.raises(ValueError, match="turns measured tiles off"):
        tiles.write({kind: wanted})
    tiles.measured.cache_clear()
