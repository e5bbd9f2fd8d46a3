"""A tiny corpus with its tokenizer, and runs of a tiny model on it."""

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megapre import cli
from megapre.config import Config, load
from megapre.data import tokenize, train_tokenizer

SUBJECTS = ("the miller", "a grey heron", "my aunt", "the captain", "nobody", "the river", "an old clock")
VERBS = ("sees", "forgets", "follows", "paints", "weighs", "carries", "believes in")
OBJECTS = ("the bridge", "seven lanterns", "a café", "the harvest", "its own shadow", "two letters", "winter")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a dataset of 400 short documents, with sidecar and tokenizer, of about 14,000 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    chance = random.Random(0)

    def sentence() -> str:
        return f"{chance.choice(SUBJECTS)} {chance.choice(VERBS)} {chance.choice(OBJECTS)}. "

    documents = ["".join(sentence() for _ in range(chance.randint(1, 9))) for _ in range(400)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    train_tokenizer([folder / "text.jsonl"], "bpe", 360, folder / "tokenizer.json")
    tokenize.run([folder / "text.jsonl"], folder / "tiny", folder / "tokenizer.json", workers=1, progress=False)
    return folder / "tiny_text_document"


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes a config of 12 steps on the corpus; runs go into tmp_path."""

    def config(*overrides: str) -> Config:
        fixed = [f'data.train=["{corpus}"]', "data.split=8,2,0", f"run.dir={tmp_path}", "name=run", "run.threads=1"]
        fast = [
            "run.steps=12",
            "run.eval_every=0",
            "batch.global=4",
            "run.device=cpu",
            "run.tensorboard=false",
            "optim.warmup_steps=2",
        ]
        return load("debug", [*fixed, *fast, *overrides])

    return config


@pytest.fixture
def megapre(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command line in this process; returns exit code and standard error."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["megapre", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), capfd.readouterr().err

    return run


@pytest.fixture(autouse=True)
def settings_of_torch_stay() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
