"""The whole command `cratelm harvest` on few tokens, compared with a script that keeps all activations and sorts them.

    python benchmarks/small_harvest.py                   # makes a run of crate-2l and gpt2-2l, then measures both
    python benchmarks/small_harvest.py --run runs/demo   # measures models of a run
    python benchmarks/small_harvest.py --start-up        # only how long the verbs take to start

Both sides run alternately, each as a process of its own: start-up, imports, loading and writing count. The other side is
`benchmarks/keep_and_sort.py`. Printed as a line of JSON, with wall-clock and processor seconds of every turn (all threads, and with
start and end of the interpreter) and the ratio of their medians; below 1, cratelm is faster. `tokens` is the number of
tokens searched in each of the two splits. The harvest is named `small-harvest`, and is removed at the end.

`--start-up` prints the seconds that a new interpreter takes to answer `--help`, and to import each of some verbs.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import figures

from cratelm.runs import Run

SCRIPT = Path(__file__).with_name("keep_and_sort.py")
NAME = "small-harvest"
VERBS = ("harvest", "train", "explain", "score", "report", "view")


def seconds_of(command: Sequence[str]) -> tuple[float, float]:
    """Return the wall-clock and processor seconds of a command, which must succeed."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, used


def cratelm(*words: Any) -> list[str]:
    """Return a command of cratelm for this interpreter."""
    return [sys.executable, "-m", "cratelm", *map(str, words)]


def make_run(path: Path, models: Sequence[str], steps: int) -> None:
    """Tokenize the built-in corpus with the default vocabulary, and train the models a little."""
    splits = ("--fit", 0.15, "--held-out", 0.15, "--sequence-length", 256)
    seconds_of(cratelm("tokenize", "--run", path, *splits, "--quiet"))
    for model in models:
        options = ("--model", model, "--steps", steps, "--quiet")
        seconds_of(cratelm("train", "--run", path, *options))


def compare(run: Path, model: str, tokens: int, repeats: int, scratch: Path) -> dict[str, Any]:
    """Return the seconds of both sides in turn, their medians and ratios."""
    options = ("--model", model, "--name", NAME, "--tokens", tokens, "--force", "--quiet")
    commands = {
        "cratelm": cratelm("harvest", "--run", run, *options),
        "keep_and_sort": [sys.executable, *map(str, (SCRIPT, run, model, tokens, scratch))],
    }
    turns = [{side: seconds_of(command) for side, command in commands.items()} for _ in range(repeats)]  # fmt: skip
    result: dict[str, Any] = {"model": model, "tokens": tokens}
    for index, kind in enumerate(("wall", "cpu")):
        seconds = {side: [turn[side][index] for turn in turns] for side in commands}
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        result[f"{kind}_ratio"] = round(medians["cratelm"] / medians["keep_and_sort"], 3)
        result[f"{kind}_seconds"] = {s: [round(v, 2) for v in vs] for s, vs in seconds.items()}
    return result


def start_up(repeats: int) -> dict[str, list[float]]:
    """Return the wall-clock and processor seconds, medians, of `--help` and of the import of verbs."""
    commands = {
        "cratelm --help": cratelm("--help"),
        "cratelm harvest --help": cratelm("harvest", "--help"),
    }
    for verb in VERBS:
        code = f"from cratelm.cli import verb_function; verb_function({verb!r})"
        commands[f"import of {verb}"] = [sys.executable, "-c", code]
    turns = [{name: seconds_of(command) for name, command in commands.items()} for _ in range(repeats)]  # fmt: skip
    return {
        name: [round(statistics.median(turn[name][kind] for turn in turns), 2) for kind in (0, 1)]
        for name in commands
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a run with the models; default: a new one")
    parser.add_argument("--models", nargs="+", default=["crate-2l", "gpt2-2l"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[20_000, 98_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="training steps in a new run")
    parser.add_argument("--start-up", action="store_true")
    options = parser.parse_args(arguments)
    if options.start_up:
        print(json.dumps({"seconds, wall and cpu": start_up(options.repeats)}, indent=1))
        return
    scratch = Path(tempfile.mkdtemp(prefix="small-harvest-"))
    run = options.run or scratch / "run"
    try:
        if options.run is None:
            make_run(run, options.models, options.steps)
        results = [
            compare(run, model, tokens, options.repeats, scratch / "excerpts")
            for tokens in options.tokens
            for model in options.models
        ]
        Run(run).stage("activations", NAME).remove()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for result in results:
        walls = result["wall_seconds"]
        pairs = zip(walls["cratelm"], walls["keep_and_sort"], strict=True)
        threads = os.environ.get("OMP_NUM_THREADS", "default")
        figures(**result, ratios=[ours / plain for ours, plain in pairs], threads=threads)


if __name__ == "__main__":
    main()
