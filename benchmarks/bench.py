"""Measure what cratelm promises about speed, and write docs/benchmarks.json and the table of docs/benchmarks.md.

    make bench                                    # all rows, about two hours on two cores; nothing else should run
    python benchmarks/bench.py --only decoding    # some rows; the others keep their last figures
    python benchmarks/bench.py --page             # only write the page again

Each row is a benchmark of this folder, run by itself in a process. All but those of whole commands compare two things
that take turns in one process, so that other load on the machine slows down both.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import FIGURES

from cratelm.runs.identity import versions

ROOT = Path(__file__).parents[1]
FILE, PAGE = ROOT / "docs" / "benchmarks.json", ROOT / "docs" / "benchmarks.md"
NOTES = ROOT / "benchmarks" / "notes.md"
"""what the page says below the table: why targets are missed"""
CACHE = ROOT / ".cache" / "bench"
"""runs that several rows use; they are made once"""
DEMO, LARGE, BEFORE = CACHE / "demo", CACHE / "large", CACHE / "0.1.0"
FIRST_VERSION = "b06fa51"
"""commit of version 0.1.0"""
Figures = dict[str, Any]


@dataclass(frozen=True)
class Value:
    """A measured value of a row."""

    label: str
    """what it is of, such as the size; empty if the row has one value"""
    values: list[float]
    """of each turn, or one"""
    whole: float | None = None
    """over all turns together; None: the median counts"""

    @property
    def counted(self) -> float:
        """Return the value that is compared with the target."""
        return statistics.median(self.values) if self.whole is None else self.whole

    def shown(self, unit: str) -> str:
        """Return the value with its range over the turns."""
        low, high = min(self.values), max(self.values)
        spread = f" ({low:.2f} to {high:.2f})" if len(self.values) > 1 else ""
        return f"{self.label}{': ' if self.label else ''}{self.counted:.2f}{unit}{spread}"


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    what: str
    against: str
    command: str
    """after `python`; the figures of the process are those that it prints"""
    values: Callable[[list[Figures]], Iterable[Value]]
    target: float
    at_least: bool = True
    """whether larger is better"""
    unit: str = ""
    needs: tuple[Path, ...] = ()
    """folders of `CACHE` that are made first"""

    @property
    def goal(self) -> str:
        """Return the target in words."""
        return f"{'at least' if self.at_least else 'at most'} {self.target:g}{self.unit}"

    def is_met(self, value: Value) -> bool:
        """Return whether a value meets the target."""
        ours = value.counted
        return ours >= self.target if self.at_least else ours <= self.target


def _ratio(figures: list[Figures]) -> Iterable[Value]:
    return [Value(f.get("model", ""), [f["ratio"]]) for f in figures if f["ratio"] is not None]


def _fractions(figures: list[Figures]) -> Iterable[Value]:
    return [
        Value(f["size"], f["fractions"], sum(f["forward"]) / sum(f["harvest"])) for f in figures
    ]


def _steps(yardstick: str) -> Callable[[list[Figures]], Iterable[Value]]:
    def of(figures: list[Figures]) -> Iterable[Value]:
        chosen = [f for f in figures if f["slow"].endswith(yardstick)]
        return [Value(f"V {f['vocabulary']:,}", f["ratios"]) for f in chosen]

    return of


def _rule(figures: list[Figures]) -> Iterable[Value]:
    chosen = [f for f in figures if f["form"] == "rule"]
    return [Value(f"V {f['vocabulary']:,}", f["ratios"]) for f in chosen]


STEP = "benchmarks/train_step.py --models crate-2l --optimizer muon --repeats 5 --steps 2"
LARGE_SCORES = "benchmarks/large_scores.py"
LOSS = "benchmarks/loss.py --repeats 7"
ROWS = {
    "harvest-sort": Row(
        "harvest without the forward pass, 1M tokens x 3,072 neurons",
        "keep all and sort per neuron: times less",
        "benchmarks/harvest.py --sort",
        _ratio,
        20,
    ),
    "harvest-128": Row(
        "harvest of all layers, d 128, 2 layers",
        "plain forward pass of the same model: fraction of its speed",
        "benchmarks/harvest.py --sizes crate-2l gpt2-2l --tokens 524288",
        _fractions,
        0.75,
    ),
    "harvest-768": Row(
        "the same, d 768",
        "the same",
        "benchmarks/harvest.py --sizes crate-768 gpt2-768 --tokens 131072",
        _fractions,
        0.9,
    ),
    "small-harvest": Row(
        "`cratelm harvest` of 20,000 tokens, the whole command, two-layer twins",
        "a plain script that keeps all and sorts, whole: fraction of its time",
        "benchmarks/small_harvest.py",
        lambda figures: [
            Value(f"{f['model']}, {f['tokens']:,} tokens", f["ratios"]) for f in figures
        ],
        1,
        at_least=False,
    ),
    "step-plain": Row(
        "training step, CRATE-2L, with the default optimizer",
        "the same model written plainly: times faster",
        STEP,
        _steps("plain"),
        1.4,
    ),
    "step-research": Row(
        "the same",
        "a stand-in for the published research code: times faster",
        STEP,
        _steps("research"),
        1.4,
    ),
    "loss-128": Row(
        "head and loss, forward and backward, d 128, 2,048 rows",
        "all logits at once: fraction of its time",
        LOSS,
        _rule,
        1,
        at_least=False,
    ),
    "loss-768": Row(
        "the same, d 768, 4,096 rows",
        "the same",
        "benchmarks/loss.py --repeats 3 --width 768 --rows 4096 --vocab-size 4096 50304",
        _rule,
        1,
        at_least=False,
    ),
    "optimizers": Row(
        "tokens that the Muon recipe needs, one layer",
        "AdamW at its best rate of three, to its loss: times fewer",
        "benchmarks/optimizers.py",
        _ratio,
        1.5,
    ),
    "decoding": Row(
        "decoding 1,024 tokens with a cache, CRATE",
        "its GPT-2 twin: fraction of its time",
        "benchmarks/decoding.py",
        lambda figures: [Value(f["size"], f["ratios"]) for f in figures],
        1,
        at_least=False,
    ),
    "decoding-bytes": Row(
        "bytes of that cache",
        "the twin's",
        "benchmarks/decoding.py",
        lambda figures: [Value(f["size"], [f["bytes_ratio"]]) for f in figures],
        0.5,
        at_least=False,
    ),
    "explain": Row(
        "`cratelm explain`: look-up and trie",
        "version 0.1.0: times faster",
        f"benchmarks/explain_score.py --against {BEFORE}",
        lambda figures: [Value("", f["explain_ratios"]) for f in figures],
        3,
        needs=(BEFORE,),
    ),
    "score": Row(
        "`cratelm score`",
        "version 0.1.0: times faster",
        f"benchmarks/explain_score.py --against {BEFORE}",
        lambda figures: [Value("", f["score_ratios"]) for f in figures],
        3,
        needs=(BEFORE,),
    ),
    "replace": Row(
        "`cratelm replace`: both twins of the demo at the same time, 1,024 neurons each, 100,000 held-out tokens",
        "",
        f"benchmarks/replace.py --run {DEMO} --together",
        lambda figures: [Value("", [f["seconds"] for f in figures])],
        120,
        at_least=False,
        unit=" s",
        needs=(DEMO,),
    ),
    "explain-all": Row(
        "`cratelm explain` of 1,024 neurons, three explainers",
        "",
        f"benchmarks/replace.py --run {DEMO}",
        lambda figures: [Value(f["model"], [f["explain_seconds"]]) for f in figures],
        60,
        at_least=False,
        unit=" s",
        needs=(DEMO,),
    ),
    "replace-paper": Row(
        "`cratelm replace`, 12 layers x 3,072 neurons, two explainers of 200 entries: memory beyond the process",
        "",
        "benchmarks/replace.py --paper",
        lambda figures: [Value("", [f["peak_bytes"] / 1e6]) for f in figures],
        8000,
        at_least=False,
        unit=" MB",
    ),
    "large-scores": Row(
        "`score` and `report`, 12 layers x 3,072 neurons x 3 explainers",
        "",
        LARGE_SCORES,
        lambda figures: [Value("", [f["seconds"] / 60]) for f in figures],
        10,
        at_least=False,
        unit=" min",
    ),
    "large-scores-memory": Row(
        "the same, memory",
        "",
        LARGE_SCORES,
        lambda figures: [Value("", [f["peak_mb"]]) for f in figures],
        2000,
        at_least=False,
        unit=" MB",
    ),
    "simulate": Row(
        "three metrics simulated with SmolLM2-135M",
        "a whole prompt for each excerpt and metric: times faster",
        f"benchmarks/simulate.py --run {DEMO} --neurons 2 --rounds 1",
        lambda figures: [Value("", f["ratios"]) for f in figures],
        6,
        needs=(DEMO,),
    ),
    "viewer": Row(
        "slowest page of the browser, 12 layers x 3,072 neurons, 95th percentile",
        "",
        f"benchmarks/viewer.py {LARGE}",
        lambda figures: [
            max((Value(f["page"], [1e3 * f["p95"]]) for f in figures), key=lambda v: v.counted)
        ],
        50,
        at_least=False,
        unit=" ms",
        needs=(DEMO, LARGE),
    ),
    "demo": Row(
        "`cratelm demo`",
        "version 0.1.0: 9 minutes",
        "benchmarks/demo.py",
        lambda figures: [Value("", [f["minutes"]]) for f in figures],
        6,
        at_least=False,
        unit=" min",
    ),
}
MAKE = {
    DEMO: ["-m", "cratelm", "demo", "--run", str(DEMO), "--quiet"],
    LARGE: ["benchmarks/large_run.py", str(DEMO), str(LARGE)],
}


def prepare(folder: Path) -> None:
    """Make a folder of `CACHE`, unless it is there."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"making {folder}", flush=True)
    if folder == BEFORE:
        archive = folder.with_suffix(".tar")
        archive.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["git", "archive", "-o", str(archive), FIRST_VERSION], cwd=ROOT, check=True)
        folder.mkdir()
        subprocess.run(["tar", "-xf", str(archive), "-C", str(folder)], check=True)
        archive.unlink()
        return
    subprocess.run([sys.executable, *MAKE[folder]], cwd=ROOT, check=True)


