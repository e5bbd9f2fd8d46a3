"""The rank pool: runs, failures and hangs of its ranks, and that it goes on after each."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import MOST, Pool, RankError, RunOn


def total(x: float) -> tuple[int, float]:
    tensor = torch.tensor(x + dist.get_rank())
    dist.all_reduce(tensor)
    return os.getpid(), tensor.item()


def moved(tensor: torch.Tensor) -> torch.Tensor:
    rank, world = dist.get_rank(), dist.get_world_size()
    got = torch.empty_like(tensor)
    send = dist.isend(tensor + rank, (rank + 1) % world)
    assert send is not None
    dist.recv(got, (rank - 1) % world)
    send.wait()
    return got


def fails_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"seven is not {rank}")
    dist.barrier()


def all_fail_late_but(rank: int) -> None:
    if dist.get_rank() != rank:
        time.sleep(0.1)
    raise ValueError(f"on {dist.get_rank()}")


def dies_on(rank: int, number: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), number)
    dist.barrier()


def never_comes(rank: int) -> None:
    if dist.get_rank() == rank:
        ctypes.CDLL(None).sleep(1000)  # no bytecode runs, as in a collective
    if dist.get_rank() == 0:
        wait_for_the_others()


def wait_for_the_others() -> None:
    dist.barrier()


def unpicklable() -> object:
    return lambda: None


def leaves_groups_and_threads_behind() -> tuple[int, str]:
    dist.new_group([0])
    torch.set_default_dtype(torch.float32)
    return torch.get_num_threads(), dist.get_backend()


def test_ranks_answer_in_order_and_are_kept(run_on: RunOn) -> None:
    first = run_on(4, total, 0.5)
    assert [value for _, value in first] == [8.0] * 4
    assert len({pid for pid, _ in first} | {os.getpid()}) == 5
    again = run_on(2, total, 1.0)
    assert again == [(first[0][0], 3.0), (first[1][0], 3.0)]


@pytest.mark.parametrize("n", [2, MOST])
def test_tensors_travel(run_on: RunOn, n: int) -> None:
    got = run_on(n, moved, torch.zeros(1000))
    assert [int(tensor[999]) for tensor in got] == [(rank - 1) % n for rank in range(n)]


def test_every_rank_has_one_thread_and_gloo(run_on: RunOn) -> None:
    for _ in range(2):
        assert run_on(2, leaves_groups_and_threads_behind) == [(1, "gloo")] * 2


@pytest.mark.parametrize("rank", [0, 2])
def test_a_failing_rank_is_named_with_its_traceback(run_on: RunOn, rank: int) -> None:
    with pytest.raises(RankError, match=rf"(?s)rank {rank} of 3 failed:.*in fails_on.*ValueError: seven is") as caught:
        run_on(3, fails_on, rank)
    assert caught.value.ranks == (rank,)
    assert run_on(3, total, 0.0)[0][1] == 3.0


def test_of_several_failures_the_first_is_told(run_on: RunOn) -> None:
    with pytest.raises(RankError, match=r"rank 1 of 3 failed:(?s:.*)ValueError: on 1"):
        run_on(3, all_fail_late_but, 1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_rank_that_dies_is_named_whatever_its_peers_say(run_on: RunOn, number: signal.Signals) -> None:
    with pytest.raises(RankError, match=rf"rank 1 of 3 died, exit code -{number.value}$"):
        run_on(3, dies_on, 1, number)
    assert [value for _, value in run_on(3, total, 0.0)] == [3.0] * 3


def test_a_worker_killed_between_two_runs_is_replaced(run_on: RunOn) -> None:
    before = [pid for pid, _ in run_on(3, total, 0.0)]
    os.kill(before[1], signal.SIGKILL)
    while Path(f"/proc/{before[1]}").exists():  # until all of its threads have ended, which closes its pipe
        time.sleep(0.01)
    after = [pid for pid, _ in run_on(3, total, 0.0)]
    assert before[1] not in after and {before[0], before[2]} < set(after)


def test_a_hang_names_the_silent_ranks_with_their_stacks(run_on: RunOn) -> None:
    run_on(3, total, 0.0)  # so that the time below is not spent on starting
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_on(3, never_comes, 1, timeout=6.0)
    assert 6 <= time.monotonic() - begin < 60
    assert caught.value.ranks == (0, 1)
    text = str(caught.value)
    assert "these did not answer in time: 0, 1\n" in text
    zero, one = text.partition("rank 0:")[2].split("rank 1:")
    assert "in wait_for_the_others" in zero and "in never_comes" in one and "in wait_for_the_others" not in one
    assert run_on(3, total, 0.0)[2][1] == 3.0


def test_what_cannot_be_run_is_refused_here(run_on: RunOn) -> None:
    for n in (0, MOST + 1):
        with pytest.raises(ValueError, match=rf"n = {n} ranks; there are 1 to {MOST}"):
            run_on(n, total, 0.0)
    with pytest.raises(Exception, match="pickle"):
        run_on(1, lambda: None)
    with pytest.raises(RankError, match="pickle"):
        run_on(1, unpicklable)


def test_leaving_a_pool_ends_its_processes() -> None:
    with Pool() as pool:
        pids = [pid for pid, _ in pool.run_on(2, total, 0.0)]
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    wait_until_gone(*pids)


def tells_its_pid_and_stays() -> None:
    os.write(1, b"%d\n" % os.getpid())  # at once: print may write the line and its end one after the other
    time.sleep(1000)


SESSION = """
from ranks import Pool
from test_ranks import tells_its_pid_and_stays
Pool().run_on(2, tells_its_pid_and_stays)
"""


def test_a_session_that_is_killed_leaves_no_rank_behind() -> None:
    command = [sys.executable, "-c", SESSION]
    here = str(Path(__file__).parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) as session:
        assert session.stdout is not None
        try:
            pids = [int(session.stdout.readline()) for _ in range(2)]
            assert all(alive(pid) for pid in pids)
        finally:
            session.kill()
    wait_until_gone(*pids)


def wait_until_gone(*pids: int) -> None:
    end = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end, f"of the processes {pids} some live on"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and whose parent has not asked."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
