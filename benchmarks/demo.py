"""Minutes that `cratelm demo` takes as a whole, and seconds of each of its stages.

    python benchmarks/demo.py                    # into a temporary folder
    python benchmarks/demo.py --words --steps 30

It is a plain time: nothing else should run. Words after `--words` are given to `cratelm demo`.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import figures, timed

from cratelm.runs import Run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo and print its times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--words", nargs=argparse.REMAINDER, default=[])
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "demo"
        words = [
            sys.executable,
            "-m",
            "cratelm",
            "demo",
            "--run",
            str(run),
            "--quiet",
            *options.words,
        ]
        seconds = timed(lambda: subprocess.run(words, check=True, stdout=subprocess.DEVNULL))
        stages = {done.label: round(done.seconds, 1) for done in Run(run).completions()}
    print(f"{seconds / 60:.1f} minutes")
    figures(minutes=seconds / 60, stages=stages)


if __name__ == "__main__":
    main()
