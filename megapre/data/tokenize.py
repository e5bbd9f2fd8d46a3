"""Text files to a dataset of tokens: `megapre tokenize`.

The inputs are cut into shards (shards.py), encoded by as many processes as wanted into `PREFIX_KEY_document.parts/`,
and joined in their order, so the result does not depend on the number of processes. The dataset takes its name at the
very end. A run that was interrupted, or failed, goes on where it was when it is started again.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from .atomic import write_whole
from .documents import expand
from .errors import DataError
from .indexed import IndexedDataset, IndexedWriter
from .progress import Progress
from .shards import Manifest, Options, Shard, encode, plan
from .sidecar import Sidecar, read_sidecar, write_sidecar
from .tokenizer import Tokenizer, load_tokenizer
from .workers import encode_in_order

JOINED = "joined"  # the dataset in the folder of shards, before it gets its name
ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}  # of a separator
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
AnyPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Result:
    """What `run` made: the prefix of the dataset, its counts (`bytes` of UTF-8 text), and what was passed over."""

    prefix: str
    documents: int
    tokens: int
    bytes: int
    skipped: int
    problems: tuple[str, ...]
    seconds: float


def run(
    inputs: Sequence[AnyPath] | AnyPath,
    output_prefix: AnyPath,
    tokenizer: AnyPath,
    json_key: str = "text",
    workers: int = 0,
    append_eos: bool = True,
    on_error: str = "fail",
    progress: bool = True,
    separator: str | None = None,
) -> Result:
    """Tokenize text into `{output_prefix}_{json_key}_document.{bin,idx}`, with sidecar and tokenizer beside them.

    `inputs`: .txt, .jsonl, .jsonl.gz, .jsonl.zst and .parquet files, folders of them, or patterns; `json_key` the field
    or column that holds the text; `workers` processes, 0 for one a core; `append_eos` end every document that is not
    empty with the end-of-document token; `on_error` "fail" at the first bad document, or "skip" and count; `separator`
    what stands between the documents of a .txt file, which otherwise is one document; a backslash and n, t or r in it
    are a line's end, a tab and a carriage return.
    The same inputs and options as those of an existing dataset leave it as it is. Raises DataError on bad input, on a
    full disk, and where a dataset of this name was made from something else; nothing appears under the final name then.
    """
    if on_error not in ("fail", "skip"):
        raise DataError(f"on_error '{on_error}'; there are fail and skip")
    if separator == "" or workers < 0:
        raise DataError(f"separator {separator!r} and workers {workers}: neither may be empty or negative")
    started = time.monotonic()
    if separator is not None:  # a shell passes '\n' on as two characters
        separator = re.sub(r"\\([ntr])", lambda found: ESCAPES[found[1]], separator)
    files = expand([inputs] if isinstance(inputs, str | os.PathLike) else inputs)
    loaded = load_tokenizer(tokenizer)
    if append_eos and loaded.eos_id is None:
        raise DataError(f"tokenizer {loaded.path} has no end-of-document token; --no-eos does without")
    options = Options(loaded.sha256, json_key, append_eos, on_error, separator)
    shards = plan(files, separator)
    prefix = f"{os.fspath(output_prefix)}_{json_key}_document"
    with _working_folder(prefix) as folder:
        if (done := _existing(prefix, shards, options, started)) is not None:
            return done
        with Progress(sum(shard.size for shard in shards), progress) as bar:
            made = _encode(shards, folder, options, loaded, workers, bar)
            manifests = _join(shards, folder, made, loaded.vocab_size)
        result = _publish(prefix, folder, manifests, options, loaded, started)
    if progress:
        print(_summary(result))
    return result


def _encode(
    shards: list[Shard], folder: Path, options: Options, tokenizer: Tokenizer, workers: int, bar: Progress
) -> Generator[Manifest, None, None]:
    """The manifests of all shards, in order; in this process where one is enough."""
    processes = min(workers or len(os.sched_getaffinity(0)), len(shards))
    if processes > 1:
        return encode_in_order(shards, folder, options, str(tokenizer.path), processes, bar)
    return (encode(shard, folder, options, tokenizer, bar.advance) for shard in shards)


@contextmanager
def _working_folder(prefix: str) -> Iterator[Path]:
    """The folder of shards, locked against a second run. It stays for the next one unless the dataset was published."""
    folder = Path(f"{prefix}.parts")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115 (held to the end of this function)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is tokenizing into {prefix}") from None
        for left in folder.glob(".*"):  # by a process that was killed
            left.unlink()
        try:
            yield folder
        except OSError as error:
            if error.errno not in FULL:
                raise DataError(f"{prefix} cannot be written: {error}") from error
            free = shutil.disk_usage(folder).free
            raise DataError(
                f"disk full: {error.strerror} while writing {prefix} ({free:,} bytes free); make room and start again, "
                "finished shards are kept"
            ) from error
        finally:
            if not any(folder.glob("shard-*")):
                shutil.rmtree(folder, ignore_errors=True)


def _existing(prefix: str, shards: list[Shard], options: Options, started: float) -> Result | None:
    """The dataset of this name if it is the one wanted; None where there is none. Raises DataError for another one."""
    if not os.path.exists(f"{prefix}.idx"):
        return None
    sidecar = read_sidecar(prefix)
    if sidecar is None or sidecar.source_sha256 != _source_hash([shard.key(options) for shard in shards]):
        raise DataError(
            f"{prefix}.idx exists, made from other inputs or with other options; remove it or write to another prefix"
        )
    IndexedDataset(prefix)
    print(f"{prefix}: up to date, {sidecar.documents:,} documents, {sidecar.tokens:,} tokens")
    seconds = time.monotonic() - started
    return Result(prefix, sidecar.documents, sidecar.tokens, sidecar.bytes, 0, (), seconds)


def _source_hash(keys: Sequence[str]) -> str:
    return hashlib.sha256("".join(keys).encode()).hexdigest()


def _join(shards: list[Shard], folder: Path, made: Generator[Manifest, None, None], vocab_size: int) -> list[Manifest]:
    """Append each shard to `joined` as soon as it and all before it are made, while the workers go on with the next."""
    manifests = []
    with closing(made), IndexedWriter(folder / JOINED, vocab_size=vocab_size) as writer:
        for shard, manifest in zip(shards, made, strict=True):
            writer.add_index(shard.prefix(folder))
            manifests.append(manifest)
    return manifests


def _publish(
    prefix: str, folder: Path, manifests: list[Manifest], options: Options, tokenizer: Tokenizer, started: float
) -> Result:
    """Give the joined shards the dataset's name, the index last; then the folder goes."""
    tokens = sum(manifest.tokens for manifest in manifests)
    skipped = sum(manifest.skipped for manifest in manifests)
    problems = tuple(problem for manifest in manifests for problem in manifest.problems)
    if tokens == 0:
        reason = f"; {skipped} documents were bad, the first: {problems[0]}" if problems else ""
        raise DataError(f"the inputs hold no text{reason}")
    kept = f"{prefix}.tokenizer{tokenizer.path.suffix}"
    write_whole(kept, tokenizer.path.read_bytes())
    config = tokenizer.path.with_name(f"{tokenizer.path.stem}_config.json")
    if config.is_file():  # it may name the end-of-document token
        write_whole(f"{prefix}.tokenizer_config.json", config.read_bytes())
    documents, size = sum(m.documents for m in manifests), sum(m.bytes for m in manifests)
    sidecar = Sidecar(
        tokenizer=os.path.basename(kept),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        eos_appended=options.append_eos,
        documents=documents,
        tokens=tokens,
        bytes=size,
        source_sha256=_source_hash([manifest.key for manifest in manifests]),
        megapre=__version__,
    )
    write_sidecar(prefix, sidecar)
    for ending in ("bin", "idx"):
        os.replace(folder / f"{JOINED}.{ending}", f"{prefix}.{ending}")
    shutil.rmtree(folder)
    return Result(prefix, documents, tokens, size, skipped, problems, time.monotonic() - started)


def _summary(result: Result) -> str:
    speed = result.bytes / 1e6 / max(result.seconds, 1e-9)
    lines = [
        f"{result.prefix}: {result.documents:,} documents, {result.tokens:,} tokens of {result.bytes:,} bytes, "
        f"{result.seconds:.1f} s ({speed:.1f} MB/s)"
    ]
    if result.skipped:
        named = result.problems[:5]
        more = [f"  and {result.skipped - len(named):,} more"] if result.skipped > len(named) else []
        lines += [f"{result.skipped:,} bad documents passed over:", *(f"  {problem}" for problem in named), *more]
    return "\n".join(lines)
