"""Next-token predictions side by side: the numbers, the text that is read, the page."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from cratelm.errors import InputError
from cratelm.evaluate.config import PredictConfig
from cratelm.evaluate.predict import PredictResult, predict
from cratelm.evaluate.predict_view import level, percent
from cratelm.models import build, load
from cratelm.text.display import laid_out, visible
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.shards import TokenStore
from cratelm.tokens.tokenize import tokenize
from cratelm.tokens.tokenizer import hf_tokenizer, train_tokenizer
from cratelm.train.config import TrainConfig
from cratelm.train.loop import train

T = 32


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two small models that read documents of two lines each."""
    folder = tmp_path_factory.mktemp("predict")
    words, draw = ["red", "blue", "größer", "stone", "the", "été"], random.Random(1)
    with (folder / "corpus.jsonl").open("w") as file:
        for i in range(150):
            text = " ".join(draw.choices(words, k=draw.randint(5, 40)))
            file.write(json.dumps({"text": f"{i} \n{text}", "meta": {}}) + "\n")
    tokenize(
        TokenizeConfig(
            run=folder / "run", corpus=str(folder / "corpus.jsonl"), vocab_size=300, quiet=True
        )
    )
    for name in ("crate-1l", "gpt2-1l"):
        train(
            TrainConfig(
                run=folder / "run",
                model=name,
                steps=3,
                batch_size=4,
                sequence_length=T,
                validation_sequences=4,
                model_overrides=("hidden_size=32", "num_attention_heads=2"),
                tensorboard=False,
                quiet=True,
            )
        )
    return folder / "run"


def show(run: Path, tmp_path: Path, **fields: Any) -> PredictResult:
    given = {"models": ("crate-1l", "gpt2-1l"), "out": tmp_path / "page.html", **fields}
    return predict(PredictConfig(run=run, **given))


