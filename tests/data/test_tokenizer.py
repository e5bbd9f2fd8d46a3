"""Tokenizers: the same ids as their own libraries give, every text back again, and bad files named."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from megapre.data import DataError, Tokenizer, load_tokenizer, train_tokenizer
from megapre.data.bpe import GPT2_PATTERN, RUN, SAMPLE, _holds_blank_block
from megapre.data.sentencepiece import SentencePieceTokenizer

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The pattern as GPT-2 published it; ours is written otherwise and has to cut the same pieces.
GPT2_PUBLISHED = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
WORDY = st.text(st.sampled_from("aeb'stlvréß \n\t\r\u00a012³,.!<|>Щ中\u0301🙂"), max_size=80)


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text.txt").write_text(SAMPLE * 3 + "the cat sat on the mat, the dog on the cat; " * 50, encoding="utf-8")
    train_tokenizer([folder / "text.txt"], "bpe", 500, folder / "tokenizer.json")
    return folder / "tokenizer.json"


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sp")
    (folder / "text.txt").write_text("the cat sat on the mat, the dog on the cat; it's 12 o'clock\n" * 50)
    train_tokenizer([folder / "text.txt"], "sentencepiece", 300, folder / "tokenizer.model")
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def llama3(bpe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same merges behind Llama 3's pre-tokenizer."""
    path = tmp_path_factory.mktemp("llama3") / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(changed(bpe, pre_tokenizer=in_steps(split))))
    return path


def in_steps(*steps: dict[str, Any]) -> dict[str, Any]:
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*steps, last]}


def changed(path: Path, **parts: Any) -> dict[str, Any]:
    return {**json.loads(path.read_text(encoding="utf-8")), **parts}


def reference(path: Path) -> tokenizers.Tokenizer:
    plain = tokenizers.Tokenizer.from_file(str(path))
    plain.encode_special_tokens = True
    return plain


@pytest.mark.parametrize("kind", ["bpe", "llama3"])
def test_ids_equal_those_of_tokenizers(kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    tokenizer, plain = load_tokenizer(path), reference(path)
    assert (tokenizer.implementation, tokenizer.why) == ("tiktoken", "")

    @given(st.one_of(TEXT, WORDY))
    @example(SAMPLE)
    @example("<|endoftext|>")
    @example("\n\n\n  \n a  \u00a0 b  ")
    def check(text: str) -> None:
        assert tokenizer.encode(text) == plain.encode(text, add_special_tokens=False).ids

    check()


@given(st.one_of(TEXT, WORDY))
def test_our_pattern_cuts_as_the_published_one(text: str) -> None:
    import regex

    ours = regex.findall(GPT2_PATTERN, text)
    assert ours == regex.findall(GPT2_PUBLISHED, text)
    assert "".join(ours) == text


@pytest.mark.parametrize("kind", ["bpe", "llama3", "sentencepiece"])
def test_every_text_comes_back(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(kind))

    @given(st.one_of(TEXT, WORDY))
    @example("")
    @example(" leading, trailing  and\u00a0odd   space \n\n")
    @example("<|endoftext|></s><unk>")
    @example("\x00\x1f\ufffd\U0010ffff")
    def check(text: str) -> None:
        if kind == "sentencepiece":
            text = text.replace("▁", "_")  # SentencePiece's own sign for the space
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert tokenizer.eos_id not in ids
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        assert tokenizer.encode_batch([text, "a", text]) == [ids, tokenizer.encode("a"), ids]

    check()


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_what_a_tokenizer_says_of_itself(kind: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    tokenizer = load_tokenizer(path)
    assert tokenizer.path == path
    assert tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert tokenizer.vocab_size <= {"bpe": 500, "sentencepiece": 300}[kind]
    assert tokenizer.eos_id is not None
    assert tokenizer.decode([tokenizer.eos_id]) == "<|endoftext|>"
    assert tokenizer.token_bytes(tokenizer.eos_id) == b"<|endoftext|>"
    both = [*tokenizer.encode("the cat"), tokenizer.eos_id, *tokenizer.encode(" sat")]
    assert tokenizer.decode(both) == "the cat<|endoftext|> sat"
    for beyond in (-1, tokenizer.vocab_size):
        with pytest.raises(IndexError, match=f"token {beyond} of {tokenizer.vocab_size}"):
            tokenizer.token_bytes(beyond)


def test_training_is_repeatable(bpe: Path, sentencepiece: Path, tmp_path: Path) -> None:
    for path, kind, size in ((bpe, "bpe", 500), (sentencepiece, "sentencepiece", 300)):
        again = train_tokenizer([path.parent / "text.txt"], kind, size, tmp_path / path.name)
        assert again.path.read_bytes() == path.read_bytes()


def test_long_runs_neither_fail_nor_take_for_ever(bpe: Path, llama3: Path) -> None:
    """tiktoken's engine overflows its stack on spaces that a pattern backtracks over."""
    for path in (bpe, llama3):
        tokenizer = load_tokenizer(path)
        for text in ("a" + " " * 1_100_000 + "b", "\n" * 100_000, "é" * 100_000, " x" * 50_000):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        text = "a" + " " * 150_000 + "b\n"
        assert tokenizer.encode(text) == reference(path).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(("length", "found"), [(RUN - 1, False), (2 * RUN - 1, True), (5 * RUN, True)])
def test_blank_blocks(length: int, found: bool) -> None:
    for before in (0, 1, RUN // 2, RUN - 1):
        assert _holds_blank_block("a" * before + " " * length + "b") is (found or (before == 0 and length >= RUN))


NFC = {"type": "NFC"}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
EVERY_SECOND = {"type": "Split", "pattern": {"Regex": "[a-m]+"}, "behavior": "MergedWithNext", "invert": False}


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"normalizer": NFC}, "normalizes text"),
        ({"pre_tokenizer": BYTES}, "puts a space before"),
        ({"pre_tokenizer": None}, "last pre-tokenizer is none"),
        ({"pre_tokenizer": in_steps(DIGITS)}, "several steps"),
        ({"pre_tokenizer": in_steps(EVERY_SECOND)}, "not by the matches"),
        ({"pre_tokenizer": in_steps({**EVERY_SECOND, "behavior": "Isolated"})}, "other ids on a sample text"),
    ],
)
def test_what_tiktoken_cannot_express_is_left_to_tokenizers(
    bpe: Path, tmp_path: Path, parts: dict[str, Any], why: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(changed(bpe, **parts)))
    tokenizer, plain = load_tokenizer(path), reference(path)
    assert tokenizer.implementation == "tokenizers"
    assert why in tokenizer.why
    for text in ("the cat, e\u0301 12!", "", SAMPLE):
        assert tokenizer.encode(text) == plain.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode("cat")).strip() == "cat"


