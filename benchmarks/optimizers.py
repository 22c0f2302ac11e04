"""Tokens that the Muon recipe needs to reach AdamW's validation loss, with AdamW at its own best rate of three.

    python benchmarks/optimizers.py                              # CRATE and GPT-2, one layer, built-in corpus
    python benchmarks/optimizers.py --models crate-2l gpt2-2l --steps 600

AdamW trains for `--steps` steps at each of three learning rates, each with its whole schedule; the lowest final
validation loss counts. Muon, at the recipe's one rate, trains for fewer steps, each time from the beginning and with its
whole schedule, because the loss falls most at the end of one: the ratio is that of the fewest steps with which it
reaches AdamW's loss. All see the same tokens in the same order. The result depends on losses, not on the machine's speed.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import figures

from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.tokenize import tokenize
from cratelm.train.config import TrainConfig
from cratelm.train.log import read_metrics
from cratelm.train.loop import train

RATES = (1e-3, 3e-3, 1e-2)
"""of AdamW; the middle one is the laptop recipe's"""


def final_loss(
    run: Path,
    model: str,
    optimizer: str,
    rate: float | None,
    steps: int,
    options: argparse.Namespace,
) -> tuple[float, float]:
    """Train from the beginning; return the last validation loss in nats and its standard error."""
    config = TrainConfig(
        run=run,
        model=model,
        name=f"{model}-{optimizer}-{rate}-{steps}",
        recipe="laptop",
        optimizer=optimizer,  # pyright: ignore[reportArgumentType]
        learning_rate=rate,
        steps=steps,
        batch_size=options.batch,
        micro_batch_size=options.batch,
        sequence_length=options.length,
        validate_every=steps,
        validation_sequences=options.validation,
        checkpoint_every=steps,
        quiet=True,
        device="cpu",
    )
    last = read_metrics(train(config).path)[-1]
    loss, error = last["validation_loss"], last["validation_standard_error"]
    print(f"{config.name}: {loss:.4f} +- {error:.4f}", flush=True)
    return loss, error


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["crate-1l", "gpt2-1l"])
    parser.add_argument("--corpus", default="builtin")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=400, help="steps of AdamW")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--validation", type=int, default=128, help="sequences")
    parser.add_argument(
        "--fractions", type=float, nargs="+", default=[1 / 2, 1 / 1.75, 1 / 1.5, 1 / 1.25]
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        tokenize(
            TokenizeConfig(
                run=run, corpus=options.corpus, vocab_size=options.vocab_size, quiet=True
            )
        )
        for model in options.models:
            adamw = {
                rate: final_loss(run, model, "adamw", rate, options.steps, options)
                for rate in RATES
            }
            best = min(adamw, key=lambda rate: adamw[rate][0])
            muon: dict[int, tuple[float, float]] = {}
            for fraction in sorted(options.fractions):
                steps = round(fraction * options.steps)
                muon[steps] = final_loss(run, model, "muon", None, steps, options)
                if muon[steps][0] <= adamw[best][0]:
                    break
            reached = [steps for steps, (loss, _) in muon.items() if loss <= adamw[best][0]]
            ratio = options.steps / reached[0] if reached else None
            shown = f"{ratio:.2f} times fewer" if ratio else "does not reach it"
            print(f"{model}: AdamW's best at {best:g}; Muon's tokens: {shown}", flush=True)
            figures(
                model=model,
                steps=options.steps,
                tokens_per_step=options.batch * options.length,
                adamw={str(rate): loss for rate, loss in adamw.items()},
                muon={str(steps): loss for steps, loss in muon.items()},
                ratio=ratio,
            )


if __name__ == "__main__":
    main()
