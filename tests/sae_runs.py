"""A small run for the tests of sparse autoencoders: made-up tokens, and models of width 32."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cratelm.corpus.documents import Document
from cratelm.models import build
from cratelm.records import Split
from cratelm.runs import Run
from cratelm.tokens.shards import StoreWriter, TokenSplit, TokenStore

VOCABULARY, USED, LENGTH, EOT = 101, 30, 16, 100
DOCUMENTS: dict[Split, int] = {"train": 60, "held_out": 24, "fit": 2}


def write_tokens(folder: Path) -> None:
    """Documents of 5 to 40 tokens of 30, in which a token is mostly followed by the next one."""
    names = [*(f" w{i}" for i in range(VOCABULARY - 1)), "<|endoftext|>"]
    tokenizer = Tokenizer(WordLevel({text: i for i, text in enumerate(names)}, names[0]))
    writer, rng = StoreWriter(folder, tokenizer, EOT), np.random.default_rng(3)
    for split, count in DOCUMENTS.items():
        for _ in range(count):
            ids = rng.integers(0, USED, rng.integers(5, 40))
            for place in np.flatnonzero(rng.uniform(size=len(ids) - 1) < 0.8):
                ids[place + 1] = (ids[place] + 1) % USED
            writer.append(split, ids.tolist(), Document("", "made up", "", 0, ""))
    writer.close()


def small_model(size: str, split: TokenSplit):
    """CRATE or GPT-2 of two layers, 32 wide, 128 neurons a layer, that has learnt what follows what."""
    with torch.random.fork_rng():
        torch.manual_seed(1)  # whatever ran before
        model = build(size, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, hidden_size=32)
    rows = np.stack([split.sequence(i, LENGTH)[:-1] for i in range(split.n_sequences(LENGTH))])
    ids = torch.from_numpy(rows)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(30):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def small_run(path: Path) -> Run:
    """Tokens, and the models crate and gpt2."""
    run = Run(path)
    with run.stage("tokens").write({}, {}) as draft:
        write_tokens(draft.path)
    split = TokenStore(run.path / "tokens").split("train")
    for name, size in (("crate", "crate-2l"), ("gpt2", "gpt2-2l")):
        with run.stage("model", name).write({}, {}) as draft:
            small_model(size, split).save_pretrained(draft.path)
    return run
