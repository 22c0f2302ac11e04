"""Loss of a model on a split of a run's tokens.

The split is cut into sequences of T tokens as in training; the last one is shorter. Every token but
the first of the split is predicted exactly once, from what precedes it in its sequence, which may
include the end of another document.

Shape legend: B sequences, T tokens of a sequence, N predicted tokens, C documents.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch.nn import functional as F
from tqdm import tqdm

from cratelm.errors import InputError
from cratelm.evaluate.config import EvaluateConfig
from cratelm.models import load
from cratelm.runs import Run, write_json
from cratelm.tokens.shards import TokenSplit, TokenStore, check_vocabulary

NO_LIMIT = 1024
"""sequence length, in tokens, for models that name no longest one"""


@dataclass(frozen=True)
class EvaluateResult:
    """Figures of one model on one split."""

    model: str
    split: str
    tokens: int
    """tokens predicted, <|endoftext|> included"""
    documents: int
    """documents that they belong to"""
    sequence_length: int
    loss: float
    """nats a token"""
    standard_error: float | None
    """of the loss, over documents: tokens of one document are not independent (ratio estimator;
    Cochran 1977, Sampling Techniques, section 6.4); None for a single document"""
    perplexity: float
    bits_per_byte: float | None
    """of UTF-8 text, the bits of <|endoftext|> included; None for a text without a byte"""
    accuracy: float
    """part of the tokens that the model held for likeliest"""

    def __str__(self) -> str:
        rows = {
            "tokens": f"{self.tokens:,} in {self.documents:,} documents, T = {self.sequence_length}",
            "loss": f"{self.loss:.4f} nats a token"
            + (
                ""
                if self.standard_error is None
                else f" (standard error {self.standard_error:.4f})"
            ),
            "perplexity": f"{self.perplexity:.2f}",
            "bits per byte": "none" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f}",
            "top-1 accuracy": f"{self.accuracy:.2%}",
        }
        lines = [f"{self.model} on {self.split}"]
        return "\n".join(lines + [f"  {name:<15} {value}" for name, value in rows.items()])


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Measures a model of a run, or any other with the same tokenizer.

    Raises `InputError` where model or tokens are missing, do not belong together, or are too few.
    """
    run = Run(config.run)
    run.stage("tokens").require("tokenize")
    store = TokenStore(run.stage("tokens").path)
    model = _model(config, run, store)
    split, length = store.split(config.split), _sequence_length(config, model)
    if split.n_tokens < 2:
        raise InputError(f"the {config.split} split has {split.n_tokens} tokens, 2 were expected")
    n = min(split.n_tokens - 1, config.max_tokens or split.n_tokens)
    losses, hits = _losses(model, split, n, length, config)
    result = EvaluateResult(
        model=config.path or config.model,
        split=config.split,
        tokens=n,
        sequence_length=length,
        accuracy=float(hits.mean()),
        bits_per_byte=_bits_per_byte(losses, split.read(1, n + 1), store),
        **_mean_over_documents(losses, split),
    )
    if config.output is not None:
        write_json(config.output, asdict(result))
    return result


def _model(config: EvaluateConfig, run: Run, store: TokenStore) -> Any:
    stage = run.stage("model", config.model)
    if config.path is None:
        stage.require("train")
    source = stage.path if config.path is None else config.path
    model: Any = load(source)
    check_vocabulary(store, model.config.get_text_config().vocab_size)
    own = Path(source) / "tokenizer.json"
    if own.is_file() and Tokenizer.from_file(str(own)).get_vocab() != store.tokenizer.get_vocab():
        raise InputError(
            f"{own} is another tokenizer than that of the run {run.path}:"
            " name a model trained on these tokens, or another --run"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _sequence_length(config: EvaluateConfig, model: Any) -> int:
    most = getattr(model.config, "max_position_embeddings", None)
    if config.sequence_length and most and config.sequence_length > most:
        raise InputError(
            f"--sequence-length is {config.sequence_length}, the model takes {most} tokens at most"
        )
    return config.sequence_length or most or NO_LIMIT


def _losses(
    model: Any, split: TokenSplit, n: int, length: int, config: EvaluateConfig
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Loss of tokens 1..n of the split [N] in nats, and whether each was the likeliest [N]."""
    losses, hits = np.empty(n, np.float32), np.empty(n, bool)
    with tqdm(total=n, desc="evaluate", unit="token", unit_scale=True, disable=config.quiet) as bar:
        for start, rows in _batches(split, n, length, config.batch_size):
            tokens = torch.from_numpy(rows).to(model.device)  # [B, T + 1]
            batch_losses, batch_hits = _token_losses(model, tokens[:, :-1], tokens[:, 1:])
            stop = start + batch_losses.numel()
            losses[start:stop] = batch_losses.flatten().cpu().numpy()
            hits[start:stop] = batch_hits.flatten().cpu().numpy()
            bar.update(stop - start)
    return losses, hits


@torch.no_grad()
def _token_losses(
    model: Any, tokens: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each target in nats [B, T], and whether it was the likeliest token [B, T]."""
    logits = model(input_ids=tokens, use_cache=False).logits  # [B, T, V]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.view_as(targets), logits.argmax(-1) == targets


def _batches(
    split: TokenSplit, n: int, length: int, batch_size: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """First position and tokens [B, T + 1] of each batch; the last sequence comes alone, shorter."""
    whole = n // length
    for first in range(0, whole, batch_size):
        rows = [split.sequence(i, length) for i in range(first, min(first + batch_size, whole))]
        yield first * length, np.stack(rows)
    if n % length:
        yield whole * length, split.read(whole * length, n + 1)[None]


def _mean_over_documents(losses: NDArray[np.float32], split: TokenSplit) -> dict[str, Any]:
    """Loss, its standard error over documents, and perplexity; loss i belongs to token i + 1."""
    positions = np.arange(1, len(losses) + 1)
    document = np.searchsorted(split.starts, positions, side="right") - 1  # [N]
    _, document = np.unique(document, return_inverse=True)
    sums = np.bincount(document, weights=losses)  # [C] nats
    counts = np.bincount(document)  # [C] tokens
    mean, n_documents = sums.sum() / counts.sum(), len(counts)
    error = None
    if n_documents > 1:
        residuals = sums - mean * counts
        spread = n_documents / (n_documents - 1) * (residuals**2).sum()
        error = float(np.sqrt(spread) / counts.sum())
    return {
        "loss": float(mean),
        "standard_error": error,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "documents": n_documents,
    }


def _bits_per_byte(
    losses: NDArray[np.float32], targets: NDArray[np.int64], store: TokenStore
) -> float | None:
    """Total bits over the bytes of the predicted text.

    In a byte-level BPE each character of a token's name stands for one byte; special tokens, of which
    <|endoftext|> alone is in the shards, are no text.
    """
    sizes = np.zeros(store.vocab_size, np.int64)  # [V] bytes
    for name, token in store.tokenizer.get_vocab().items():
        sizes[token] = len(name)
    sizes[store.eot_id] = 0
    n_bytes = int(sizes[targets].sum())
    return float(losses.sum(dtype=np.float64) / math.log(2) / n_bytes) if n_bytes else None
