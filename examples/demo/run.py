"""The demo: from text to a trained, sampled model in a few minutes, by the commands anyone would type.

Run it from the root of the repository, through `make demo` or by itself. Each command is printed before it runs. What
exists already is kept: a second demo goes on where the first one was left, and only evaluates and samples after that.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

TEXT = Path("examples/demo/corpus")
DATA = Path("data/demo")
RUN = Path("runs/demo")
PROMPTS = ("She could not", "Mr. Darcy had")
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for `megapre train`, as run.steps=50")
    arguments = parser.parse_args()
    if not TEXT.is_dir():
        print(f"demo: error: {TEXT} is not here; run this from the root of the repository", file=sys.stderr)
        return 2
    # Ctrl-C reaches the command that runs as well. It may need its time to save, so this process waits for it.
    signal.signal(signal.SIGINT, lambda *_: None)
    begin = time.monotonic()
    try:
        text_to_tokens()
        trained = train(arguments.overrides)
        use()
    except subprocess.CalledProcessError as error:
        return stopped(error.returncode)
    close(time.monotonic() - begin, trained)
    return 0


def text_to_tokens() -> None:
    tokenizer = DATA / "tokenizer.json"
    heading("1/5", "Train a tokenizer: a byte-level BPE of 8,192 tokens on the six novels of Jane Austen")
    if tokenizer.exists():
        print(f"{tokenizer} exists and is kept")
    else:
        megapre("tokenizer", "train", TEXT / "train/austen.jsonl.zst", "--vocab-size", "8192", "--output", tokenizer)
    heading("2/5", "Turn text into tokens; the chapters of the validation set are not in the training set")
    for part in ("train", "valid"):
        text = TEXT / part / "austen.jsonl.zst"
        megapre("tokenize", text, "--tokenizer", tokenizer, "--output-prefix", DATA / part)


def train(overrides: Sequence[str]) -> bool:
    """Train, go on, or leave a finished run as it is. True if the run began and ended here."""
    heading("3/5", "Train a Llama-style model from its random start")
    if (RUN / "summary.json").exists():
        print(f"{RUN} holds a finished run and is kept")
        return False
    resume = RUN.exists()
    command = ["train", "demo", *dtype(), *overrides]
    megapre(*command, *(["--resume"] if resume else []))
    return not resume


def use() -> None:
    heading("4/5", "Evaluate it on the chapters it has never seen")
    megapre("eval", RUN)
    heading("5/5", "Let it write")
    for prompt in PROMPTS:
        megapre("sample", RUN, "--prompt", prompt, "--max-new-tokens", "100", "--temperature", "0.7", "--top-p", "0.9")
        print()


def close(seconds: float, trained: bool) -> None:
    steps = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if step.get("loss") is not None]
    heading("Done", f"The loss fell from {losses[0]:.2f} to {sum(losses[-10:]) / len(losses[-10:]):.2f}")
    if trained:
        print(f"From text to samples: {seconds // 60:.0f} min {seconds % 60:.0f} s on {processor()}.\n")
    print(f"run folder  {RUN}")
    print(f"loss plot   {RUN / 'loss.png'}\n")
    print("Try next:")
    print(f'  {program()} sample {RUN} --prompt "My dear" --explain --max-new-tokens 5')
    print(f"  {program()} train demo name=longer run.steps=3000 checkpoint.every=500")
    print(f"  {program()} train --help")
    print(f"\nTo start again: rm -r {DATA} {RUN}")


def stopped(code: int) -> int:
    print(f"\ndemo: stopped (exit code {code}). Run it again to go on, or start over with: rm -r {DATA} {RUN}")
    return code


def megapre(*arguments: object) -> None:
    """Run one `megapre` command, shown as it would be typed. Raises CalledProcessError if it fails."""
    words = [str(argument) for argument in arguments]
    print(f"$ {program()} {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "megapre", *words], check=True)


def dtype() -> list[str]:
    """bf16 where the processor has instructions for it (about 1.6 times the speed); without them it crawls."""
    flags = {flag for line in cpuinfo() if line.startswith("flags") for flag in line.split()}
    return ["run.dtype=bf16"] if flags & BF16_FLAGS else []


def processor() -> str:
    names = [line.split(":", 1)[1].strip() for line in cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else 'this machine'}, {len(os.sched_getaffinity(0))} cores"


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def program() -> str:
    """How the user can call megapre: by its name if that is on the path."""
    script = Path(sys.executable).with_name("megapre")
    on_path = any(Path(folder).resolve() == script.parent.resolve() for folder in os.get_exec_path())
    return "megapre" if on_path or not script.exists() else os.path.relpath(script)


def heading(number: str, text: str) -> None:
    print(f"\n{number}  {text}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
