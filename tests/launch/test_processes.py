"""The launcher against small scripts: what ranks are told, whom it blames, and that none outlives it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megapre.launch import processes

SCRIPT = "import os, signal, sys, time; rank = int(os.environ['RANK'])\n"
LAUNCHER = """
import sys
from pathlib import Path
from megapre.launch.processes import launch
nproc, grace, logs, script = sys.argv[1:]
import os
sys.exit(launch([sys.executable, "-uc", script], int(nproc), Path(logs), float(grace), os.environ))
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a launcher of `nproc` ranks that run `body`, in the background."""
    started = []

    def launcher(nproc: int, body: str, grace: float = 20.0, prefix: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
        command = [*prefix, sys.executable, "-c", LAUNCHER, str(nproc), str(grace), str(tmp_path / "logs")]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen([*command, SCRIPT + body], stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield launcher
    for process in started:
        process.kill()
        process.communicate()


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def pids_of(process: "subprocess.Popen[str]", count: int) -> list[int]:
    """What the ranks print first."""
    assert process.stdout is not None
    return [int(process.stdout.readline().split()[-1]) for _ in range(count)]


def test_every_rank_is_told_what_torchrun_tells(start: Start, tmp_path: Path) -> None:
    names = ["LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    process = start(3, f"print(*(os.environ[name] for name in {names}))")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    lines = sorted(out.splitlines())
    port = lines[0].split()[-1]
    assert lines == [f"[{rank}] {rank} 3 3 127.0.0.1 {port}" for rank in range(3)]
    for rank in range(3):
        assert (tmp_path / "logs" / f"rank{rank}.out").read_text() == f"{rank} 3 3 127.0.0.1 {port}\n"


REFUSE = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which the others are ended once one has failed
os.makedirs(FOLDER, exist_ok=True)
open(f'{FOLDER}/{rank}', 'w').close()
while len(os.listdir(FOLDER)) < int(os.environ['WORLD_SIZE']): time.sleep(0.01)

def refuse(text, wait=0.0):
    time.sleep(wait)
    print('megapre: error: ' + text, file=sys.stderr)
    os._exit(2)
"""


def test_an_error_of_several_ranks_is_shown_once_with_their_numbers(start: Start, tmp_path: Path) -> None:
    """The first to fail comes last, as always; what differs from rank to rank by itself makes no difference."""
    body = (
        f"FOLDER = {str(tmp_path / 'met')!r}{REFUSE}print('ready')\n"
        "if rank == 3: refuse('recipe: 2 problems\\n  - one\\n  - two')\n"
        "if rank == 4: refuse('recipe: 2 problems\\n  - one\\n  - two', 0.5)\n"
        "refuse(f'rank {rank}: lost [127.0.0.1]:{4000 + rank}', 1.0)"
    )
    process = start(5, body)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    shown = [line for line in out.splitlines() if "ready" not in line]
    assert shown == ["[0-2] megapre: error: lost [127.0.0.1]"]
    assert err.splitlines() == [
        "megapre: rank 3 ended with exit code 2, the first of 5 that failed; rank 4 said the same; its last lines, "
        f"all of them in {tmp_path / 'logs' / 'rank3.out'}:",
        "megapre: error: recipe: 2 problems",
        "  - one",
        "  - two",
    ]
    for rank in range(5):
        assert "megapre: error: " in (tmp_path / "logs" / f"rank{rank}.out").read_text()


def test_what_one_rank_says_for_all_is_what_is_shown(start: Start, tmp_path: Path) -> None:
    """Although another one, which leaves it to that, ends first."""
    body = f"FOLDER = {str(tmp_path / 'met')!r}{REFUSE}refuse('rank 2: no file', 0.5) if rank == 0 else os._exit(2)"
    out, err = start(3, body).communicate(timeout=60)
    assert out == "" and err.splitlines()[0].startswith("megapre: rank 0 ended with exit code 2, the first of 3")
    assert err.splitlines()[1:] == ["megapre: error: rank 2: no file"]


def test_an_error_of_a_rank_that_was_not_the_first_to_die_is_shown_too(start: Start, tmp_path: Path) -> None:
    body = "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else refuse('a peer is gone', 0.5)"
    out, err = start(3, f"FOLDER = {str(tmp_path / 'met')!r}{REFUSE}{body}").communicate(timeout=60)
    assert out == "[0, 2] megapre: error: a peer is gone\n"
    assert err.startswith("megapre: rank 1 was killed by SIGKILL, the first of 3 that failed\n")


