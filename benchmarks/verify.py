"""Measure what it costs to compare files with their recorded hashes, next to reading them.

    python benchmarks/verify.py --sizes crate-2l gpt2-12l

For each size: a model of random weights, written as a stage, and an excerpts file of `--neurons` neurons. Times
are the fastest of `--repeats`, with the files in the page cache; each verification is given as a fraction of
reading the same file. `hashed` is the first opening in a process; `noted` that of a file of 256 MiB and more,
whose size and time are unchanged; `again` a later opening in the same process.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from common import neuron_summary, timed

import cratelm
import cratelm.runs.verified as verified_files
from cratelm.activations.store import read_records, write_records
from cratelm.records import Excerpt, NeuronId, NeuronRecord
from cratelm.runs import Run
from cratelm.runs.reading import verify_folder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["crate-2l", "gpt2-12l"])
    parser.add_argument("--neurons", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=50_304)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    print(f"{'files':<28}{'MB':>9}{'read, s':>10}{'hashed':>10}{'noted':>10}{'again':>10}")
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder)
        for size in options.sizes:
            model = cratelm.build(size, vocab_size=options.vocab)
            stage = run.stage("model", size)
            with stage.write({"model": size}, {}) as draft:
                model.save_pretrained(draft.path)
            measure(f"weights of {size}", stage.path, lambda f: cratelm.load(f), options.repeats)
        stage = run.stage("activations", "neurons")
        with stage.write({}, {}) as draft:
            write_records(draft.path, "held_out", records(options.neurons))
        label = f"excerpts of {options.neurons} neurons"
        measure(label, stage.path, lambda f: list(read_records(f, "held_out")), options.repeats)


def measure(label: str, folder: Path, read: Callable[[Path], object], repeats: int) -> None:
    """Print the time of reading a folder, and of verifying it in each way as a fraction of that."""
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    # `read` verifies what it opens: it is timed when that is known to be sound, which costs a `stat`
    verify_folder(folder)
    seconds = fastest(lambda: read(folder), repeats)

    def hashed() -> None:
        verified_files.forget()
        verify_folder(folder)

    def limited(limit: int) -> float:
        before, verified_files.LARGE = verified_files.LARGE, limit
        try:
            hashed()  # notes what is large
            return fastest(hashed, repeats)
        finally:
            verified_files.LARGE = before

    ratios = [limited(2**62), limited(0), fastest(lambda: verify_folder(folder), repeats)]
    shown = "".join(f"{ratio / seconds:>10.4f}" for ratio in ratios)
    print(f"{label:<28}{size:>9,.1f}{seconds:>10.3f}{shown}", flush=True)


def fastest(work: Callable[[], object], repeats: int) -> float:
    return min(timed(work) for _ in range(repeats))


def records(n_neurons: int) -> list[NeuronRecord]:
    """Return neurons with 80 excerpts of 64 tokens each, as `cratelm harvest` keeps by default."""
    generator = np.random.default_rng(0)
    made = []
    for index in range(n_neurons):
        neuron = NeuronId("neurons", "ista", 0, index)
        excerpts = [
            Excerpt(
                "random",
                rank,
                -1,
                generator.integers(0, 50_000, 64).astype(np.int32),
                generator.random(64, np.float32),
                32,
                rank,
                rank * 64,
            )
            for rank in range(80)
        ]
        summary = neuron_summary(neuron, 100_000, 1.0)
        made.append(NeuronRecord(summary, tuple(excerpts)))
    return made


if __name__ == "__main__":
    main()
