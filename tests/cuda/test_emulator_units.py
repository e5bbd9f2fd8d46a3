"""The emulated units of sm_90: layouts are those of the PTX ISA, and what breaks their rules is caught."""

import shutil
from pathlib import Path

import emulated
import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def loaded_units(loaded_emulator: emulated.Emulator, tmp_path_factory: pytest.TempPathFactory) -> emulated.Emulator:
    folder = tmp_path_factory.mktemp("units")
    shutil.copytree(emulated.SOURCES, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.cu"))
    shutil.copy(HERE / "warpgroup_cases.cu", folder)
    return emulated.Emulator(emulated.build(folder, "megapre_units"), "megapre_units")


@pytest.fixture(params=[0, 1, 2])
def units(loaded_units: emulated.Emulator, request: pytest.FixtureRequest) -> emulated.Emulator:
    """Under several seeds: work of the units is done at other moments."""
    loaded_units.schedule(request.param)
    return loaded_units


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Small integers, whose products and sums are exact."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def sums_table(n: int) -> list[list[tuple[int, int]]]:
    """(row, column) of each register of each thread: PTX ISA, figure of the matrix D of wgmma.m64nNk16."""
    table = []
    for thread in range(128):
        warp, group, in_group = thread // 32, thread % 32 // 4, thread % 4
        registers = []
        for eight in range(0, n, 8):
            for row in (group, group + 8):
                registers += [(16 * warp + row, eight + 2 * in_group), (16 * warp + row, eight + 2 * in_group + 1)]
        table.append(registers)
    return table


def as_registers(a: Tensor) -> Tensor:
    """A [64, 64] in the registers of 4 steps of 16 columns, [4, 128, 8]: PTX ISA, figure of A in registers."""
    registers = torch.empty(4, 128, 8, dtype=a.dtype)
    for step in range(4):
        for thread in range(128):
            row, column = 16 * (thread // 32) + thread % 32 // 4, 16 * step + thread % 4 * 2
            places = [(row, column), (row + 8, column), (row, column + 8), (row + 8, column + 8)]
            registers[step, thread] = torch.stack([a[r, c + e] for r, c in places for e in (0, 1)])
    return registers


@pytest.mark.parametrize("n", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("from_registers", [False, True])
def test_products_and_their_layouts(
    units: emulated.Emulator, n: int, dtype: torch.dtype, transposed: bool, from_registers: bool
) -> None:
    a, b = drawn(64, 64, dtype=dtype), drawn(64, n, dtype=dtype)
    registers = as_registers(a).view(torch.int32) if from_registers else None
    given = torch.full_like(a, torch.nan) if from_registers else a
    sums = units.ops.product(given, b if transposed else b.T.contiguous(), registers, transposed, "")
    rows, columns = torch.tensor(sums_table(n)).unbind(-1)
    assert torch.equal(sums, (a.float() @ b.float())[rows, columns])


@pytest.mark.parametrize(("row", "column"), [(0, 0), (10, 64), (-3, 0), (200, 64), (60, 128), (300, 0)])
def test_a_box_lies_swizzled_and_ends_in_zeros(units: emulated.Emulator, row: int, column: int) -> None:
    t = drawn(230, 104)
    whole = torch.zeros(1000, 256, dtype=t.dtype)
    whole[200:430, :104] = t
    expected = torch.empty(128, 64, dtype=t.dtype)
    for r in range(128):
        for piece in range(8):  # of 16 bytes: bits 4 to 6 of the address, xored with bits 7 to 9
            address = 128 * r + 16 * piece
            swizzled = address ^ (address >> 7 & 7) << 4
            into = expected.view(-1)[swizzled // 2 : swizzled // 2 + 8]
            into.copy_(whole[200 + row + r, column + 8 * piece : column + 8 * piece + 8])
    assert torch.equal(units.ops.box(units.guarded(t), row, column), expected)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (64, 64), (150, 64)])
def test_a_stored_box_ends_where_the_tensor_ends(units: emulated.Emulator, row: int, column: int) -> None:
    t = units.guarded(torch.full((200, 104), -1.0, dtype=torch.bfloat16))
    expected = t.clone()
    expected[row : row + 128, column : column + 64] = torch.arange(128.0)[: 200 - row, None].to(t.dtype)
    units.ops.store_box(t, row, column, "")
    assert torch.equal(t, expected)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("no wait", "blocks have ended with copies under way that nobody waited for"),
        ("wrong phase", "blocks have ended with copies under way that nobody waited for"),
        ("no arrive", "wgmma without wgmma.fence"),
        ("touched sums", "sums of a product were written between its start and the wait for it"),
        ("mixed panels", "wgmma with different descriptors in the lanes of a warp"),
        ("no swizzle", "a matrix descriptor with another swizzle"),
        ("not initialised", "an mbarrier that was not initialised"),
        ("too many bytes", "threads wait for each other for ever: 128 wait at an mbarrier"),
        ("too early write", "poison"),
        ("read sums", "poison"),
    ],
)
def test_a_mistake_in_a_product_is_caught(loaded_units: emulated.Emulator, mistake: str, said: str) -> None:
    loaded_units.schedule(0)  # all is done as late as can be
    a, b = drawn(64, 64), drawn(64, 64)
    if said == "poison":
        assert loaded_units.ops.product(a, b, None, False, mistake).isnan().any()
    else:
        with pytest.raises(RuntimeError, match=said):
            loaded_units.ops.product(a, b, None, False, mistake)
    assert not loaded_units.ops.product(a, b, None, False, "").isnan().any(), "and the next launch runs"


def test_a_mistake_in_a_store_is_caught(loaded_units: emulated.Emulator) -> None:
    t = loaded_units.guarded(torch.zeros(128, 64, dtype=torch.bfloat16))
    loaded_units.schedule(0)
    loaded_units.ops.store_box(t, 0, 0, "no fence")
    assert t.isnan().any(), "what threads wrote is not seen without a fence"
    with pytest.raises(RuntimeError, match="blocks have ended with copies under way that nobody waited for"):
        loaded_units.ops.store_box(t, 0, 0, "unfinished store")


def test_registers_move_and_are_not_made(units: emulated.Emulator) -> None:
    assert torch.equal(units.ops.registers(torch.empty(0), 24), torch.ones(384))
    with pytest.raises(RuntimeError, match=r"for ever: .* wait at registers that others give up"):
        units.ops.registers(torch.empty(0), 32)


def test_maps_that_the_driver_refuses(loaded_units: emulated.Emulator) -> None:
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled: CUDA driver error 1"):
        loaded_units.ops.box(drawn(130, 100), 0, 0)
