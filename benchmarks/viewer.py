"""How fast the neuron browser opens a run and makes its pages, and how fast the live model answers.

    python benchmarks/large_run.py runs/demo runs/large        # 12 layers x 3,072 neurons
    python benchmarks/viewer.py runs/large
    python benchmarks/viewer.py runs/demo --live crate-2l      # needs the model

Times are of the server's side, through the whole application without a network; p50 and p95 in ms.
Every request is another neuron, layer or word, so that no page is asked for twice.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fastapi.testclient import TestClient

from cratelm.viewer import server
from cratelm.viewer.live import Live
from cratelm.viewer.run_reader import Library
from cratelm.viewer.security import Rate


def shown(name: str, seconds: list[float]) -> None:
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    print(
        f"{name:<34} p50 {1e3 * statistics.median(ordered):7.1f}  p95 {1e3 * p95:7.1f}  n {len(ordered)}"
    )


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def pages(run: Path, turns: int, index: bool) -> None:
    start = time.perf_counter()
    library = Library([run])
    client = TestClient(server.application(library, rate=Rate(1e9, 1e9)), "http://127.0.0.1")
    client.get("/")
    print(f"open, to the first overview: {time.perf_counter() - start:.2f} s")
    key = library.keys[0]
    models = [m for m in library.run(key).models if m.neurons]
    if index:
        took = timed(library.index_of(key).build)
        total = sum(sum(m.neurons.values()) for m in models)
        print(f"index and maps: {took:.0f} s, {total / took:.0f} neurons a second")
    model = models[0]
    layers, n = sorted(model.neurons), max(model.neurons.values())
    rng = np.random.default_rng(0)
    words = ["import", "self", "return", "def", "class", "string", "None", "if", "for", "with"]

    def layer() -> int:
        return int(rng.choice(layers))

    base = f"/r/{key}"
    first = timed(lambda: client.get(f"{base}/layer/{model.name}/{layer()}"))
    print(f"first page of a layer (reads the model's columns): {first:.2f} s")
    kinds: dict[str, Callable[[], str]] = {
        "overview": lambda: base,
        "layer, with its map": lambda: f"{base}/layer/{model.name}/{layer()}",
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
        asked = [address() for _ in range(turns)]
        client.get(asked[0])
        answers = [timed(lambda a=a: client.get(a).raise_for_status()) for a in asked]
        shown(name, answers)


def live(run: Path, model: str, turns: int) -> None:
    """200 tokens, another text each time; then ten clients at once."""
    asking = Live(Library([run]))
    key = asking.library.keys[0]
    word = "def read(self, path):\n    return open(path)\n"

    def text(number: int) -> str:
        return (f"# {number}\n" + word * 40)[:700]

    tokens = len(asking.activations(key, model, text(-1), 0, 0).tokens)
    print(f"live, {model}, {tokens} tokens")
    kinds = {
        "activations": lambda i: asking.activations(key, model, text(i), 0, i % 64),
        "strongest": lambda i: asking.strongest(key, model, text(i + 10_000), i % 20),
    }
    for name, ask in kinds.items():
        shown(f"{name}, one client", [timed(lambda i=i, f=ask: f(i)) for i in range(turns)])
    for name, ask in kinds.items():
        found: list[float] = []

        def client(number: int, ask=ask, found=found) -> None:
            for turn in range(max(1, turns // 10)):
                found.append(timed(lambda turn=turn: ask(100_000 + 1000 * number + turn)))

        threads = [threading.Thread(target=client, args=(n,)) for n in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        shown(f"{name}, ten clients", found)
    asking.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--live", default="", help="model whose live answers are timed")
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--no-index", action="store_true", help="leave the index out")
    given = parser.parse_args()
    if given.live:
        live(given.run, given.live, given.turns)
    else:
        pages(given.run, given.turns, not given.no_index)
