"""Tokenizers: load one from its file, or train one on text.

Two kinds: byte-level BPE in Hugging Face's `tokenizer.json` (bpe.py) and SentencePiece's `.model` (sentencepiece.py).
Text is data: `encode` never turns what looks like a special token into one, and adds none by itself.
"""

import hashlib
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from .atomic import write_whole
from .errors import DataError

END_OF_TEXT = "<|endoftext|>"
# What the published tokenizers call the end of a document. The first that exists is taken: chat models name another
# token in their tokenizer_config.json, that of the end of a turn.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<|end|>")
PIECE = 1 << 20  # characters; training reads longer documents in pieces, as its memory grows with the longest


class Tokenizer(ABC):
    """Text to ids and back.

    `path` and `sha256` of its file; `vocab_size`, all ids are below it; `eos_id`, the end-of-document token or None;
    `implementation`, the library that encodes, and `why`, the reason where it is not the fastest one.
    """

    path: Path
    sha256: str
    vocab_size: int
    eos_id: int | None
    implementation: str
    why: str = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any special token."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens by their names; bytes that are no UTF-8 become U+FFFD."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes that an id stands for. Raises IndexError beyond the vocabulary."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [self.encode(text) for text in texts]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {self.vocab_size} ids, {self.implementation})"


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a `tokenizer.json` or `.model` file, or in a folder that holds one.

    Raises DataError where it is missing or broken.
    """
    file = Path(path)
    if file.is_dir():
        found = [file / name for name in ("tokenizer.json", "tokenizer.model") if (file / name).is_file()]
        if not found:
            raise DataError(f"{file} holds neither tokenizer.json nor tokenizer.model")
        file = found[0]
    if not file.is_file():
        raise DataError(f"tokenizer {file} does not exist")
    if file.suffix == ".json":
        from .bpe import BytePairTokenizer

        return BytePairTokenizer(file)
    if file.suffix == ".model":
        from .sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(file)
    raise DataError(f"tokenizer {file} has the ending '{file.suffix}'; .json (tokenizer.json) and .model are known")


def train_tokenizer(
    files: Sequence[str | os.PathLike[str]],
    kind: str = "bpe",
    vocab_size: int = 32_768,
    out: str | os.PathLike[str] = "tokenizer.json",
    json_key: str = "text",
) -> Tokenizer:
    """Train a tokenizer on the documents of text files (as `megapre tokenize` reads them) and write it to `out`.

    kind "bpe": byte-level BPE with GPT-2's pre-tokenizer, special token <|endoftext|>, written as tokenizer.json;
    "sentencepiece": BPE with byte fallback that keeps all whitespace, written as .model. `vocab_size` counts special
    tokens and the 256 bytes; a small text may give fewer. Raises DataError on bad input, and leaves nothing half
    written.
    """
    file = Path(out)
    endings = {"bpe": ".json", "sentencepiece": ".model"}
    if kind not in endings:
        raise DataError(f"tokenizer kind '{kind}'; there are bpe and sentencepiece")
    if file.suffix != endings[kind]:
        raise DataError(f"a {kind} tokenizer is written to a {endings[kind]} file, not to {file}")
    if kind == "bpe":
        from .bpe import SMALLEST, train
    else:
        from .sentencepiece import SMALLEST, train
    if vocab_size < SMALLEST:
        raise DataError(f"vocab_size {vocab_size} is too small; {kind} needs {SMALLEST} for bytes and special tokens")
    content = train(_pieces(files, json_key), vocab_size)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content)
    except OSError as error:
        raise DataError(f"tokenizer {file} cannot be written: {error.strerror}") from error
    tokenizer = load_tokenizer(file)
    if tokenizer.vocab_size < vocab_size:
        warnings.warn(
            f"the text gave {tokenizer.vocab_size} of {vocab_size} tokens; more text gives more", stacklevel=2
        )
    return tokenizer


def _pieces(files: Sequence[str | os.PathLike[str]], json_key: str) -> Iterator[str]:
    """The documents of all files, long ones cut at the ends of lines. Raises DataError on the first bad one."""
    from .documents import expand, parts_of, records

    for path in expand(files):
        for part in parts_of(path):
            for number, record in enumerate(records(part, json_key)):
                if record.problem:
                    raise DataError(f"{part.name(number)}: {record.problem}")
                yield from cut(record.text or "", PIECE)


def cut(text: str, longest: int, behind: str = "\n") -> Iterator[str]:
    """A text in pieces of at most `longest` characters, cut after a `behind` where there is one."""
    start = 0
    while len(text) - start > longest:
        end = text.rfind(behind, start, start + longest) + 1 or start + longest
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
