"""Measure cratelm on one GPU, in at most nine minutes, with few packages and no network: `bash benchmarks/gpu.sh`.

Prints one screen of results, and writes results.json, curves.jsonl and weights/ (bf16, below 16 MB a file).
Each part is a process with its own time limit, and survives the failure of another. A part may also use the time that
those before it left. Parts, with the seconds of nine minutes:

    machine    30    versions, card, driver
    parity     50    losses and gradients of small models agree with the CPU's
    training  210    steps of crate-12l and gpt2-12l in bf16: tokens/s, MFU, memory, four products against five
    harvest    70    harvest of crate-12l as a fraction of its forward pass
    twins     170    crate-1l, gpt2-1l, crate-2l ... trained on carried or generated tokens, and all time that is left
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_part import PartOptions

SECONDS = {"machine": 30, "parity": 50, "training": 210, "harvest": 70, "twins": 170}
"""time limit of each part in a run of nine minutes; together 10 seconds less, for starting and writing"""
TOKENS = Path(__file__).with_name("gpu_tokens.safetensors")
"""carried tokens, if the file exists"""
NEEDED = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "tqdm")
FINISHED = "finished"


def run_part(
    name: str, options: "PartOptions", folder: Path, start: str, seconds: float
) -> dict[str, Any]:
    """Run one part in a process of its own, and return its record: status, seconds and figures.

    `start` is how the process is made, `fork` or `spawn`; after `seconds` it is killed with its children.
    """
    context = multiprocessing.get_context(start)
    process = context.Process(  # pyright: ignore[reportAttributeAccessIssue]
        target=part_process, args=(name, options, folder)
    )
    begin = time.monotonic()
    process.start()
    assert process.pid is not None
    try:
        process.join(seconds)
        stopped = process.is_alive()
    finally:  # also if this process is interrupted
        process.kill()
        process.join()
        with contextlib.suppress(ProcessLookupError):  # compilers that the part started
            os.killpg(process.pid, signal.SIGKILL)
    status = FINISHED
    if stopped:
        status = f"stopped at its time limit of {seconds:.0f} s"
    elif process.exitcode:
        status = f"failed: {_reason(folder / f'{name}.error', process.exitcode)}"
    record = {"status": status, "seconds": round(time.monotonic() - begin, 1), "figures": {}}
    with contextlib.suppress(OSError, ValueError):
        record["figures"] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    if status != FINISHED:
        with contextlib.suppress(OSError):
            log = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
            record["log"] = log[-4000:]
    return record


def _reason(path: Path, code: int) -> str:
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"


def part_process(name: str, options: "PartOptions", folder: Path) -> None:
    """Run a part; what it prints goes to a log, so that the results stay on one screen."""
    os.setpgrp()  # a process group, so that the compilers that it starts can be killed with it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        figures = importlib.import_module("gpu_part").Figures(folder / f"{name}.json")
        importlib.import_module(f"gpu_{name}").measure(options, figures)
    except BaseException as error:
        traceback.print_exc()
        message = " ".join(f"{type(error).__name__}: {error}".split())
        (folder / f"{name}.error").write_text(message[:300], encoding="utf-8")
        sys.exit(1)


def run_parts(arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Run the parts one after another, write `results.json` after each, and return the results."""
    from gpu_part import PartOptions

    from cratelm.runs import write_json

    start = "fork" if sys.platform == "linux" else "spawn"
    begin, scale = time.monotonic(), arguments.minutes / 9
    results: dict[str, Any] = {
        "command": shlex.join(["bash", "benchmarks/gpu.sh", *arguments.words]),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": {k: str(v) for k, v in vars(arguments).items() if k != "words"},
        "parts": {},
    }
    deadline = begin
    with tempfile.TemporaryDirectory() as folder:
        for name in ("machine", *arguments.parts):
            deadline += SECONDS[name] * scale
            if name == "twins":  # the time of parts that were not asked for, too
                deadline = begin + (60 * arguments.minutes) - 10 * scale
            # it stops by itself a little earlier, so that it can write its results
            options = PartOptions(
                arguments.device,
                arguments.tiny,
                out,
                deadline - 3 * scale,
                arguments.tokens,
                tuple(arguments.twins),
            )
            record = run_part(name, options, Path(folder), start, deadline - time.monotonic())
            if name == "machine" and record["status"] != FINISHED and start == "fork":
                # a library that touched the GPU while it was imported makes it unusable after a fork
                start = "spawn"
                record = run_part(name, options, Path(folder), start, deadline - time.monotonic())
            results["parts"][name] = record
            results["processes"], results["seconds"] = start, round(time.monotonic() - begin, 1)
            write_json(out / "results.json", results)
            if name == "machine" and record["status"] != FINISHED:
                break
    return results


def preload() -> str | None:
    """Import what all parts need, so that forked processes need not; return what is missing, if anything is."""
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            return (
                f"{name} cannot be imported ({error}): benchmarks/gpu.sh needs {', '.join(NEEDED)}"
            )
    import torch

    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11):
        return f"torch {torch.__version__} is too old: benchmarks/gpu.sh needs 2.11 or newer"
    for name in ("cratelm.models", "cratelm.train.losses", "torch._dynamo"):
        with contextlib.suppress(Exception):  # the parts that need it fail, and say so
            importlib.import_module(name)
    return None


def options_of(words: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit status: 0 if every part finished and agreed with the CPU, 1 if not, 2 for bad options",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: $OUT, or runs/gpu)"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="tiny models, to try the script: the figures mean nothing",
    )
    parser.add_argument(
        "--minutes", type=float, default=9, help="limit for all parts; their limits scale with it"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=list(SECONDS)[1:],
        default=list(SECONDS)[1:],
        help="default: all, in this order",
    )
    parser.add_argument(
        "--tokens",
        type=Path,
        help=f"file of gpu_tokens.py (default: benchmarks/{TOKENS.name} if it exists, else generated)",
    )
    parser.add_argument(
        "--twins", nargs="+", choices=["1l", "2l", "3l"], default=["1l", "2l", "3l"]
    )
    arguments = parser.parse_args(words)
    arguments.words = list(words)
    arguments.parts = [name for name in SECONDS if name in arguments.parts]
    if not arguments.minutes > 0:
        parser.error(f"--minutes is {arguments.minutes}: it must be above 0")
    if arguments.tokens is None and TOKENS.is_file():
        arguments.tokens = TOKENS
    if arguments.tokens is not None and not arguments.tokens.is_file():
        parser.error(
            f"--tokens {arguments.tokens} does not exist: make it with `python benchmarks/gpu_tokens.py RUN FILE`"
        )
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Run what the command line asks for, print one screen, and return the exit status."""
    arguments = options_of(sys.argv[1:] if words is None else words)
    if problem := preload():
        print(problem, file=sys.stderr)
        return 2
    from gpu_screen import all_is_well, screen

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part is killed, too
    out = (arguments.out or Path(os.environ.get("OUT") or "runs/gpu")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", "curves.jsonl"):  # of an earlier run
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "weights", ignore_errors=True)
    results = run_parts(arguments, out)
    machine = results["parts"]["machine"]["status"]
    if machine != FINISHED:
        print(f"gpu.sh: {machine}", file=sys.stderr)
        return 2
    print(screen(results, out))
    return 0 if all_is_well(results) else 1


if __name__ == "__main__":
    sys.exit(main())
