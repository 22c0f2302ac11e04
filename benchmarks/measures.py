"""What each measure of `cratelm score` costs: the same command with and without it.

    python benchmarks/measures.py --run runs/demo --model crate-2l

All are scored alternately in one process, in a copy of the stages that they need; the first turn, which loads libraries,
is not counted. Times are of whole commands without their start. What needs a language model costs calls, which
`cratelm score --dry-run` counts.
"""

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import figures, timed

from cratelm.runs import Run
from cratelm.score.config import ScoreConfig
from cratelm.score.score import score

WITH = {
    "excerpts alone": {"all_tokens": False},
    "all held-out tokens and the last token's share": {},
    "the same, and the audit": {"audit": True},
}
"""options of each way to score; the first is what the others are compared with"""


def copied(run: Run, model: str, folder: Path) -> Path:
    """Copy what scores are made from; return the copy."""
    folder.mkdir()
    for file in run.path.glob("*.json"):
        shutil.copy(file, folder)
    for stage in ("tokens", "model", "activations", "explanations"):
        path = run.stage(stage, "" if stage == "tokens" else model).path
        shutil.copytree(path, folder / path.relative_to(run.path))
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--model", default="crate-2l")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        run = copied(Run(options.run), options.model, Path(folder) / "run")
        configs = {
            name: ScoreConfig(run=run, model=options.model, force=True, quiet=True, **chosen)
            for name, chosen in WITH.items()
        }
        score(configs[next(iter(WITH))])
        seconds: dict[str, list[float]] = {name: [] for name in WITH}
        for _ in range(options.turns):
            for name, config in configs.items():
                seconds[name].append(timed(lambda c=config: score(c)))
    plain = seconds[next(iter(WITH))]
    for name, times in seconds.items():
        ratios = [t / p for t, p in zip(times, plain, strict=True)]
        print(
            f"{name:<50} {statistics.median(times):6.1f} s, {statistics.median(ratios):.2f} times"
            f" ({min(ratios):.2f} to {max(ratios):.2f})"
        )
        figures(measure=name, seconds=times, ratios=ratios)


if __name__ == "__main__":
    main()