class Page(HTMLParser):
    """What a browser would take from a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_numbers_are_those_of_the_model(run: Path, tmp_path: Path) -> None:
    text = "the red stone été"
    result = show(run, tmp_path, text=text, top=4)
    assert [p.model for p in result.predictions] == ["crate-1l", "gpt2-1l"]
    for found in result.predictions:
        store = TokenStore(run / "tokens")
        ids = store.tokenizer.encode(text).ids
        with torch.no_grad():
            model = load(run / "model" / found.model)
            rows = model(input_ids=torch.tensor([[store.eot_id, *ids]])).logits[0].softmax(-1)
        names = store.decode_tokens(ids)
        for place, step in enumerate(found.steps):
            probability = float(rows[place, ids[place]])
            assert step.token == names[place]
            assert step.probability == pytest.approx(probability, rel=1e-4)
            assert step.rank == 1 + int((rows[place] > probability * (1 + 1e-6)).sum())
        assert len(found.steps) == len(ids)
        best = rows[-1].topk(4)
        assert [c.probability for c in found.after] == pytest.approx(best.values.tolist(), rel=1e-4)
        losses = [-math.log(s.probability) for s in found.steps]
        assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        bits = sum(losses) / math.log(2) / len(text.encode())
        assert found.bits_per_byte == pytest.approx(bits, rel=1e-4)
    a, b = result.predictions
    assert a.after != b.after


def test_a_document_of_the_held_out_split_is_drawn(run: Path, tmp_path: Path) -> None:
    result = show(run, tmp_path, tokens=9)
    assert result.text == show(run, tmp_path, tokens=9).text
    number = int(re.search(r"Document (\d+) of held_out \(.*corpus.jsonl", result.text.origin)[1])
    assert "drawn with seed 0: its first 9 of" in result.text.origin
    store = TokenStore(run / "tokens")
    split = store.split("held_out")
    start = int(split.starts[number])
    whole = store.tokenizer.decode(list(split.read(start, int(split.starts[number + 1]) - 1)))
    assert result.text.text == store.tokenizer.decode(list(split.read(start, start + 9)))
    assert len(result.predictions[0].steps) == 9
    assert whole.startswith(result.text.text + result.text.continuation)
    assert result.text.continuation
    drawn = {show(run, tmp_path, tokens=2, seed=seed).text.origin for seed in range(5)}
    assert len(drawn) > 1


def test_a_document_can_be_chosen_and_is_cut_to_what_the_models_take(
    run: Path, tmp_path: Path
) -> None:
    split = TokenStore(run / "tokens").split("fit")
    lengths = split.starts[1:] - split.starts[:-1]
    longest = int(lengths.argmax())
    assert lengths[longest] > T
    result = show(run, tmp_path, document=longest, split="fit", tokens=1000)
    assert f"Document {longest} of fit" in result.text.origin
    assert "drawn" not in result.text.origin
    assert len(result.predictions[0].steps) == T - 1  # and the token that texts begin with
    short = show(run, tmp_path, document=int(lengths.argmin()), split="fit", tokens=1000)
    assert len(short.predictions[0].steps) == lengths.min() - 1  # its end is not part of the text
    assert short.text.continuation == ""


def test_a_text_of_ones_own_is_shown_whole(run: Path, tmp_path: Path) -> None:
    result = show(run, tmp_path, text="Q" * (T - 1), tokens=3)
    assert [len(p.steps) for p in result.predictions] == [T - 1, T - 1]


def test_models_read_in_their_own_tokens(run: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["the stone the stone"] * 3, 265)
    size = max(tokenizer.get_vocab().values()) + 1
    shape: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2}
    other = tmp_path / "other"
    build("gpt2-1l", vocab_size=size, max_position_embeddings=T, **shape).save_pretrained(other)
    hf_tokenizer(tokenizer).save_pretrained(other)
    models = ("crate-1l", str(other), "gpt2-1l")
    result = show(run, tmp_path, models=models, text="the blue stone")
    counts = [len(p.steps) for p in result.predictions]
    assert counts[0] == counts[2] != counts[1]
    assert "".join(s.token for s in result.predictions[1].steps) == "the blue stone"
    page = Page(result.page.read_text())
    order = [page.text.index(f"{name} {n} tokens") for name, n in zip(models, counts, strict=True)]
    assert order[0] < order[2] < order[1]  # those of the same tokens stand together


@pytest.mark.parametrize("text", ["<script>x()</script>", "\x1b[31m\u202e\"'&lt;</title>"])
def test_nothing_in_a_text_acts_on_the_page(run: Path, tmp_path: Path, text: str) -> None:
    result = show(run, tmp_path, text=text)
    html = result.page.read_text()
    page = Page(html)
    assert "script" not in page.tags
    assert not {name for name, _ in page.attributes if name.startswith("on")}
    assert not {name for name, _ in page.attributes} & {"src", "href"}
    assert visible(text) in page.text
    for acting in ("\x1b", "\u202e"):
        assert acting not in html
        assert acting not in str(result)


def test_the_page_shows_every_token_and_what_was_expected(run: Path, tmp_path: Path) -> None:
    result = show(run, tmp_path, text="the red stone\nété")
    page = Page(result.page.read_text())
    for found in result.predictions:
        assert f"{found.loss:.3f} nats per token" in page.text
        for step in found.steps:
            assert f"{found.model}: {percent(step.probability)}, rank {step.rank:,}" in page.text
            for candidate in (*step.expected, *found.after):
                assert visible(candidate.token) in page.text
                assert percent(candidate.probability) in page.text
    shades = [v for n, v in page.attributes if n == "class" and v and re.fullmatch(r"s\d", v)]
    expected = [f"s{level(s.probability)}" for p in result.predictions for s in p.steps]
    assert shades[-len(expected) :] == expected
    assert f"next: {visible(result.predictions[0].after[0].token)}" in str(result)


def test_a_token_that_came_is_marked_among_the_expected(run: Path, tmp_path: Path) -> None:
    result = show(run, tmp_path, text="the red stone", top=300)
    hits = [v for n, v in Page(result.page.read_text()).attributes if (n, v) == ("class", "hit")]
    groups, steps = 2, len(result.predictions[0].steps)  # each group's text shows both models
    assert len(hits) == groups * 2 * steps


def test_figures_are_written_and_the_same_text_gives_the_same_bytes(
    run: Path, tmp_path: Path
) -> None:
    first = show(run, tmp_path, text="the red $stone$ \u65e5\u672c")
    assert [p.name for p in first.figures] == ["page.png", "page.pdf"]
    png, pdf = (p.read_bytes() for p in first.figures)
    assert png.startswith(b"\x89PNG")
    assert pdf.startswith(b"%PDF")
    again = show(run, tmp_path / "again", text="the red $stone$ \u65e5\u672c")
    assert [p.read_bytes() for p in again.figures] == [png, pdf]
    other = show(run, tmp_path / "other", text="the blue $stone$ \u65e5\u672c")
    assert other.figures[0].read_bytes() != png


def test_a_file_is_read_and_the_page_lies_in_the_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the red stone")
    result = show(run, tmp_path, text_file=tmp_path / "text.txt", out=None)
    assert result.page == run / "predictions.html"
    assert result.text.text == "the red stone"
    for path in (result.page, *result.figures):
        path.unlink()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text": ""}, "the text has 0 tokens for crate-1l, which accepts 1 to 31"),
        ({"text": "Q" * T}, "the text has 32 tokens for crate-1l, which accepts 1 to 31"),
        ({"text": "a", "document": 1}, "--text and --document cannot be combined"),
        ({"document": 1000}, "--document is 1000, but the held_out split has"),
        ({"text_file": Path("/nowhere.txt")}, "/nowhere.txt: cannot be read"),
        ({"models": ()}, "--models is empty"),
        ({"models": ("crate-9l",)}, "cratelm train"),
        ({"top": 0}, "--top must be at least 1, not 0"),
        ({"split": "test"}, "--split is 'test'"),
        ({"out": Path("page.htm")}, r"must end in \.html"),
    ],
)
def test_mistakes_say_what_to_type_and_leave_nothing(
    run: Path, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        show(run, tmp_path, **fields)
    assert not list(tmp_path.iterdir())


def test_marks() -> None:
    assert visible(" a\n\tb\r") == "␣a⏎⇥b\\r"
    assert visible("\u0301x\u200b\x00") == "◌\u0301x\\u200b\\x00"
    assert laid_out(" a\n\tb\x1b") == " a⏎\n\tb\\x1b"
    assert [level(p) for p in (0, 0.001, 0.09, 0.1, 0.95)] == [0, 1, 4, 5, 7]
    assert [percent(p) for p in (0.384, 0.021, 0.0003, 1e-6)] == ["38%", "2.1%", "0.03%", "<0.01%"]
