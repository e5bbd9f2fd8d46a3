"""Byte-level BPE from a `tokenizer.json`, encoded by tiktoken, about eight times as fast as `tokenizers` itself.

tiktoken knows one form: a regular expression cuts the text, and within a piece of bytes the adjacent pair whose union
has the lowest rank is merged, rank and id being the same number. A tokenizer.json says more than that; where it says
something else (`tiktoken_form` lists what), or where the two libraries differ on a sample text at start-up,
`tokenizers` encodes.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from .errors import DataError
from .tokenizer import END_NAMES, END_OF_TEXT, Tokenizer

SMALLEST = 257  # bytes and END_OF_TEXT
# GPT-2's pattern with possessive quantifiers, as tiktoken writes it: the same pieces with less backtracking.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Characters. All usual patterns backtrack over whitespace, `\s+(?!\S)`, and on some hundred thousand of it tiktoken's
# engine overflows its stack; `tokenizers` does not.
RUN = 1 << 16

# Contractions, numbers, code, all kinds of whitespace, many scripts, combining and invisible characters.
SAMPLE = """The quick brown fox jumps over the lazy dog. It's 1,234,567.89 o'clock; we'll see they've left, I'm DON'T.
\tdef f(x: int = 0) -> str:\n\t\treturn f"{x!r:>10}"  # comment\n\n\n    if (a[i] != b[i++]) { return; }   \r\n\r\n
naïve façade — “quoted” … €5 ½ x² ≤ ∞ Straße ἀρχή Привет, мир! שלום عليكم नमस्ते สวัสดี 你好,世界。こんにちは 안녕하세요
e\u0301 \u200b\u00a0\u2003\ufeff 👩\u200d👩\u200d👧 👦🏽🇩🇪 \x00\x07\x1b[0m \U0010ffff
http://a.b/c?d=e&f=%20 <a b='v'/> ~~~==>>> ٣٤٥ Ⅷ
"""


class Form(NamedTuple):
    """What tiktoken needs: the pattern, the id of each token's bytes, the ids of special tokens."""

    pattern: str
    ranks: dict[bytes, int]
    special: dict[str, int]


class Inexpressible(Exception):
    """A tokenizer.json that tiktoken cannot stand in for, and why."""


class BytePairTokenizer(Tokenizer):
    """A tokenizer.json; `implementation` is "tiktoken" or "tokenizers". Raises DataError where the file is broken."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        from tokenizers import Tokenizer as Reference

        try:
            self._spec: dict[str, Any] = json.loads(path.read_bytes())
            self.reference = Reference.from_file(str(path))
        except Exception as error:  # tokenizers raises Exception itself
            raise DataError(f"{path} is no tokenizer.json: {error}") from error
        self.reference.encode_special_tokens = True  # the name of a special token in a text is text
        self.reference.no_truncation()
        self.reference.no_padding()
        vocabulary: dict[str, int] = self.reference.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{path} has an empty vocabulary")
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = _eos_id(path, vocabulary)
        self._tokens = {id_: token for token, id_ in vocabulary.items()}
        self._added = {token["id"]: token["content"] for token in self._spec.get("added_tokens") or ()}
        self._encoding = self._with_tiktoken()
        self.implementation = "tokenizers" if self._encoding is None else "tiktoken"

    def _with_tiktoken(self) -> Any:
        """The tiktoken encoding, or None with `why` set where it would not give the same ids."""
        from tiktoken import Encoding

        try:
            form = tiktoken_form(self._spec)
            encoding = Encoding(
                str(self.path), pat_str=form.pattern, mergeable_ranks=form.ranks, special_tokens=form.special
            )
            for text in self._samples(form):
                if encoding.encode_ordinary(text) != self.reference.encode(text, add_special_tokens=False).ids:
                    raise Inexpressible("tiktoken gives other ids on a sample text")
        except Inexpressible as reason:
            self.why = str(reason)
            return None
        except Exception as error:  # a pattern that its engine does not know
            self.why = f"tiktoken refuses it: {error}"
            return None
        return encoding

    @staticmethod
    def _samples(form: Form) -> Iterator[str]:
        """A text of many scripts, and a thousand of the tokens themselves, which no general text would reach."""
        yield SAMPLE
        tokens = sorted(form.ranks, key=form.ranks.__getitem__)
        chosen = tokens[:: max(1, len(tokens) // 1000)]
        yield "".join(token.decode("utf-8", errors="ignore") for token in chosen)
        yield " ".join(token.decode("utf-8", errors="ignore") for token in chosen)

    def encode(self, text: str) -> list[int]:
        if self._encoding is None or _holds_blank_block(text):
            return self.reference.encode(text, add_special_tokens=False).ids
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        if self._encoding is not None:
            return self._encoding.decode(list(ids))
        return self.reference.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        if token not in self._tokens:
            raise IndexError(f"token {token} of {self.vocab_size}")
        if token in self._added:
            return self._added[token].encode()
        text = self._tokens[token]
        if (self._spec.get("decoder") or {}).get("type") == "ByteLevel":
            return bytes(BYTE_OF[character] for character in text)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode()


def _holds_blank_block(text: str) -> bool:
    """Whether an aligned block of RUN characters is whitespace, as one is within every run of twice that length."""
    return any(text[start : start + RUN].isspace() for start in range(0, len(text) - RUN + 1, RUN))


def _byte_characters() -> dict[str, int]:
    """The printable characters that stand for bytes in the vocabulary (as in GPT-2's encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


BYTE_OF = _byte_characters()


def tiktoken_form(spec: dict[str, Any]) -> Form:
    """A tokenizer.json in tiktoken's terms. Raises Inexpressible with the first thing that these terms lack."""
    model = spec["model"]
    if model.get("type") != "BPE":
        raise Inexpressible(f"its model is {model.get('type')}, not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise Inexpressible(f"its BPE uses {key}")
    if spec.get("normalizer"):
        raise Inexpressible(f"it normalizes text ({spec['normalizer'].get('type')})")
    added = spec.get("added_tokens") or ()
    if plain := [token["content"] for token in added if not token.get("special")]:
        raise Inexpressible(f"{len(plain)} added tokens are matched in text, such as {plain[0]!r}")
    special = {token["content"]: token["id"] for token in added}

    ranks: dict[bytes, int] = {}
    for token, id_ in model["vocab"].items():
        if token in special:
            continue
        try:
            ranks[bytes(BYTE_OF[character] for character in token)] = id_
        except KeyError:
            raise Inexpressible(f"token {token!r} is not written in byte-level characters") from None
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise Inexpressible(f"its vocabulary lacks {len(missing)} of the 256 bytes")
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merged = [model["vocab"].get(left + right, -1) for left, right in pairs]
    if any(later < earlier for earlier, later in pairwise(merged)):
        raise Inexpressible("its merges are not in the order of their ids")
    if set(merged) != {id_ for token, id_ in ranks.items() if len(token) > 1}:
        raise Inexpressible("its merges do not make exactly the tokens of its vocabulary")
    return Form(_pattern(spec.get("pre_tokenizer")), ranks, special)


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """The regular expression that cuts text: GPT-2's built into ByteLevel, or that of a Split before it."""
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = steps[0]["pretokenizers"]
    *splits, last = steps
    if last.get("type") != "ByteLevel":
        raise Inexpressible(f"its last pre-tokenizer is {last.get('type', 'none')}, not ByteLevel")
    if last.get("add_prefix_space", True):
        raise Inexpressible("it puts a space before the text")
    if not splits and last.get("use_regex", True):
        return GPT2_PATTERN
    if len(splits) != 1 or splits[0].get("type") != "Split" or last.get("use_regex", True):
        raise Inexpressible("it cuts text in several steps")
    pattern = splits[0]["pattern"].get("Regex")
    # Isolated keeps what lies between the matches, and tiktoken drops it; the published patterns match everything.
    kept = (splits[0]["behavior"], bool(splits[0].get("invert"))) in (("Isolated", False), ("Removed", True))
    if pattern is None or not kept:
        raise Inexpressible("its Split is not by the matches of a regular expression")
    return pattern


def _eos_id(path: Path, vocabulary: dict[str, int]) -> int | None:
    """The end-of-document token: by the known names, else as tokenizer_config.json beside the file says."""
    for name in END_NAMES:
        if name in vocabulary:
            return vocabulary[name]
    config = path.with_name(f"{path.stem}_config.json")
    if not config.is_file():
        return None
    try:
        token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{config} is broken: {error}") from error
    return vocabulary.get(token["content"] if isinstance(token, dict) else token)


def train(texts: Iterator[str], vocab_size: int) -> bytes:
    """Train on the texts; the tokenizer.json. END_OF_TEXT is token 0, the bytes follow, then the merges."""
    from tokenizers import Tokenizer as Reference
    from tokenizers import decoders, models, pre_tokenizers, trainers

    reference = Reference(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    reference.train_from_iterator(texts, trainer)
    return reference.to_str(pretty=False).encode()
