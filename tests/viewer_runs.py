"""A small run for the tests of the browser: twins and an untrained null, on a corpus that is half hostile."""

import json
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import harvest
from cratelm.activations.store import read_summaries
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.explain.store import read_explanations
from cratelm.replace.config import ReplaceConfig
from cratelm.replace.replace import replace
from cratelm.score.config import ScoreConfig
from cratelm.score.score import score
from cratelm.score.store import read_scores
from cratelm.steer.config import EffectsConfig
from cratelm.steer.effects import effects
from cratelm.text.claim import claim
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
    for name in ("crate-2l", "gpt2-2l"):
        replace(ReplaceConfig(
            run=path, model=name, explainers=("lookup", "trie"), tokens=600, neuron_tokens=0,
            curve_tokens=0, resamples=50, quiet=True,
        ))  # fmt: skip
    return path


def a_neuron(library, alive=True, explained=True) -> int:
    """Of layer 1 of crate-2l."""
    columns = library.table("run", "crate-2l")
    here = columns.rows_of(1)
    texts, maximum = columns.explanations[here], columns.maximum[here]
    return next(i for i in range(NEURONS) if bool(texts[i]) == explained and (maximum[i] > 0) == alive)  # fmt: skip


def brute(run, model="crate-2l", layer=1):
    """Rows of a layer from the readers of records: index, explanation, score, maximum, rate."""
    texts, best = {}, {}
    for e in sorted(read_explanations(run / "explanations" / model), key=lambda e: (e.explainer != "trie", e.explainer)):  # fmt: skip
        key, worth = (e.neuron.layer, e.neuron.index), e.claim_variance / (0.9 if e.explainer == "concepts" else 1)  # fmt: skip
        if worth > best.get(key, -1.0):
            texts[key], best[key] = claim(e.text), worth
    scores = {(s.neuron.layer, s.neuron.index): s.score.value for s in read_scores(run / "scores" / model) if (s.explainer, s.metric, s.control) == ("trie", "random_only", "none")}  # fmt: skip
    summaries = [s for s in read_summaries(run / "activations" / model, "held_out") if s.neuron.layer == layer]  # fmt: skip
    return [(s.neuron.index, texts.get((layer, s.neuron.index), ""), scores.get((layer, s.neuron.index)), s.maximum, s.firing_rate) for s in summaries]  # fmt: skip


class Parsed(HTMLParser):
    """Elements, references and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._data: list[str] = []
        self.feed(text)
        self.close()
        self.words = "".join(self._data)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self._data.append(data)
