"""Random tokens, timers and peak memory for the benchmarks."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cratelm.corpus.documents import Document
from cratelm.records import NeuronId, NeuronSummary
from cratelm.runs import Run

if TYPE_CHECKING:
    from cratelm.tokens.shards import TokenSplit

T = TypeVar("T")
CPU = torch.device("cpu")


FIGURES = "figures "
"""before the JSON of a result among the lines that a benchmark prints: `bench.py` collects them"""


def figures(**values: Any) -> None:
    """Print the figures of a result as a line of JSON."""
    print(FIGURES + json.dumps(values), flush=True)


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device = CPU) -> float:
    """Return the seconds that `work` takes on a device."""
    return timed_result(work, device)[0]


def timed_result(work: Callable[[], T], device: torch.device = CPU) -> tuple[float, T]:
    """Return the seconds that `work` takes on a device, and its result."""
    synchronise(device)
    start = time.perf_counter()
    result = work()
    synchronise(device)
    return time.perf_counter() - start, result


def peak_memory(work: Callable[[], Any], device: torch.device = CPU) -> int:
    """Return the most bytes that `work` has in use at once beyond those in use before it; 0 where it is unknown.

    On CPU this is the process's largest resident set, which Linux records and resets: memory that was freed
    before and not returned to the system is used again unseen, so that small figures are too small.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    status = Path("/proc/self/status")
    if not status.is_file():
        work()
        return 0

    def kib(name: str) -> int:
        return int(status.read_text().split(f"{name}:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    before = kib("VmRSS")
    work()
    return (kib("VmHWM") - before) * 1024


class _RandomSplit:
    """Stands in for a `TokenSplit`: random tokens in documents of about 1,000 tokens."""

    name = "held_out"

    def __init__(self, n_tokens: int, vocabulary: int):
        generator = np.random.default_rng(0)
        self.n_tokens = n_tokens
        self.tokens = generator.integers(1, vocabulary, n_tokens)  # 0 is the end-of-text token
        ends = np.sort(generator.choice(n_tokens - 1, n_tokens // 1000, replace=False))
        self.starts = np.unique(np.concatenate([[0], ends + 1, [n_tokens]]))
        self.n_documents = len(self.starts) - 1
        self.ordinals = np.arange(self.n_documents)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]

    def n_sequences(self, length: int) -> int:
        return (self.n_tokens - 1) // length

    def sequence(self, index: int, length: int) -> np.ndarray:
        return self.tokens[index * length : (index + 1) * length + 1]

    def documents_at(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, positions, side="right") - 1


def random_split(n_tokens: int, vocabulary: int) -> "TokenSplit":
    """Return a split of random tokens below `vocabulary`, without end-of-text tokens."""
    return cast("TokenSplit", _RandomSplit(n_tokens, vocabulary))


def random_run(path: Path, vocabulary: int, n_tokens: int) -> Run:
    """Write a run of random tokens, with one document of `n_tokens` in each of the splits train and held-out."""
    from cratelm.tokens.shards import StoreWriter  # imports pyarrow, which gpu.sh does without

    run, generator = Run(path), np.random.default_rng(0)
    tokens = ["<|endoftext|>", *(f"t{i}" for i in range(1, vocabulary))]
    tokenizer = Tokenizer(WordLevel({t: i for i, t in enumerate(tokens)}, tokens[0]))
    with run.stage("tokens").write({}, {}) as draft:
        writer = StoreWriter(draft.path, tokenizer, eot_id=0)
        for split in ("train", "held_out"):
            ids = generator.integers(1, vocabulary, n_tokens).tolist()
            writer.append(split, ids, Document("", "random", "", 0, ""))
        writer.close()
    return run


def neuron_summary(neuron: NeuronId, n_tokens: int, maximum: float) -> NeuronSummary:
    """Return made-up statistics of a neuron: benchmarks need the columns, not their values."""
    return NeuronSummary(
        neuron=neuron,
        n_tokens=n_tokens,
        mean=0.1,
        variance=1.0,
        skew=1.0,
        kurtosis=3.0,
        firing_rate=0.1,
        maximum=maximum,
        histogram=np.zeros(64, np.int64),
        histogram_low=0.0,
        histogram_high=maximum,
        openai_edges=np.zeros(6, np.float32),
        anthropic_edges=np.zeros(13, np.float32),
    )
