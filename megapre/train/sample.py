"""Text from a trained model. Needs the run folder alone: config, tokenizer and newest checkpoint lie in it."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megapre.data import load_tokenizer
from megapre.errors import UserError
from megapre.model.generate import generate

from . import machine
from .evaluate import load_model
from .folder import open_run, tokenizer_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from megapre.data import Tokenizer
    from megapre.model.generate import Step


class PromptError(UserError):
    """The prompt gives the model nothing to continue."""


def run(
    run_dir: str | Path,
    prompt: str = "",
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    num_samples: int = 1,
    explain: bool = False,
    device: str = "auto",
) -> list[str]:
    """Continues `prompt` with the newest whole checkpoint of a run and streams the text to standard output.

    An empty prompt begins a document. `num_samples` continuations use the seeds seed, seed + 1, ... With `explain`, a
    table of the ten likeliest tokens and their probabilities comes before each token. Returns the texts, prompt
    included. Raises RunFolderError, CheckpointError, ModelError, PromptError.
    """
    path = Path(run_dir)
    cfg = open_run(path)
    place = machine.prepare(cfg.run.model_copy(update={"device": device}))
    tokenizer = load_tokenizer(tokenizer_file(path))
    ids = tokenizer.encode(prompt) if prompt else _beginning(tokenizer)
    model, _ = load_model(path, cfg, place)
    room = cfg.model.context - len(ids) + 1
    if max_new_tokens > room > 0:
        print(
            f"megapre: {max_new_tokens} tokens exceed the context of {cfg.model.context}: making {room}",
            file=sys.stderr,
        )
        max_new_tokens = room
    texts = []
    for number in range(num_samples):
        if number:
            _write("-" * 80 + "\n")
        steps = generate(
            model,
            torch.tensor(ids),
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            seed + number,
            tokenizer.eos_id,
            vocab=tokenizer.vocab_size,
        )
        texts.append(prompt + _stream(prompt, steps, tokenizer, explain))
    return texts


def _stream(prompt: str, steps: Iterator[Step], tokenizer: Tokenizer, explain: bool) -> str:
    """Writes prompt and tokens as they come; returns what came after the prompt."""
    text = Utf8Stream(tokenizer)
    written = []
    _write(prompt)
    for step in steps:
        token = int(step.tokens_B[0])
        if explain:
            _explain(step, tokenizer)
        if token == tokenizer.eos_id:
            break
        written.append(text.add(token))
        _write(written[-1])
    written.append(text.end())
    _write(written[-1] + "\n")
    return "".join(written)


class Utf8Stream:
    """Tokens to text as they come: bytes wait until they make up a whole character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The text that `token` completes: none where it is an id that the tokenizer leaves out."""
        return self.decoder.decode(_bytes(self.tokenizer, token) or b"")

    def end(self) -> str:
        """What was left of an unfinished character."""
        return self.decoder.decode(b"", final=True)


def _bytes(tokenizer: Tokenizer, token: int) -> bytes | None:
    """The bytes of a token; None for a hole in the tokenizer's ids, which an untrained model may well choose."""
    try:
        return tokenizer.token_bytes(token)
    except IndexError:
        return None


def _shown(tokenizer: Tokenizer, token: int) -> str:
    found = _bytes(tokenizer, token)
    return f"<{token}>" if found is None else repr(found.decode("utf-8", errors="backslashreplace"))


def _beginning(tokenizer: Tokenizer) -> list[int]:
    if tokenizer.eos_id is None:
        raise PromptError(
            "an empty prompt begins a document, but this tokenizer has no end-of-document token; give text"
        )
    return [tokenizer.eos_id]


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _explain(step: Step, tokenizer: Tokenizer) -> None:
    from rich.console import Console
    from rich.table import Table

    chosen = int(step.tokens_B[0])
    table = Table("token", "text", "probability", title_justify="left")
    for token, probability in zip(step.likeliest_BC[0].tolist(), step.probabilities_BC[0].tolist(), strict=True):
        text = _shown(tokenizer, token)
        table.add_row(str(token), text, f"{probability:.4f}", style="bold" if token == chosen else "")
    if chosen not in step.likeliest_BC[0].tolist():
        table.add_row(str(chosen), _shown(tokenizer, chosen), "not among them", style="bold")
    Console().print("\n", table)
