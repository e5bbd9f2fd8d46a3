"""What a user can get wrong: one clear message, exit code 2, nothing left behind."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megapre.config import Config, to_toml

Tiny = Callable[..., Config]
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def recipe(tiny: Tiny, tmp_path: Path) -> str:
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(tiny("run.steps=2")))
    return str(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["layout.tp=2"], "a world of 1 rank cannot be cut into replicas of tp*pp*cp = 2*1*1 = 2 ranks"),
        (["layout.pp=2"], "several ranks are started by `megapre launch local` or torchrun"),
        (["layout.dp=4", "batch.global=8"], "= 4 ranks, but there are 1; nearest: 4 ranks, dp 1"),
        (["model.vocab=100"], "model.vocab = 100 is smaller than the vocabulary of"),
        (["model.heads=5", "model.head_dim=0"], "64 % 5"),
        (["model.hidden=1000000", "model.ffn=4000000", "model.layers=1000"], "weights, gradients, master weights"),
        (["batch.global=5", "batch.micro=2"], "5 % 2 = 1"),
        (["batch.seq_length=4096", "model.context=64"], "context"),
        (["batch.seq_length=20000", "model.context=20000"], "tokens"),
        (["data.train=[]"], "no data is named"),
        (['data.train=["nowhere"]'], "nowhere.idx does not exist"),
        (["data.tokenizer=nowhere.json"], "nowhere.json"),
        (["run.eval_every=1", "data.split=100,0,0"], "valid"),
        (["run.device=cuda"], "sees no CUDA device"),
        (["kernels.rms_norm=magic"], "magic"),
        (["optim.learning_rate=1"], "optim.learning_rate"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_is_refused_with_a_message(
    megapre: Command, recipe: str, tmp_path: Path, overrides: list[str], message: str
) -> None:
    code, err = megapre("train", recipe, *overrides)
    assert code == 2
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "run").exists(), "something was left behind"


def test_half_a_launcher(megapre: Command, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    code, err = megapre("train", recipe)
    assert (
        code == 2
        and "WORLD_SIZE is set, but not RANK, LOCAL_RANK, LOCAL_WORLD_SIZE" in err
        and not (tmp_path / "run").exists()
    )


def test_another_tokenizer(megapre: Command, recipe: str, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text((corpus.parent / "tokenizer.json").read_text() + "\n")
    code, err = megapre("train", recipe, f"data.tokenizer={other}")
    assert code == 2 and "is not the tokenizer of" in err and not (tmp_path / "run").exists()


def test_data_without_a_sidecar_and_without_a_vocabulary(
    megapre: Command, recipe: str, corpus: Path, tmp_path: Path
) -> None:
    for ending in ("bin", "idx"):
        shutil.copy(f"{corpus}.{ending}", tmp_path / f"bare.{ending}")
    code, err = megapre("train", recipe, f'data.train=["{tmp_path}/bare"]')
    assert code == 2 and "has no sidecar" in err and not (tmp_path / "run").exists()
    code, err = megapre("train", recipe, f'data.train=["{tmp_path}/bare"]', "model.vocab=200")
    assert code == 2 and "the model knows 0 .. 199" in err and not (tmp_path / "run").exists()


def test_truncated_data(megapre: Command, recipe: str, corpus: Path, tmp_path: Path) -> None:
    for ending in ("bin", "idx", "meta.json"):
        shutil.copy(f"{corpus}.{ending}", tmp_path / f"torn.{ending}")
    shutil.copy(corpus.parent / "tokenizer.json", tmp_path)
    with (tmp_path / "torn.bin").open("r+b") as file:
        file.truncate(1000)
    code, err = megapre("train", recipe, f'data.train=["{tmp_path}/torn"]')
    assert code == 2 and "torn.bin is truncated" in err and not (tmp_path / "run").exists()


def test_an_existing_run_folder_is_not_touched(megapre: Command, recipe: str, tmp_path: Path) -> None:
    assert megapre("train", recipe)[0] == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    code, err = megapre("train", recipe)
    assert code == 2 and "exists already" in err and "--resume" in err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_a_folder_that_cannot_be_written(megapre: Command, recipe: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, err = megapre("train", recipe, f"run.dir={tmp_path}/file")
    assert code == 2 and "cannot be written" in err and "Not a directory" in err


def test_a_folder_in_use(megapre: Command, recipe: str, tmp_path: Path) -> None:
    from megapre.train.folder import RunFolder

    with RunFolder(tmp_path / "run", resume=False):
        code, err = megapre("train", recipe, "--resume")
        assert code == 2 and "in use by another process" in err
        assert (tmp_path / "run" / ".lock").exists(), "the other process's folder was taken away"


def test_resume_with_every_checkpoint_damaged(megapre: Command, recipe: str, tmp_path: Path) -> None:
    assert megapre("train", recipe)[0] == 0
    (tmp_path / "run" / "checkpoints" / "step_00000002" / ".metadata").unlink()
    code, err = megapre("train", recipe, "--resume")
    assert code == 2 and "no checkpoint" in err and "step_00000002/.metadata: missing" in err


@pytest.mark.parametrize("verb", [["eval"], ["sample", "--prompt", "x"]])
def test_no_run_folder(megapre: Command, tmp_path: Path, verb: list[str]) -> None:
    code, err = megapre(verb[0], str(tmp_path), *verb[1:])
    assert code == 2 and "is no run folder" in err
