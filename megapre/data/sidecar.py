"""The sidecar `PREFIX.meta.json`: what the token file itself cannot say.

tokenizer          path of the tokenizer, relative to the sidecar's folder
tokenizer_sha256   of that file's bytes
vocab_size         ids are below this
eos_id             end-of-document token, or null
eos_appended       whether every non-empty document ends in it
documents, tokens  counts, empty documents and appended tokens included
bytes              UTF-8 bytes of the text, for bits per byte
source_sha256      of the input files and the options: the same again gives the same dataset
megapre            version that wrote it
"""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .atomic import write_whole
from .errors import DataError
from .indexed import bare_prefix


@dataclass(frozen=True)
class Sidecar:
    """The content of a sidecar; see the module's table."""

    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int | None
    eos_appended: bool
    documents: int
    tokens: int
    bytes: int
    source_sha256: str = ""
    megapre: str = ""


def sidecar_path(prefix: str | os.PathLike[str]) -> Path:
    """Where the sidecar of a dataset lies."""
    return Path(f"{bare_prefix(prefix)}.meta.json")


def read_sidecar(prefix: str | os.PathLike[str]) -> Sidecar | None:
    """The sidecar of a dataset; None where there is none, as with files that Megatron wrote.

    Raises DataError where it is broken. Unknown keys are left alone: a later version may have written them.
    """
    path = sidecar_path(prefix)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    known = {field.name for field in fields(Sidecar)}
    needed = known - {"source_sha256", "megapre"}
    if not isinstance(found, dict) or needed - found.keys():
        missing = ", ".join(sorted(needed - found.keys())) if isinstance(found, dict) else "everything"
        raise DataError(f"{path} is no sidecar of a dataset: it lacks {missing}")
    return Sidecar(**{key: value for key, value in found.items() if key in known})


def write_sidecar(prefix: str | os.PathLike[str], sidecar: Sidecar) -> None:
    """Write the sidecar of a dataset, whole or not at all."""
    write_whole(sidecar_path(prefix), f"{json.dumps(asdict(sidecar), indent=2)}\n".encode())