def test_an_error_is_shown_although_the_user_does_not_wait(start: Start, tmp_path: Path) -> None:
    body = "refuse('no data') if rank == 0 else time.sleep(60)"
    process = start(2, f"FOLDER = {str(tmp_path / 'met')!r}{REFUSE}{body}")
    wait_until(lambda: "no data" in read(tmp_path / "logs" / "rank0.out"), "rank 0 has said nothing")
    process.terminate()
    assert process.stderr is not None and "once more" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == "megapre: SIGINT again: ranks are killed\n"
    assert out == "[0] megapre: error: no data\n"


def test_what_a_rank_says_is_shown_although_it_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "FAILURE_GRACE", 0.5)
    body = "print('megapre: error: no data', flush=True); time.sleep(60)"
    assert processes.launch([sys.executable, "-c", SCRIPT + body], 2, tmp_path, 60.0, os.environ) == 137
    out, err = capfd.readouterr()
    assert out == "[0-1] megapre: error: no data\n"
    assert err.startswith("megapre: ranks that did not end in time are killed: ")


def test_lines_stay_whole_and_none_is_lost(start: Start, tmp_path: Path) -> None:
    body = "for i in range(3000): print(f'{rank} {i} ' + 'x' * 100)\nsys.stdout.write(f'{rank} end without a newline')"
    out, _ = start(4, body).communicate(timeout=60)
    for rank in range(4):
        mine = [line.removeprefix(f"[{rank}] ") for line in out.splitlines() if line.startswith(f"[{rank}] ")]
        assert mine == [*(f"{rank} {i} {'x' * 100}" for i in range(3000)), f"{rank} end without a newline"]
        assert (tmp_path / "logs" / f"rank{rank}.out").read_text().splitlines() == mine
    assert len(out.splitlines()) == 4 * 3001


def test_logs_are_appended_to(start: Start, tmp_path: Path) -> None:
    for word in ("first", "second"):
        start(1, f"print({word!r})").communicate(timeout=60)
    assert (tmp_path / "logs" / "rank0.out").read_text() == "first\nsecond\n"


FAILS = """
if rank == 2:
    raise ValueError("the seventh layer is missing")
signal.signal(signal.SIGTERM, lambda *_: (print("asked to end"), sys.exit(75)))
signal.sigtimedwait([], 60)
"""


def test_the_first_rank_that_fails_ends_all_and_is_shown_last(start: Start) -> None:
    process = start(3, FAILS)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    head, *rest = err.splitlines()
    assert re.fullmatch(r"megapre: rank 2 ended with exit code 1; its last lines, all .* in .*/rank2.out:", head)
    assert rest[0] == "Traceback (most recent call last):" and rest[-1] == "ValueError: the seventh layer is missing"
    assert "[2] ValueError: the seventh layer is missing" in out


def test_of_several_that_fail_the_first_is_blamed(start: Start, tmp_path: Path) -> None:
    """Even where the launcher gets to see them all at once."""
    body = f"""
print(os.getpid())
while not os.path.exists({str(tmp_path / "go")!r}):
    time.sleep(0.01)
time.sleep([0.5, 0, 1.0][rank])
sys.exit(rank + 3)
"""
    process = start(3, body)
    pids = pids_of(process, 3)
    process.send_signal(signal.SIGSTOP)
    (tmp_path / "go").touch()
    wait_until(lambda: not any(alive(pid) for pid in pids), "the ranks go on")
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 4
    assert err.startswith("megapre: rank 1 ended with exit code 4, the first of 3 that failed; its last lines")


def test_a_rank_that_is_killed_is_told_by_the_name_of_the_signal(start: Start) -> None:
    process = start(2, "os.kill(os.getpid(), 9) if rank else time.sleep(60)")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 137
    assert err == "megapre: rank 1 was killed by SIGKILL\n"  # it has said nothing


STUBBORN = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid())
time.sleep(60)
"""


def test_a_rank_that_does_not_end_is_killed_in_time(start: Start) -> None:
    process = start(2, STUBBORN, grace=0.5)
    pids = pids_of(process, 2)
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 137 and "ranks that did not end in time are killed: 0, 1" in err
    assert not any(alive(pid) for pid in pids)


SAVES = """
def note(number, frame):
    print("got", signal.Signals(number).name)
    global asked
    asked = True
asked = False
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, note)
print(os.getpid())
while not asked:
    time.sleep(0.02)
