"""Checkpoints: what comes back, what damage is found, what a full disk and kill -9 leave behind."""

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megapre import checkpoint
from megapre.checkpoint import commit


def tensors(step: int) -> dict[str, Tensor]:
    """Every kind a run saves, with values that depend on the step; one is a view into a larger buffer."""
    generator = torch.Generator().manual_seed(step)
    flat = torch.randn(5000, generator=generator)
    return {
        "model.embed.weight": flat[100:4100].view(80, 50)[:77],
        "exp_avg.embed.weight": torch.randn(77, 50, generator=generator).to(torch.bfloat16),
        "optim.updates": torch.tensor(float(step)),
        "bytes": torch.randint(256, (99,), dtype=torch.uint8, generator=generator),
    }


def read(manifest: checkpoint.Manifest) -> dict[str, Tensor]:
    found = {name: torch.zeros_like(value) for name, value in tensors(0).items()}
    checkpoint.load(manifest, found)
    return found


def assert_holds(manifest: checkpoint.Manifest, step: int) -> None:
    assert manifest.step == step
    for name, value in tensors(step).items():
        assert torch.equal(read(manifest)[name], value), name


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 100, tensors(100), {"consumed_samples": 12345678901})
    assert path == tmp_path / "step_00000100"
    manifest = checkpoint.newest_verified(tmp_path)
    assert manifest is not None and manifest.facts == {"step": 100, "consumed_samples": 12345678901}
    assert_holds(manifest, 100)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000100"], "something beside the checkpoint was left"


def test_loading_into_a_view_leaves_the_rows_outside_it_alone(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"w": torch.ones(3, 4)}, {})
    padded = torch.full((5, 4), 7.0)
    checkpoint.load(checkpoint.verify(tmp_path / "step_00000001"), {"w": padded[:3]})
    assert padded[:3].eq(1).all() and padded[3:].eq(7).all()


def test_no_checkpoint_is_none_and_order_is_by_step_not_by_time(tmp_path: Path) -> None:
    assert checkpoint.newest_verified(tmp_path / "nothing") is None
    for step in (900, 1000, 20):  # saved in this order
        checkpoint.save(tmp_path, step, tensors(step), {})
        os.utime(tmp_path / f"step_{step:08d}", (2e9 - step, 2e9 - step))
    newest = checkpoint.newest_verified(tmp_path)
    assert newest is not None and newest.step == 1000


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def grow(file: Path) -> None:
    with file.open("ab") as f:
        f.write(b"\0")


def delete(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, grow, delete])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_damage_is_found_named_and_passed_over(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tensors(step), {})
    newest = tmp_path / "step_00000002" / name
    damage(newest)
    with pytest.raises(checkpoint.CheckpointError, match=rf"step_00000002/{name}"):
        checkpoint.verify(newest.parent)
    told: list[str] = []
    older = checkpoint.newest_verified(tmp_path, told.append)
    assert older is not None
    assert_holds(older, 1)
    assert len(told) == 1 and name in told[0]


def test_when_none_is_whole_every_reason_is_told(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tensors(step), {})
        flip(tmp_path / f"step_{step:08d}" / "__0_0.distcp")
    with pytest.raises(checkpoint.CheckpointError, match=r"(?s)step_00000002.*step_00000001"):
        checkpoint.newest_verified(tmp_path)


def test_another_model_is_refused_by_name_and_shape(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"w": torch.ones(3, 4)}, {})
    manifest = checkpoint.verify(tmp_path / "step_00000001")
    with pytest.raises(checkpoint.CheckpointError, match="no tensor 'v'"):
        checkpoint.load(manifest, {"v": torch.ones(3, 4)})
    with pytest.raises(checkpoint.CheckpointError, match=r"\[3, 4\].*\[4, 4\]"):
        checkpoint.load(manifest, {"w": torch.ones(4, 4)})


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, tensors(4), {})
    flip(tmp_path / "step_00000005" / "__0_0.distcp")
    checkpoint.save(tmp_path, 5, tensors(5), {})
    assert_holds(checkpoint.verify(tmp_path / "step_00000005"), 5)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("room", [0, 100, 8000])