def measured(command: str) -> Figures:
    """Run a benchmark; return its figures, or the last line of its error as `failed`, with time and load."""
    load, start = os.getloadavg()[0], time.monotonic()
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    lines = [x.removeprefix(FIGURES) for x in done.stdout.splitlines() if x.startswith(FIGURES)]
    found: Figures = {"command": _relative(command), "figures": [json.loads(x) for x in lines]}
    if done.returncode or not lines:
        found["failed"] = f"exit status {done.returncode}"
    found["seconds"] = round(time.monotonic() - start, 1)
    found["load_before"] = round(load, 2)
    found["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    return found


def _relative(command: str) -> str:
    return command.replace(f"{ROOT}/", "")


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            x.split(":", 1)[1].strip()
            for x in info.read_text().splitlines()
            if x.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), **versions()}


def page(results: dict[str, Any]) -> str:
    """Return docs/benchmarks.md for the content of docs/benchmarks.json."""
    on = results["machine"]
    lines = [
        "# Benchmarks",
        "",
        "What cratelm promises about speed, measured by `make bench`, which writes this page and the file",
        "[benchmarks.json](benchmarks.json) with all figures. Ratios are medians over turns in one process, with their",
        "range in parentheses; what each benchmark does is in its file under `benchmarks/`, others are in",
        "`benchmarks/README.md`.",
        "",
        f"Machine: {on['cpu']}, {on['cores']} cores, no GPU; Python {on['python']}, PyTorch {on['torch']}.",
        "",
        "| what | compared with | target | measured | met | `python` ... |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS.values():
        found = results["commands"].get(_relative(row.command))
        if found is None or "failed" in found:
            shown, met = "not measured" + (f" ({found['failed']})" if found else ""), ""
        else:
            values = list(row.values(found["figures"]))
            shown = "<br>".join(value.shown(row.unit) for value in values) or "not reached"
            met = "yes" if values and all(map(row.is_met, values)) else "no"
        lines.append(
            f"| {row.what} | {row.against} | {row.goal} | {shown} | {met} | `{_relative(row.command)}` |"
        )
    lines += ["", NOTES.read_text(encoding="utf-8").strip()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks of the chosen rows, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--page", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    results = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"commands": {}}
    if not options.page:
        results["machine"] = machine()
        for command in dict.fromkeys(ROWS[key].command for key in options.only):
            for folder in next(ROWS[k].needs for k in options.only if ROWS[k].command == command):
                prepare(folder)
            print(f"python {_relative(command)}", flush=True)
            results["commands"][_relative(command)] = measured(command)
            FILE.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(results), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
