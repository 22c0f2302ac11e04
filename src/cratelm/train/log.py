"""Curves of a training run: JSON lines, which are identical for two equal runs, and views of them.

metrics.jsonl   step, tokens, loss, learning_rate, gradient_norm; validation_loss and its error
timing.jsonl    tokens per second (differs from run to run: not part of the stage's identity)
tensorboard/    both, with --tensorboard
wandb/          both, with --wandb
loss.png        loss over tokens
"""

import json
import time
from pathlib import Path
from typing import Any

from cratelm.errors import missing_extra
from cratelm.runs import atomic_path
from cratelm.runs.reading import read_json_lines

METRICS, TIMING, TENSORBOARD, FIGURE = "metrics.jsonl", "timing.jsonl", "tensorboard", "loss.png"
WANDB = "wandb"  # wandb's own name for its folder
UNHASHED = (TIMING, TENSORBOARD, WANDB)


class Log:
    """Writer of one step's figures at a time; without a folder (ranks but the first) it writes nothing.

    Lines after `step`, written by an attempt that was killed, are dropped: they will be written again.
    """

    def __init__(
        self, folder: Path | None, step: int, *, tensorboard: bool, wandb_name: str | None
    ):
        self.folder, self._writer, self._wandb = folder, None, None
        self._before, self._tokens_before = time.monotonic(), None
        if folder is None:
            return
        for name in (METRICS, TIMING):
            _truncate(folder / name, step)
        if tensorboard:
            self._writer = import_tensorboard()(str(folder / TENSORBOARD), purge_step=step + 1)
        if wandb_name:
            self._wandb = import_wandb().init(project="cratelm", name=wandb_name, dir=str(folder))

    def write(self, step: int, tokens: int, **figures: float) -> None:
        """Append the figures after `step` steps and `tokens` tokens."""
        self._line(METRICS, {"step": step, "tokens": tokens, **figures})
        self._show(step, figures)

    def time(self, step: int, tokens: int) -> None:
        """Append the tokens per second since the last call."""
        now = time.monotonic()
        if self._tokens_before is not None:
            speed = round((tokens - self._tokens_before) / max(now - self._before, 1e-9), 1)
            self._line(TIMING, {"step": step, "tokens_per_s": speed})
            self._show(step, {"tokens_per_s": speed})
        self._before, self._tokens_before = now, tokens

    def close(self) -> None:
        """Finish the views of the curves."""
        if self._writer:
            self._writer.close()
        if self._wandb:
            self._wandb.finish()

    def _line(self, name: str, value: dict[str, Any]) -> None:
        if self.folder is not None:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(value) + "\n")

    def _show(self, step: int, figures: dict[str, float]) -> None:
        if self._writer:
            for key, value in figures.items():
                self._writer.add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log(figures, step=step)


def read_metrics(folder: str | Path, name: str = METRICS) -> list[dict[str, Any]]:
    """Return the lines of a curve file in order of steps, without an unfinished last line."""
    path = Path(folder) / name
    return read_json_lines(path) if path.is_file() else []


def last(metrics: list[dict[str, Any]], key: str) -> float | None:
    """Return the last value of `key`, or None if no line has it."""
    return next((line[key] for line in reversed(metrics) if key in line), None)


def draw(folder: Path, title: str) -> None:
    """Draw `loss.png`: training and validation loss over tokens."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    metrics = read_metrics(folder)
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for key, style in (
        ("loss", {"color": "0.6", "linewidth": 0.8, "label": "train"}),
        ("validation_loss", {"color": "C0", "marker": "o", "markersize": 3, "label": "held out"}),
    ):
        points = [(line["tokens"], line[key]) for line in metrics if key in line]
        axes.plot(*zip(*points, strict=True), **style) if points else None
    axes.set(xlabel="tokens", ylabel="loss, nats per token", title=title)
    axes.legend(frameon=False)
    figure.savefig(folder / FIGURE)


def _truncate(path: Path, step: int) -> None:
    lines = [line for line in read_metrics(path.parent, path.name) if line["step"] <= step]
    with atomic_path(path) as temporary:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        temporary.write_text(text, encoding="utf-8")


def import_tensorboard() -> Any:
    """Return TensorBoard's writer class. Raises `InputError`, which names the extra, if it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow to import
    except ImportError:
        otherwise = ", or omit the option: the curves are also in metrics.jsonl and loss.png"
        raise missing_extra("tensorboard", "--tensorboard", "tensorboard", otherwise) from None
    return SummaryWriter


def import_wandb() -> Any:
    """Return the package wandb. Raises `InputError`, which names the extra, if it is missing."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise missing_extra("wandb", "--wandb", "wandb", ", or omit the option") from None
    return wandb
