"""A small run for the tests of sparse autoencoders: made-up tokens, and models of width 32."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cratelm.corpus.documents import Document
from cratelm.models import build
from cratelm.runs import Run
from cratelm.tokens.shards import StoreWriter

VOCABULARY, LENGTH, EOT = 101, 16, 100
DOCUMENTS = {"train": 60, "held_out": 24, "fit": 2}


def write_tokens(folder: Path) -> None:
    """Documents of 5 to 40 tokens, in which a token is often followed by the next one."""
    names = [*(f" w{i}" for i in range(VOCABULARY - 1)), "<|endoftext|>"]
    tokenizer = Tokenizer(WordLevel({text: i for i, text in enumerate(names)}, names[0]))
    writer, rng = StoreWriter(folder, tokenizer, EOT), np.random.default_rng(3)
    for split, count in DOCUMENTS.items():
        for _ in range(count):
            ids = rng.integers(0, VOCABULARY - 1, rng.integers(5, 40))
            follows = np.flatnonzero(rng.uniform(size=len(ids) - 1) < 0.5)
            ids[follows + 1] = (ids[follows] + 1) % (VOCABULARY - 1)
            writer.append(split, ids.tolist(), Document("", "made up", "", 0, ""))
    writer.close()


def small_model(name: str, seed: int = 0):
    """CRATE or GPT-2 of two layers, 32 wide, 128 neurons a layer, with activations well off 0."""
    model = build(
        name, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, hidden_size=32, seed=seed
    ).eval()
    embedding = model.get_input_embeddings().weight
    embedding.data.mul_(20)
    return model


def small_run(path: Path) -> Run:
    """Tokens, and the models crate and gpt2."""
    run = Run(path)
    with run.stage("tokens").write({}, {}) as draft:
        write_tokens(draft.path)
    for name, size in (("crate", "crate-2l"), ("gpt2", "gpt2-2l")):
        with run.stage("model", name).write({}, {}) as draft:
            small_model(size).save_pretrained(draft.path)
    return run
