"""tokenize, tokenizer: text to tokens."""

import click

from .options import INPUTS, JSON_KEY

KIND = "bpe: byte-level, a tokenizer.json; sentencepiece: a .model."


@click.command()
@INPUTS
@click.option("--tokenizer", required=True, type=click.Path(), help="tokenizer.json or .model.")
@click.option("--output-prefix", required=True, type=click.Path(), help="Writes PREFIX_text_document.bin, .idx.")
@JSON_KEY
@click.option("--workers", default=0, show_default=True, type=click.IntRange(0), help="Processes; 0 = one a core.")
@click.option("--no-eos", is_flag=True, help="Append no end-of-document token.")
@click.option(
    "--on-error",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="Upon a bad document: stop there, or pass over it and count.",
)
@click.option("--separator", help="What stands between documents in .txt files.  [default: a file is a document]")
def tokenize(
    inputs: tuple[str, ...],
    tokenizer: str,
    output_prefix: str,
    json_key: str,
    workers: int,
    no_eos: bool,
    on_error: str,
    separator: str | None,
) -> None:
    """Turn text into a dataset of tokens.

    INPUTS are .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet files, or folders of them.
    """
    from ..data import tokenize

    tokenize.run(
        inputs,
        output_prefix,
        tokenizer,
        json_key=json_key,
        workers=workers,
        append_eos=not no_eos,
        on_error=on_error,
        separator=separator,
    )


@click.group()
def tokenizer() -> None:
    """Train tokenizers."""


@tokenizer.command("train", short_help="Train a tokenizer on text.")
@INPUTS
@click.option("--kind", type=click.Choice(["bpe", "sentencepiece"]), default="bpe", show_default=True, help=KIND)
@click.option("--vocab-size", required=True, type=click.IntRange(1), help="Tokens, special ones included.")
@click.option("--output", required=True, type=click.Path(), help="tokenizer.json or .model to write.")
@JSON_KEY
def tokenizer_train(inputs: tuple[str, ...], kind: str, vocab_size: int, output: str, json_key: str) -> None:
    """Train a tokenizer on text: byte-level BPE (tokenizer.json) or SentencePiece (.model)."""
    from ..data.tokenizer import train_tokenizer

    train_tokenizer(inputs, kind=kind, vocab_size=vocab_size, out=output, json_key=json_key)
