"""Compiles every csrc/cuda/*.cu with nvcc, without a GPU, and compares with tests/cuda/aot_table.json.

    python .ci/aot_cuda.py [--update] [--only norm]

With them goes tests/cuda/emulator_cases.cu, which uses what is in csrc/cuda/device/ and so assembles its PTX. The flags
are csrc/cuda/nvcc.options, as in the build: sm_80 and sm_90a. Registers, local memory (spills) and static
shared memory are those that ptxas reports. Registers may differ between releases of nvcc: with another release than the
table's, only local memory and what does not compile count.

What ptxas could not keep apart is an error too (C7510: products of warpgroups one after another; C7508: setmaxnreg
ignored), and so is a kernel in whose machine code the instructions of INSTRUCTIONS are missing, where cuobjdump is
found (CUDA's or Triton's). So is a symbol of torch outside of its stable interface, which is in C: one binary is to
serve every torch from 2.11 on.
"""

import argparse
import fnmatch
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "cuda" / "aot_table.json"
OPTIONS = ROOT / "csrc" / "cuda" / "nvcc.options"
# What every kernel of these files must hold as sm_90a: products of warpgroups, the TMA unit, registers that move.
INSTRUCTIONS = {"attention_sm90_*": ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG")}
ENTRY = re.compile(r"Compiling entry function '(?P<symbol>\w+)' for '(?P<arch>sm_\d+a?)'")

Row = dict[str, int]


def measure(source: Path) -> dict[str, Row]:
    """{"sm_90a norm: kernel<...>": registers a thread, bytes of local memory a thread, bytes of static shared memory}.

    RuntimeError with what the compiler says when it does not compile, or not to what was meant.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = ["nvcc", "--options-file", OPTIONS, "-Xptxas", "-v", "-c", source, "-o", f"{scratch}/kernel.o"]
        for path in include_paths():
            command += ["-isystem", path]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{source.name}: {done.stderr[-6000:]}")
        if lost := re.findall(r"\(C75\d\d\).*", done.stderr):
            raise RuntimeError("\n".join([f"{source.name}: ptxas did not do what is written:", *lost]))
        check_instructions(source.stem, Path(scratch) / "kernel.o")
        check_symbols(source.stem, Path(scratch) / "kernel.o")
    return parse(done.stderr, source.stem)


def check_instructions(unit: str, compiled: Path) -> None:
    """RuntimeError when a kernel of `unit` lacks what INSTRUCTIONS names."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else Path()
    cuobjdump = shutil.which("cuobjdump") or (str(bundled) if bundled.is_file() else None)
    needed = [name for pattern, names in INSTRUCTIONS.items() if fnmatch.fnmatchcase(unit, pattern) for name in names]
    if not needed or cuobjdump is None:
        return
    code = subprocess.run([cuobjdump, "-sass", "-arch", "sm_90a", compiled], capture_output=True, text=True, check=True)
    for kernel in code.stdout.split("Function : ")[1:]:
        missing = [name for name in needed if not re.search(rf"\b{name}\b", kernel)]
        if missing:
            raise RuntimeError(f"{unit}: no {' and no '.join(missing)} in the code for sm_90a of {kernel.split()[0]}")


def check_symbols(unit: str, compiled: Path) -> None:
    """RuntimeError when `compiled` asks for functions of torch's C++, which change from release to release."""
    nm = ["nm", "--undefined-only", "--demangle", "--just-symbols", compiled]
    symbols = subprocess.run(nm, capture_output=True, text=True, check=True).stdout.splitlines()
    unstable = [name for name in symbols if re.match(r"(typeinfo for |vtable for )?(at|c10|caffe2|torch)::", name)]
    if unstable:
        raise RuntimeError("\n".join([f"{unit}: not of torch's stable interface:", *unstable]))


def parse(report: str, unit: str) -> dict[str, Row]:
    """The rows in what ptxas prints: for each kernel and architecture a line that names it, then two with numbers."""
    symbols = sorted({match["symbol"] for match in ENTRY.finditer(report)})
    plain = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = {symbol: readable(name) for symbol, name in zip(symbols, plain.splitlines(), strict=True)}
    rows: dict[str, Row] = {}
    label = ""
    for line in report.splitlines():
        if match := ENTRY.search(line):
            label = f"{match['arch']} {unit}: {names[match['symbol']]}"
        elif match := re.search(r"(\d+) bytes stack frame", line):
            rows[label] = {"registers": 0, "local": int(match[1]), "shared": 0}
        elif match := re.search(r"Used (\d+) registers", line):
            rows[label]["registers"] = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            rows[label]["shared"] = int(shared[1]) if shared else 0
    return rows


def readable(name: str) -> str:
    """`void megapre::cuda::kernel<float, (int)4>(Arguments<float>)` as `kernel<float, 4>`."""
    name = re.sub(r"megapre::cuda::|\((?:unsigned )?(?:int|long|bool)\)|^void |\(anonymous namespace\)::", "", name)
    return name.split(">(", 1)[0] + ">" if ">(" in name else name.split("(", 1)[0]


def problems(rows: dict[str, Row], table: dict, same_nvcc: bool) -> list[str]:
    """What is wrong: local memory without a reason, or a difference from the table."""
    found = []
    for label, row in rows.items():
        accepted = max(
            (rule["bytes"] for pattern, rule in table["accepted"].items() if fnmatch.fnmatchcase(label, pattern)),
            default=0,
        )
        if row["local"] > accepted:
            found.append(f"{label}: {row['local']} bytes of local memory, {accepted} are accepted in {TABLE.name}")
        elif same_nvcc and table["rows"].get(label) != row:
            found.append(f"{label}: {row}, the table has {table['rows'].get(label)}; run with --update if it is meant")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--only", default="", help="only files whose name contains this")
    arguments = parser.parse_args()
    units = [*sorted(ROOT.glob("csrc/cuda/*.cu")), ROOT / "tests" / "cuda" / "emulator_cases.cu"]
    sources = [path for path in units if arguments.only in path.name]
    if shutil.which("nvcc") is None:
        print(f"nvcc is not on this machine: {len(sources)} CUDA files are not compiled")
        return 0
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = version.split("Cuda compilation tools, release ")[1].split(",")[0]
    with ThreadPoolExecutor(2) as pool:
        rows = {label: row for part in pool.map(measure, sources) for label, row in part.items()}
    for label, row in sorted(rows.items()):
        print("{registers:4d} registers {local:5d} local {shared:7d} shared".format(**row), label)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"nvcc": "", "accepted": {}, "rows": {}}
    if arguments.update:
        units = {f" {path.stem}: " for path in sources}
        kept = {k: v for k, v in table["rows"].items() if arguments.only and not any(unit in k for unit in units)}
        table |= {"nvcc": release, "rows": dict(sorted((kept | rows).items()))}
        lines = ",\n".join(f"  {json.dumps(label)}: {json.dumps(row)}" for label, row in table["rows"].items())
        accepted = json.dumps(table["accepted"], indent=2)
        TABLE.write_text(f'{{\n "nvcc": "{release}",\n "accepted": {accepted},\n "rows": {{\n{lines}\n }}\n}}\n')
    same_nvcc = table["nvcc"] == release
    if not same_nvcc:
        print(f"the table is of nvcc {table['nvcc']}, this is {release}: registers are not compared")
    found = problems(rows, table, same_nvcc)
    if not arguments.only:
        found += [f"{label}: in the table, but no kernel now" for label in table["rows"].keys() - rows.keys()]
    print(*found, f"{len(rows)} kernels compiled, {len(found)} problems", sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
