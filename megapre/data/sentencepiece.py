"""SentencePiece models: `.model` files such as Llama 2's, and training of new ones."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import DataError
from .tokenizer import END_OF_TEXT, Tokenizer, cut

SMALLEST = 260  # bytes; unknown, begin and end of document; one more
LONGEST = 4000  # bytes of a line in training; SentencePiece passes over longer ones without a word


class SentencePieceTokenizer(Tokenizer):
    """A `.model` file. Raises DataError where it is broken."""

    implementation = "sentencepiece"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_proto=path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path} is no SentencePiece model: {error}") from error
        self.vocab_size = self._model.vocab_size()
        self.eos_id = self._model.eos_id() if self._model.eos_id() >= 0 else None

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, out_type=int)

    def decode(self, ids: Sequence[int]) -> str:
        # The library leaves control tokens out; their names are put back, as for the other kind of tokenizer.
        text: list[str] = []
        run: list[int] = []
        for token in ids:
            if self._model.is_control(token):
                text += [self._model.decode(run), self._model.id_to_piece(token)]
                run = []
            else:
                run.append(token)
        return "".join([*text, self._model.decode(run)])

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise IndexError(f"token {token} of {self.vocab_size}")
        piece = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()


def train(texts: Iterator[str], vocab_size: int) -> bytes:
    """Train on the texts, line by line; the bytes of the .model.

    Nothing is normalized, no space is put before a text, and what the pieces lack is encoded in bytes: decoding gives
    back the text (but for U+2581, which stands for the space). Raises DataError where the text is too small for
    `vocab_size`.
    """
    import sentencepiece

    lines = (line for text in texts for whole in text.splitlines() for line in cut(whole, LONGEST // 4, " "))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=LONGEST + 1,
            eos_piece=END_OF_TEXT,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"SentencePiece cannot train {vocab_size} tokens on this text: {error}") from error
    return model.getvalue()
