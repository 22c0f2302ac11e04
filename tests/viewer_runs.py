"""A small run for the tests of the browser: twins and an untrained null, on a corpus that is half hostile."""

import json
import random
from pathlib import Path
from typing import Any

from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import harvest
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.score.config import ScoreConfig
from cratelm.score.score import score
from cratelm.steer.config import EffectsConfig
from cratelm.steer.effects import effects
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.tokenize import tokenize
from cratelm.train.config import TrainConfig
from cratelm.train.loop import train

HOSTILE = (
    "<script>alert('corpus')</script>",
    "</textarea><img src=x onerror=alert(1)>",
    "\x1b[31mred\x1b[0m",
    "\u202eright to left\u202c",
    "\x00NUL",
    "אבג مرحبا",
    "{{ 7 * 7 }}{% raw %}",
    "&amp;&lt;",
    "naïve 🙂",
    "\n\t  x",
)
MODELS = ("crate-2l", "gpt2-2l", "crate-2l-init")
LAYERS, NEURONS = 2, 64


def small_run(folder: Path) -> Path:
    """The run; also a line of 20,000 characters in the corpus."""
    draw = random.Random(0)
    words = [*HOSTILE, "red", "blue", "stone", "river", "the", "import", "def f(x):", "return"]
    corpus = folder / "corpus.jsonl"
    with corpus.open("w", encoding="utf-8") as file:
        for number in range(140):
            text = " ".join(draw.choices(words, k=draw.randint(10, 40)))
            text = "long " * 4000 if number == 7 else text
            file.write(json.dumps({"text": text}) + "\n")
    path = folder / "run"
    tokenize(TokenizeConfig(run=path, corpus=str(corpus), vocab_size=420, sequence_length=16, fit=0.3, held_out=0.3, quiet=True))  # fmt: skip
    for name in MODELS:
        small: dict[str, Any] = {"sequence_length": 64, "validation_sequences": 8, "batch_size": 4}
        steps = 0 if name.endswith("-init") else 8
        train(TrainConfig(
            run=path, model=name.removesuffix("-init"), steps=steps, validate_every=4, quiet=True,
            tensorboard=False, model_overrides=("hidden_size=16", "num_attention_heads=2"), **small,
        ))  # fmt: skip
        harvest(HarvestConfig(run=path, model=name, tokens=2500, pilot_tokens=256, device="cpu"))
        explain(ExplainConfig(run=path, model=name, neurons=40, quiet=True))
        score(ScoreConfig(run=path, model=name, resamples=100, quiet=True))
    effects(EffectsConfig(run=path, model="crate-2l", tokens=300, quiet=True))
    return path
