"""The command line: each verb is a thin door to one room.

Only click is imported here. A verb imports its room when it runs: `megapre --help` needs neither torch nor patience.
"""

import contextlib
import os
import sys

import click

from .. import __version__
from . import bench, comm, data, schedules, training

BROKEN, INTERRUPTED = 2, 130
"""Exit codes for what the user can mend, and for Ctrl-C."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="megapre")
def cli() -> None:
    """megapre pretrains large language models: raw text to tokens to a trained, sampled model.

    \b
    megapre tokenizer train text/*.txt --vocab-size 8192 --output tokenizer.json
    megapre tokenize text/*.txt --tokenizer tokenizer.json --output-prefix data/text
    megapre train gpt2-124m data.train=data/text run.steps=1000
    megapre sample runs/gpt2-124m --prompt "Once upon a time"
    """
    from ..train import cpu_runtime

    cpu_runtime.before_torch(os.environ)


@cli.command()
def doctor() -> int:
    """What this machine has, and what is used of it."""
    from ..observe import doctor

    return doctor.run()


for verb in (
    training.train,
    training.launch,
    training.evaluate,
    training.sample,
    data.tokenize,
    data.tokenizer,
    bench.bench,
    comm.tune,
    schedules.schedule,
):
    cli.add_command(verb)


def main() -> None:
    """Run and exit with 0, the verb's own code, 1 for a bug, 2 for what the user can mend, or 130 for Ctrl-C."""
    try:
        code = _run()
    except Exception:
        if not _among_ranks():
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    if _among_ranks():  # and has not come to leaving them: its end is what tells the others, so it comes at once
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _among_ranks() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _run() -> int:
    """The exit code, after what the user is to know has been said."""
    try:
        return cli.main(standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("megapre: interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:  # `megapre ... | head`: nobody reads on, and the interpreter would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        message = _mendable(error)
        if message is None or os.environ.get("MEGAPRE_TRACEBACK") == "1":
            raise
        if not _told_by_the_first_rank(error):
            click.echo(f"megapre: error: {message}", err=True)
        return BROKEN


def _mendable(error: Exception) -> str | None:
    """What to tell the user about `error`, or None where it is a bug of ours and the traceback is the message."""
    from ..errors import UserError

    # The kernels stand alone, so their errors are no UserErrors.
    if isinstance(error, UserError) or (isinstance(error, ValueError) and _home(error).startswith("megapre.kernels")):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("megapre"):
        return f"the Python package {error.name!r} is missing in {sys.executable}; `megapre doctor` lists what is there"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    return None


def _told_by_the_first_rank(error: Exception) -> bool:
    """Whether this is another rank than the first one, and all of them have this error."""
    comm = sys.modules.get("megapre.parallel.comm")
    return comm is not None and isinstance(error, comm.RanksError) and comm.place(os.environ).rank > 0


def _home(error: Exception) -> str:
    """The module that defines the error's class."""
    return type(error).__module__
