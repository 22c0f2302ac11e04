"""Memory and time of `cratelm score` and `cratelm report` on a generated run of any size.

    python benchmarks/large_scores.py --layers 12 --neurons 3072

Generates the harvest of a few neurons (`explain_score.py`), explains it, and tiles harvest and explanations to the
requested size with `large_run.py`, both splits included. The third explainer is the trie under another name. Then runs
each verb in a process of its own, and prints its time and the peak of its memory, and at last those of both verbs
together. 12 x 3,072 neurons take 4 GB of disk. With `--sizes 1 2 4` the numbers of neurons per layer are multiplied, which shows what memory grows with.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import figures
from explain_score import generated_run
from large_run import write_excerpts, write_tiled

from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.runs import Run

MODEL = "crate-12l"
THIRD = "trie-again"
"""name of the third explainer"""


def large(small: Run, path: Path, layers: int, neurons: int) -> Run:
    """Write a run with `layers` x `neurons`, each a copy of a neuron of model `m` of the small run."""
    run = Run(path)
    path.mkdir()
    (path / "tokens").symlink_to((small.path / "tokens").absolute())
    harvest, explained = (small.stage(s, "m").path for s in ("activations", "explanations"))
    inputs: dict[str, Any] = {"tokens": run.stage("tokens").require()}
    with run.stage("activations", MODEL).write({"model": MODEL}, inputs) as draft:
        for split in ("fit", "held_out"):
            for file, write in (("summaries", write_tiled), ("excerpts", write_excerpts)):
                name = f"{file}-{split}.parquet"
                write(harvest / name, draft.path / name, layers, neurons, MODEL)
    inputs["activations"] = run.stage("activations", MODEL).require()
    config = {"model": MODEL, "explainers": ["lookup", "trie", THIRD]}
    with (
        run.stage("explanations", MODEL).write(config, inputs) as draft,
        tempfile.TemporaryDirectory() as folder,
    ):
        three = Path(folder) / "explanations.parquet"
        _write_with_third(explained / "explanations.parquet", three)
        write_tiled(three, draft.path / three.name, layers, neurons, MODEL)
        write_tiled(
            explained / "neurons.parquet", draft.path / "neurons.parquet", layers, neurons, MODEL
        )
    return run


def _write_with_third(source: Path, target: Path) -> None:
    table = pq.read_table(source)
    third = table.filter(pa.array(table["explainer"].to_numpy() == "trie"))
    at = table.schema.get_field_index("explainer")
    third = third.set_column(at, table.schema.field(at), pa.array([THIRD] * len(third)))
    together = pa.concat_tables([table, third])
    order = np.argsort(together["index"].to_numpy(), kind="stable")
    pq.write_table(together.take(pa.array(order)), target)


def verb(name: str, run: str) -> None:
    """Run one verb in this process, and print its time and the peak of its memory as JSON."""
    from cratelm.report.config import ReportConfig
    from cratelm.report.report import report
    from cratelm.score import simulators
    from cratelm.score.config import ScoreConfig
    from cratelm.score.score import score

    simulators.SIMULATORS[THIRD] = simulators.TrieSimulator()
    start, cpu = time.perf_counter(), time.process_time()
    rows = None
    if name == "score":
        result: Any = score(ScoreConfig(run=Path(run), model=MODEL, quiet=True))
        rows = result.n_scores
    else:
        report(ReportConfig(run=Path(run)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measured = {
        "verb": name,
        "rows": rows,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_mb": round(peak / (1024**2 if sys.platform == "darwin" else 1024)),
    }
    print(json.dumps(measured))


def measured(name: str, run: Run) -> dict[str, Any]:
    """Return what `verb` prints in a process of its own."""
    words = [sys.executable, str(Path(__file__).absolute()), "--verb", name, str(run.path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results as JSON, one line per verb and size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--neurons", type=int, default=3072, help="neurons per layer")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1], help="multiples of --neurons")
    parser.add_argument("--source", type=int, default=64, help="neurons that are copied")
    parser.add_argument("--tokens", type=int, default=10**6, help="tokens of each split")
    parser.add_argument("--verb", nargs=2, metavar=("VERB", "RUN"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.verb:
        verb(*options.verb)
        return
    with tempfile.TemporaryDirectory() as folder:
        small = generated_run(Path(folder) / "small", options.source, options.tokens)
        explain(ExplainConfig(run=small.path, model="m", quiet=True))
        for size in options.sizes:
            n = size * options.neurons
            run = large(small, Path(folder) / f"large-{size}", options.layers, n)
            of_size = {"layers": options.layers, "neurons": options.layers * n, "explainers": 3}
            results = []
            for name in ("score", "report"):
                results.append(measured(name, run))
                print(json.dumps({**of_size, **results[-1]}), flush=True)
            sums = {k: round(sum(r[k] for r in results), 1) for k in ("seconds", "cpu_seconds")}
            peak = max(r["peak_mb"] for r in results)
            both = {"verb": "score, report", **sums, "peak_mb": peak}
            print(json.dumps({**of_size, **both}), flush=True)
            figures(**of_size, **both)


if __name__ == "__main__":
    main()