def test_a_full_disk_is_an_error_that_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path, room: int) -> None:
    """A limit on the size of files stands in for the full disk: writes fail half way, as they do there."""
    checkpoint.save(tmp_path, 1, tensors(1), {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(checkpoint.CheckpointError, match="step 2 could not be written"):
            checkpoint.save(tmp_path, 2, tensors(2), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    assert_holds(checkpoint.verify(tmp_path / "step_00000001"), 1)


def forked_saver(folder: Path, kill_before: int = 0) -> tuple[int, int]:
    """A child that saves steps 2, 3, ... and writes a byte per step into a pipe; returns its pid and the pipe's end.

    With `kill_before` n it kills itself right before its n-th call that changes the folder.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    try:
        left = kill_before

        def counting(function: Callable) -> Callable:
            def wrapper(*args: object, **kwargs: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapper

        if kill_before:
            for owner, names in ((os, ("fsync", "rmdir", "unlink")), (Path, ("mkdir", "rename", "open"))):
                for name in names:
                    setattr(owner, name, counting(getattr(owner, name)))
        for step in range(2, 1000):
            checkpoint.save(folder, step, tensors(step), {})
            checkpoint.retain(folder, 1)
            os.write(writing, b".")
    finally:
        os._exit(1)  # never back into the tests


def assert_whole_after_kill(folder: Path, last_reported: int) -> None:
    newest = checkpoint.newest_verified(folder, lambda problem: pytest.fail(f"a torn checkpoint counted: {problem}"))
    assert newest is not None and newest.step >= last_reported
    assert_holds(newest, newest.step)
    checkpoint.save(folder, 5000, tensors(5000), {})  # the folder can be used again, and cleans up
    checkpoint.retain(folder, 1)
    assert [p.name for p in folder.iterdir()] == ["step_00005000"]


def saved_when_killed(pid: int, pipe: int) -> int:
    """Waits for the child's death by SIGKILL; the last step that it had reported."""
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    with os.fdopen(pipe, "rb") as reports:
        return 1 + len(reports.read())


def test_kill_at_every_call_that_changes_the_folder(tmp_path: Path) -> None:
    """Through all such calls of one save and its retention, and into the next."""
    count, last = 0, 1
    while last < 2:
        count += 1
        folder = tmp_path / str(count)
        checkpoint.save(folder, 1, tensors(1), {})
        last = saved_when_killed(*forked_saver(folder, kill_before=count))
        assert_whole_after_kill(folder, last)
    assert count > 15, "too few calls were counted to have met the writes, the rename and the removal"


def test_kill_at_random_times(tmp_path: Path) -> None:
    chance = random.Random(0)
    for trial in range(25):
        folder = tmp_path / str(trial)
        checkpoint.save(folder, 1, tensors(1), {})
        pid, pipe = forked_saver(folder)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert_whole_after_kill(folder, saved_when_killed(pid, pipe))


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, tensors(step), {})
    (tmp_path / ".step_00000009.partial").mkdir()
    assert checkpoint.retain(tmp_path, 0) == []
    assert sorted(p.name for p in checkpoint.retain(tmp_path, 2)) == [f"step_{s:08d}" for s in (1, 2, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000004", "step_00000005"]


def test_retention_never_removes_the_newest_whole_one(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, tensors(step), {})
    for step in (4, 5):
        flip(tmp_path / f"step_{step:08d}" / ".metadata")
    checkpoint.retain(tmp_path, 1)
    assert [p.name for p in commit.committed(tmp_path)] == [f"step_{s:08d}" for s in (5, 4, 3)]
    newest = checkpoint.newest_verified(tmp_path)
    assert newest is not None and newest.step == 3


def test_an_edited_manifest_is_found(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 2, tensors(2), {}) / "manifest.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    with pytest.raises(checkpoint.CheckpointError, match="own checksum"):
        checkpoint.verify(path.parent)


def test_a_manifest_of_a_later_format_is_named(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, tensors(1), {}) / "manifest.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    body["format"] = 2
    path.write_text(json.dumps({**body, "sha256": commit._own_checksum(body)}))
    with pytest.raises(checkpoint.CheckpointError, match="format 2"):
        checkpoint.verify(path.parent)