time.sleep(0.3)  # saving
print("saved")
sys.exit(75)
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR2, 75), (signal.SIGHUP, 75)]
)
def test_ranks_that_have_only_started_are_stopped_and_not_failed(
    start: Start, number: signal.Signals, code: int
) -> None:
    process = start(2, "signal.signal(signal.SIGINT, signal.SIG_DFL); print(os.getpid()); time.sleep(60)")
    pids_of(process, 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and len(err.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_is_passed_on_once_and_waited_for(start: Start, number: signal.Signals) -> None:
    process = start(2, SAVES)
    pids = pids_of(process, 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75
    name = "SIGTERM" if number == signal.SIGHUP else number.name
    assert sorted(out.splitlines()) == [f"[0] got {name}", "[0] saved", f"[1] got {name}", "[1] saved"]
    assert err == f"megapre: {number.name}: passed on to all ranks, which save and end; once more to kill them\n"
    assert not any(alive(pid) for pid in pids)


def test_a_second_signal_kills(start: Start) -> None:
    process = start(2, STUBBORN)
    pids = pids_of(process, 2)
    process.terminate()
    assert process.stderr is not None and "once more" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == "megapre: SIGINT again: ranks are killed\n"
    assert not any(alive(pid) for pid in pids)


def test_ranks_that_were_stopped_by_others_are_left_to_save(start: Start) -> None:
    """Rank 0 is the slow one: the end of rank 1, by itself and with the code of one that was stopped, is no failure."""
    body = """
signal.signal(signal.SIGTERM, lambda *_: print("disturbed"))
time.sleep(0 if rank else 1)
sys.exit(75)
"""
    process = start(2, body)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (75, "", "")


def test_nohup_means_no_hang_up(start: Start) -> None:
    process = start(1, "print(os.getpid()); time.sleep(1); print('went on')", prefix=("nohup",))
    pids_of(process, 1)
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "went on" in out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT, signal.SIGSEGV])
def test_a_launcher_that_is_killed_leaves_no_rank_behind(start: Start, number: signal.Signals) -> None:
    process = start(3, STUBBORN)
    pids = pids_of(process, 3)
    assert all(alive(pid) for pid in pids)
    process.send_signal(number)
    wait_until(lambda: not any(alive(pid) for pid in pids), f"ranks {pids} live on")


def test_what_a_rank_has_started_ends_with_it(start: Start) -> None:
    body = """
import subprocess
print(subprocess.Popen(["sleep", "1000"]).pid)
sys.exit(rank)
"""
    process = start(2, body)
    pids = pids_of(process, 2)
    process.communicate(timeout=60)
    assert process.returncode == 1 and not any(alive(pid) for pid in pids)


def test_a_reader_that_has_gone_stops_no_rank(start: Start, tmp_path: Path) -> None:
    body = "for i in range(200): print(i); time.sleep(0.002)"
    process = start(2, body)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "logs" / "rank1.out").read_text().splitlines() == [str(i) for i in range(200)]


def test_a_log_that_cannot_be_written_stops_no_rank(start: Start, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank1.out").symlink_to("/dev/full")
    process = start(2, "print('one'); time.sleep(0.5); print('two')")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = [line for line in out.splitlines() if line.startswith("[1]")]
    assert lines[0] == "[1] one" and lines[-1] == "[1] two" and len(lines) == 3
    assert "rank1.out cannot be written any more: [Errno 28]" in lines[1]
    assert (tmp_path / "logs" / "rank0.out").read_text() == "one\ntwo\n"


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        processes.launch(["/no/such/command"], 2, tmp_path, 1.0, {})
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ranks_have_colours_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    command = [sys.executable, "-c", "print('hello')"]
    assert processes.launch(command, 2, tmp_path, 1.0, {}) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == ["\x1b[33m[1]\x1b[0m hello", "\x1b[36m[0]\x1b[0m hello"]
    monkeypatch.setenv("NO_COLOR", "1")
    assert processes.launch(command, 1, tmp_path, 1.0, {}) == 0
    assert capsys.readouterr().out == "[0] hello\n"


MEET = """
import os, torch, torch.distributed as dist
from megapre.mesh import Mesh
from megapre.parallel import comm

def meet():
    here = comm.place(os.environ)
    device = torch.device("cpu")
    comm.join(here, device)
    groups = comm.connect(Mesh(here.world, tp=2), here.rank, device)
    total = torch.tensor(here.rank + 1)
    dist.all_reduce(total, group=groups.tp.handle)
    os.write(1, f"total {total.item()}\\n".encode())  # in one piece: torchrun's ranks share a pipe

meet()
comm.leave()
"""


@pytest.mark.parametrize("launcher", ["ours", "torchrun"])
def test_ranks_meet_under_our_launcher_and_under_torchrun(launcher: str, tmp_path: Path) -> None:
    script = tmp_path / "meet.py"
    script.write_text(MEET)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    if launcher == "ours":
        command = [sys.executable, "-c", LAUNCHER.replace("-uc", "-u"), "2", "20", str(tmp_path / "logs"), str(script)]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("total 3") == 2