def test_models_that_tiktoken_cannot_express(bpe: Path, tmp_path: Path) -> None:
    spec = changed(bpe)
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    ids = dict(zip(vocab, [*list(vocab.values())[:-2], vocab[list(vocab)[-1]], vocab[list(vocab)[-2]]], strict=True))
    added = {"id": len(vocab), "content": "    ", "special": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for change, why in (
        ({"model": {**spec["model"], "dropout": 0.1}}, "dropout"),
        ({"model": {**spec["model"], "merges": merges[1:]}}, "do not make exactly"),
        ({"model": {**spec["model"], "vocab": ids}}, "not in the order"),
        ({"added_tokens": [*spec["added_tokens"], {**added, **flags}]}, "1 added tokens are matched in text"),
    ):
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps({**spec, **change}))
        tokenizer = load_tokenizer(path)
        assert tokenizer.implementation == "tokenizers"
        assert why in tokenizer.why


def test_the_end_of_a_document_by_other_names(bpe: Path, tmp_path: Path) -> None:
    text = bpe.read_text(encoding="utf-8")
    path = tmp_path / "tokenizer.json"
    path.write_text(text.replace("<|endoftext|>", "<|end_of_text|>"))
    assert load_tokenizer(path).eos_id == 0
    path.write_text(text.replace("<|endoftext|>", "<my own>"))
    assert load_tokenizer(path).eos_id is None
    for named in ("<my own>", {"content": "<my own>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        assert load_tokenizer(path).eos_id == 0
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is broken"):
        load_tokenizer(path)


def test_a_folder_holds_its_tokenizer(bpe: Path, sentencepiece: Path, tmp_path: Path) -> None:
    assert load_tokenizer(bpe.parent).path == bpe
    assert isinstance(load_tokenizer(sentencepiece.parent), SentencePieceTokenizer)
    with pytest.raises(DataError, match="neither"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "does not exist"),
        ("t.txt", "x", "ending '.txt'"),
        ("t.json", "{", r"is no tokenizer\.json"),
        ("t.json", '{"model": {}}', r"is no tokenizer\.json"),
        ("t.model", "nonsense", "is no SentencePiece model"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path / name)


class TestTrainingErrors:
    @pytest.fixture
    def text(self, tmp_path: Path) -> Path:
        (tmp_path / "text.txt").write_text("a few words\n")
        return tmp_path / "text.txt"

    @pytest.mark.parametrize(
        ("kind", "size", "out", "message"),
        [
            ("wordpiece", 300, "t.json", "kind 'wordpiece'"),
            ("bpe", 300, "t.model", "written to a .json file"),
            ("bpe", 256, "t.json", "vocab_size 256 is too small"),
            ("sentencepiece", 259, "t.model", "vocab_size 259 is too small"),
            ("sentencepiece", 5000, "t.model", "cannot train 5000 tokens"),
            ("bpe", 300, "text.txt/t.json", "cannot be written"),
        ],
    )
    def test_arguments(self, text: Path, tmp_path: Path, kind: str, size: int, out: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            train_tokenizer([text], kind, size, tmp_path / out)
        assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]

    def test_bad_text(self, text: Path, tmp_path: Path) -> None:
        (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
        with pytest.raises(DataError, match=r"x\.jsonl line 2: no key 'text'"):
            train_tokenizer([tmp_path / "x.jsonl"], "bpe", 300, tmp_path / "t.json")
        assert not (tmp_path / "t.json").exists()

    def test_a_small_text_gives_a_small_vocabulary(self, text: Path, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match="of 5000 tokens"):
            tokenizer: Tokenizer = train_tokenizer([text], "bpe", 5000, tmp_path / "t.json")
        assert 257 <= tokenizer.vocab_size < 300
