"""Time for the neuron browser to open a run, render its pages, and answer requests of the live page.

    python benchmarks/large_run.py runs/demo runs/large        # 12 layers x 3,072 neurons
    python benchmarks/viewer.py runs/large
    python benchmarks/viewer.py runs/demo --live crate-2l      # needs the model

Times are measured on the server side, through the whole application without a network; p50 and p95 in ms. Each request
uses another neuron, layer or word, so that pages are not requested twice.
"""

import argparse
import gc
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from common import figures, timed, timed_result
from fastapi.testclient import TestClient

from cratelm.viewer.live import Live
from cratelm.viewer.live_explanations import LiveExplanations
from cratelm.viewer.run_reader import Library
from cratelm.viewer.server import application

ADDRESS = "http://127.0.0.1"


def show(name: str, seconds: list[float], cpu: list[float] | None = None) -> None:
    """Print the median and the 95th percentile, also of processor time, which other load hardly changes."""
    p50, p95 = _percentiles(seconds)
    line = f"{name:<34} p50 {1e3 * p50:7.1f}  p95 {1e3 * p95:7.1f}  n {len(seconds)}"
    of_cpu = {}
    if cpu:
        cpu_p50, cpu_p95 = _percentiles(cpu)
        line += f"  CPU: p50 {1e3 * cpu_p50:7.1f}  p95 {1e3 * cpu_p95:7.1f}"
        of_cpu = {"cpu_p50": cpu_p50, "cpu_p95": cpu_p95}
    print(line)
    figures(page=name, p50=p50, p95=p95, n=len(seconds), **of_cpu)


def _percentiles(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def pages(run: Path, turns: int, index: bool) -> None:
    """Time the pages, with another neuron, layer or word for each request, and print the results."""

    def opened() -> Library:
        library = Library([run])
        TestClient(application(library), ADDRESS).get("/").raise_for_status()
        return library

    opening, library = timed_result(opened)
    print(f"open, to the first overview: {opening:.2f} s")
    app = application(library)
    gc.freeze()  # as `cratelm view` does

    def get(path: str, turn: int = 0) -> tuple[float, float]:
        # another client each time, because the server limits the requests of each client
        client = TestClient(app, ADDRESS, client=(f"10.0.{turn // 256}.{turn % 256}", 50_000))
        cpu = time.process_time()
        seconds = timed(lambda: client.get(path).raise_for_status())
        return seconds, time.process_time() - cpu

    key = library.keys[0]
    models = [m for m in library.run(key).models if m.neurons]
    if index:
        build_seconds = timed(library.index_of(key).build)
        total = sum(sum(m.neurons.values()) for m in models)
        print(f"index and maps: {build_seconds:.0f} s, {total / build_seconds:.0f} neurons/s")
    model = models[0]
    layers, n = sorted(model.neurons), max(model.neurons.values())
    rng = np.random.default_rng(0)
    words = ["import", "self", "return", "def", "class", "string", "None", "if", "for", "with"]

    def layer() -> int:
        return int(rng.choice(layers))

    base = f"/r/{key}"
    first, _ = get(f"{base}/layer/{model.name}/{layer()}")
    print(f"first page of a layer (reads the model's columns): {first:.2f} s")
    kinds: dict[str, Callable[[], str]] = {
        "overview": lambda: base,
        "layer, with its map": lambda: f"{base}/layer/{model.name}/{layer()}",
        "details of a map": lambda: f"/api{base}/map/{model.name}/{layer()}",
        "layer, sorted": lambda: (
            f"{base}/layer/{model.name}/{layer()}?sort=anthropic&direction=descending&page={rng.integers(1, 9)}"
        ),
        "layer, words": lambda: f"{base}/layer/{model.name}/{layer()}?q={rng.choice(words)}",
        "layer, token": lambda: f"{base}/layer/{model.name}/{layer()}?token={rng.choice(words)}",
        "neuron": lambda: f"{base}/neuron/{model.name}/{layer()}/{rng.integers(n)}",
        "search, words": lambda: f"{base}/search?q={rng.choice(words)}",
        "search, token": lambda: f"{base}/search?token={rng.choice(words)}",
        "compare layers": lambda: (
            f"{base}/compare?left={model.name}/{layer()}&right={model.name}/{layer()}"
        ),
        "compare neurons": lambda: (
            f"{base}/compare?left={model.name}/{layer()}/{rng.integers(n)}&right={model.name}/{layer()}/{rng.integers(n)}"
        ),
    }
    for name, address in kinds.items():
        paths = [address() for _ in range(turns)]
        get(paths[0])
        seconds, cpu = zip(*(get(path, turn) for turn, path in enumerate(paths)), strict=True)
        show(name, list(seconds), list(cpu))


def live(run: Path, model: str, turns: int) -> None:
    """Time requests of the live page on texts of about 200 tokens, for one client and for ten clients at once."""
    model_server = Live(Library([run]))
    key = model_server.library.keys[0]
    word = "def read(self, path):\n    return open(path)\n"

    def text(number: int) -> str:
        return (f"# {number}\n" + word * 40)[:700]

    tokens = len(model_server.activations(key, model, text(-1), 0, 0).tokens)
    print(f"live, {model}, {tokens} tokens")
    kinds = {
        "activations": lambda i: model_server.activations(key, model, text(i), 0, i % 64),
        "strongest": lambda i: model_server.strongest(key, model, text(i + 10_000), i % 20),
    }
    if not model_server.library.not_explained(key, [model]):
        explanations = LiveExplanations(model_server)
        kinds["explained"] = lambda i: explanations.read(key, model, text(i + 20_000))
        kinds["predicted"] = lambda i: explanations.predict(key, model, text(i), tokens - 5)
    for name, ask in kinds.items():
        show(f"{name}, one client", [timed(lambda i=i, f=ask: f(i)) for i in range(turns)])
    for name, ask in kinds.items():
        times: list[float] = []

        def client(number: int, ask=ask, times=times) -> None:
            for turn in range(max(1, turns // 10)):
                times.append(timed(lambda turn=turn: ask(100_000 + 1000 * number + turn)))

        threads = [threading.Thread(target=client, args=(n,)) for n in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        show(f"{name}, ten clients", times)
    model_server.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--live", default="", help="model for which the live page is timed")
    parser.add_argument("--turns", type=int, default=100, help="requests of each kind")
    parser.add_argument("--no-index", action="store_true", help="do not build the index")
    options = parser.parse_args(arguments)
    if options.live:
        live(options.run, options.live, options.turns)
    else:
        pages(options.run, options.turns, not options.no_index)


if __name__ == "__main__":
    main()
