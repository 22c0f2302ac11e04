"""Report: the page says what the files say, runs nothing, loads nothing, and lives with what is missing."""

import csv
import html
import json
import random
import re
import shlex
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_llm import FakeModel
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure as Canvas
from tiny_run import SOURCE, reseal

from cratelm import cli
from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import harvest
from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.explain.store import read_explanations
from cratelm.models import load
from cratelm.records import CHANCE, METRICS, SIMULATION_METRICS, Estimate, Interval
from cratelm.report import gallery
from cratelm.report.cells import METRIC_NAMES, chance_of
from cratelm.report.config import ReportConfig
from cratelm.report.report import ReportResult, comparison_table, report
from cratelm.report.sections import all_tokens, overview
from cratelm.report.sections.scores import model_comparison_table
from cratelm.results.run_results import read_results
from cratelm.results.scores import read_score_summary
from cratelm.runs import Run, config_dict
from cratelm.score.config import ScoreConfig
from cratelm.score.score import score
from cratelm.score.store import read_scores, read_token_shares, read_whole_scores
from cratelm.steer.store import LOGIT_EFFECTS
from cratelm.text.display import printable, visible
from cratelm.text.shading import shaded_html
from cratelm.text.table import Column, Table
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.tokenize import tokenize
from cratelm.train.config import TrainConfig
from cratelm.train.loop import train

HOSTILE = (
    "<script>document.title='owned'</script>",
    "<img src=http://evil.example/x onerror=alert(1)>",
    "</div></details></body>",
    "\x1b[31mred\x1b[0m",
    "\u202egnihtemos\u202c",
    "שלום עולם",
    "nul\x00nul",
    "{{ 7 * 7 }}{% raw %}",
    "&amp;&lt;",
    "naïve 🙂 ",
    "\n\t  x",
    "$\\alpha_1$ & % # ~ ^",
)
MODELS = ("crate-2l", "gpt2-2l", "crate-2l-init")
SETTINGS: dict[str, Any] = {"neurons": 4, "resamples": 200}
TINY = ("hidden_size=16", "num_attention_heads=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that went down the whole line: twins and one null, on a corpus that is half hostile."""
    folder = tmp_path_factory.mktemp("report")
    draw = random.Random(0)
    words = [*HOSTILE, "red", "blue", "stone", "river", "the", "over", "def f(x):", "return"]
    with (folder / "corpus.jsonl").open("w") as file:
        for _ in range(160):
            text = " ".join(draw.choices(words, k=draw.randint(10, 40)))
            file.write(json.dumps({"text": text}) + "\n")
    path = folder / "run"
    corpus = {"corpus": str(folder / "corpus.jsonl"), "vocab_size": 400, "sequence_length": 16}
    tokenize(TokenizeConfig(run=path, fit=0.3, held_out=0.3, quiet=True, **corpus))
    for name in MODELS:
        _measure(path, name)
    return path


def _measure(path: Path, name: str) -> None:
    """From training to scores, in a few seconds."""
    base, steps = name.removesuffix("-init"), 0 if name.endswith("-init") else 6
    small: dict[str, Any] = {"sequence_length": 32, "validation_sequences": 8, "validate_every": 3}
    train(
        TrainConfig(
            run=path,
            model=base,
            steps=steps,
            batch_size=4,
            model_overrides=TINY,
            tensorboard=False,
            quiet=True,
            **small,
        )
    )
    harvest(HarvestConfig(run=path, model=name, tokens=2000, pilot_tokens=256, device="cpu"))
    explain(ExplainConfig(run=path, model=name, neurons=24, quiet=True))
    score(ScoreConfig(run=path, model=name, resamples=100, quiet=True))


@pytest.fixture(scope="module")
def written(run) -> ReportResult:
    return report(ReportConfig(**SETTINGS, run=run))


@pytest.fixture(scope="module")
def page(written) -> "Page":
    return Page(written.page.read_text(encoding="utf-8"))


def _copy(run: Path, folder: Path, *without: str) -> Path:
    path = folder / "copy"
    shutil.copytree(run, path)
    for name in without:
        shutil.rmtree(path / name)
    return path


class Page(HTMLParser):
    """Tables, names and references of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words = ""
        self._table: list[list[str]] | None = None
        self._in_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag == "table":
            self._table = self.tables.setdefault(dict(attrs)["id"] or "", [])
        elif self._table is not None and tag == "tr":
            self._table.append([])
        elif self._table is not None and tag in ("td", "th"):
            self._table[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        if tag == "table":
            self._table = None
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        self.words += data
        if self._table and self._in_cell:
            self._table[-1][-1] += data.replace("\xa0", " ")


def _numbers(shown: str) -> list[float]:
    """Figures in a cell as it is shown."""
    return [float(n.replace(",", "")) for n in re.findall(r"-?[\d,]*\.?\d+(?:e-?\d+)?", shown)]


def _figures(cell: Any) -> list[float]:
    """Figures in a cell of tables.json, in the order in which they are shown."""
    if isinstance(cell, dict):
        return [cell[key] for key in ("value", "low", "high", "error") if key in cell]
    return [] if cell is None else [cell]


def _step(shown: str) -> float:
    """The unit of the last digit of a figure, such as 0.1 for 12.3."""
    return 10.0 ** -len(shown.partition(".")[2].split("e")[0]) if "." in shown else 1.0


def _tables(written: ReportResult) -> dict[str, Any]:
    return json.loads(written.tables.read_text(encoding="utf-8"))


def test_what_was_chosen_on_held_out_scores_is_said_beside_them(written):
    """Of the explainers without a language model, which have such constants."""
    note = _tables(written)["comparison"]["note"]
    assert "were chosen on held-out scores of two small models" in note


def test_page_shows_the_figures_of_the_json_file(written, page):
    """Cell by cell, to the last digit that is shown."""
    compared = 0
    tables = _tables(written)
    for name, table in tables.items():
        if name == "neurons":  # shown as cards
            continue
        lines = page.tables[f"table-{name}"]
        if name == "comparison":
            lines = [list(line) for line in zip(*lines, strict=True)]
        assert lines[0] == [c["label"].replace("\xa0", " ") for c in table["columns"]]
        assert len(lines) - 1 == len(table["rows"])
        for line, row in zip(lines[1:], table["rows"], strict=True):
            for shown, column in zip(line, table["columns"], strict=True):
                cell = row[column["key"]]
                if isinstance(cell, str):
                    assert shown == cell
                    continue
                figures = _figures(cell)
                assert shown != "–" if figures else shown == "–"
                for figure, number in zip(figures, _numbers(shown), strict=True):
                    step = _step(re.findall(r"[\d,.]+", shown)[0])
                    # three significant digits of a large figure: 84.3 shown as 84
                    assert abs(figure - number) <= max(step / 2, abs(figure) * 0.05) * 1.001
                    compared += 1
    assert compared > 300


def test_csv_and_latex_have_the_same_figures(written):
    tables = _tables(written)
    for name, table in tables.items():
        path = written.path / "tables" / f"{name}.csv"
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(table["rows"])
        for from_csv, row in zip(rows, table["rows"], strict=True):
            for key, cell in row.items():
                parts = cell if isinstance(cell, dict) else {"value": cell}
                for part, value in parts.items():
                    text = from_csv[key if part == "value" else f"{key}_{part}"]
                    assert text == ("" if value is None else str(value))


def test_latex_shows_what_the_page_shows(written, page):
    for name, lines in page.tables.items():
        tex = (written.path / "tables" / f"{name.removeprefix('table-')}.tex").read_text()
        assert tex.isascii()
        body = [line for line in tex.splitlines() if line.endswith(r"\\")]
        assert len(body) == len(lines)
        for line, latex in zip(lines, body, strict=True):
            cells = latex.removesuffix(r" \\").split(" & ")
            assert len(cells) == len(line)
            for shown, cell in zip(line, cells, strict=True):
                if shown and shown[0].isdigit():
                    assert cell.replace(r"$\pm$", "±").replace(r"\%", "%") == shown


def test_comparison_is_the_mean_of_the_scores(run, written):
    """Computed anew from scores.parquet: mean over layers of the mean over neurons, and the counts."""
    for row in written.comparison:
        scores = [s for s in read_scores(run / "scores" / row["model"]) if s.control == "none"]
        for metric in ("top_and_random", "random_only", "anthropic"):
            mine = [s for s in scores if (s.explainer, s.metric) == ("trie", metric)]
            layers = [
                np.mean([s.score.value for s in mine if s.neuron.layer == n and s.score.value is not None])
                for n in (0, 1)
            ]  # fmt: skip
            figure = row[metric]
            assert figure["value"] == pytest.approx(100 * np.mean(layers))
            assert row[f"{metric}_variance"] == pytest.approx(np.var(100 * np.array(layers)))
            assert figure["low"] < figure["value"] < figure["high"]
            statuses = Counter(str(s.score.status) for s in mine)
            counts = [f"{statuses[name]}" for name in ("undefined", "dead", "failed")]
            assert row[f"{metric}_none"] == " / ".join(counts)
    null = {row["model"]: row["top_and_random_init"] for row in written.comparison}
    assert list(null) == ["crate-2l", "gpt2-2l"]
    assert null["crate-2l"] is not None
    assert null["gpt2-2l"] is None


def _mean_over_layers(values: dict[tuple[int, int], float | None], by: float = 100) -> Any:
    """The mean over layers of the mean over the neurons that have a value, times `by`."""
    layers: dict[int, list[float]] = {}
    for (layer, _), value in values.items():
        if value is not None:
            layers.setdefault(layer, []).append(by * value)
    return pytest.approx(np.mean([np.mean(of_layer) for of_layer in layers.values()]))


def _last_token_lines(folder: Path) -> dict[str, Any]:
    """Lines of the comparison on the last token and all held-out tokens, computed anew from the files."""
    shares = read_token_shares(folder)
    whole = {(s.explainer, s.control, tuple(s.neuron.key)): s for s in read_whole_scores(folder)}

    def figure(name: str, explainer: str = "trie", control: str = "none") -> dict:
        kind = (explainer, control)
        return {key: getattr(s, name) for (*of, key), s in whole.items() if tuple(of) == kind}

    def gain(trie: dict, look_up: dict) -> Any:
        both = [k for k in trie if trie[k] is not None and look_up.get(k) is not None]
        return _mean_over_layers({k: trie[k] - look_up[k] for k in both})

    excerpts = {
        explainer: {
            tuple(s.neuron.key): s.score.value
            for s in read_scores(folder)
            if (s.explainer, s.metric, s.control) == (explainer, "random_only", "none")
        }
        for explainer in ("trie", "lookup")
    }
    return {
        "token_share": _mean_over_layers({tuple(s.neuron.key): s.token_share for s in shares}),
        "context_share": _mean_over_layers({tuple(s.neuron.key): s.context_share for s in shares}),
        "token_entropy": _mean_over_layers({tuple(s.neuron.key): s.token_entropy for s in shares}, 1),
        "random_only_gain": gain(excerpts["trie"], excerpts["lookup"]),
        "all_tokens": _mean_over_layers(figure("correlation")),
        "all_tokens_shuffled": _mean_over_layers(figure("correlation", control="shuffled")),
        "all_tokens_gain": gain(figure("correlation"), figure("correlation", "lookup")),
        "precision": _mean_over_layers(figure("precision_top")),
        "precision_chance": _mean_over_layers(figure("chance_top")),
    }  # fmt: skip


def test_comparison_has_what_the_last_token_explains(run, written, page):
    """Of the twins and of the untrained control, computed anew from the files, with intervals."""
    crate, gpt2 = written.comparison
    for row in (crate, gpt2):
        for key, expected in _last_token_lines(run / "scores" / row["model"]).items():
            assert row[key]["value"] == expected, key
            assert row[key]["low"] <= row[key]["value"] <= row[key]["high"]
    null = _last_token_lines(run / "scores" / "crate-2l-init")
    untrained = {"precision_chance": "precision_init_chance"}
    for key in null.keys() - {"random_only_gain", "all_tokens_shuffled"}:
        of_null = untrained.get(key, f"{key}_init")
        assert crate[of_null]["value"] == null[key]
        assert gpt2[of_null] is None
    tables = _tables(written)
    assert [row["model"] for row in tables["token_shares"]["rows"]] == list(MODELS)
    kinds = [(r["model"], r["explainer"], r["explanations"]) for r in tables["all_tokens"]["rows"]]
    assert len(kinds) == len(set(kinds)) == len(MODELS) * 3 * 2  # explainers, controls
    shares = {
        tuple(s.neuron.key): s.token_share for s in read_token_shares(run / "scores" / "gpt2-2l")
    }
    of_cards = [r for r in tables["neurons"]["rows"] if r["model"] == "gpt2-2l"]
    for row in of_cards:
        if (share := shares[row["layer"], row["index"]]) is not None:
            facts = f" · token share {100 * share:.0f}% · fires on {row['firing_rate']:.3g}% of held-out"
            assert facts in page.words
    note = tables["comparison"]["note"]
    assert "Token share" in note
    assert "minus that of the look-up" in note


def test_summary_of_all_tokens_is_read_as_it_was_written(run):
    folder = run / "scores" / "gpt2-2l"
    raw = json.loads((folder / "summary.json").read_text())["all_tokens"]
    summary = read_score_summary(folder).all_tokens
    assert summary is not None
    assert json.loads(json.dumps(asdict(summary))) == raw


def test_neurons_are_drawn_over_their_context_share(run, monkeypatch):
    """Those of trained and untrained models in different colours, each at its score; a sample of many."""
    results = read_results(Run(run))
    figure = all_tokens.context_share_figure(results)
    assert figure is not None
    assert [series.label for series in figure.series] == ["crate-2l", "crate-2l-init", "gpt2-2l"]
    assert len({series.colour for series in figure.series}) == 3

    def lines(panel) -> dict[str, np.ndarray]:
        axes = Canvas().subplots()
        panel.draw(axes)
        return {line.get_color(): line.get_xydata() for line in axes.lines}

    colours = {series.label: series.colour for series in figure.series}
    for number, name in ((0, "crate-2l"), (0, "crate-2l-init"), (1, "gpt2-2l")):
        folder = run / "scores" / name
        shares = {s.neuron: s.context_share for s in read_token_shares(folder)}
        expected = [
            (100 * min(share, 1), 100 * s.score.value)
            for s in read_scores(folder)
            if (s.explainer, s.metric, s.control) == ("trie", "top_and_random", "none")
            and s.score.value is not None
            and (share := shares[s.neuron]) is not None
        ]
        drawn = lines(figure.panels[number])[colours[name]]
        np.testing.assert_allclose(sorted(drawn.tolist()), sorted(expected))
        assert len(drawn) > 20
    median = np.median([x for x, _ in drawn])  # of gpt2-2l; the last
    assert f"gpt2-2l {median:.0f}%" in figure.caption
    monkeypatch.setattr(all_tokens, "_DRAWN", 5)
    fewer = all_tokens.context_share_figure(results)
    assert fewer is not None
    assert len(lines(fewer.panels[1])[colours["gpt2-2l"]]) == 5


def test_a_run_that_was_scored_before_has_no_such_lines():
    """A run of version 0.1.0 is reported without them, and nothing fails."""
    results = read_results(Run(SOURCE / "run"))
    assert [m.all_tokens for m in results.models] == [None] * len(results.models)
    assert [t.rows for t in all_tokens.tables(results)] == [(), ()]
    assert all_tokens.figures(results) == [None]
    table = model_comparison_table(results)
    keys = {column.key for column in table.columns}
    assert "top_and_random_init" in keys
    assert not [key for key in keys if "token_" in key or "gain" in key or "precision" in key]
    assert "Token share" not in table.note


def test_comparison_as_text(written):
    text = comparison_table(written)
    assert text.startswith("CRATE's neurons are explained ")
    assert "crate-2l" in text
    assert f"{written.comparison[0]['anthropic']['value']:.1f} [" in text
    assert max(map(len, text.splitlines())) <= 80  # an ordinary terminal
    assert str(written).startswith(text)


def test_page_loads_and_runs_nothing(page):
    assert not page.tags.keys() & {"script", "img", "iframe", "object", "link", "base", "form"}
    for _, key, value in page.attributes:
        assert not key.startswith("on")
        if key in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("#")
        if "url(" in value:
            assert re.findall(r"url\((.)", value) == ["#"] * value.count("url(")
    style = page.text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in (
        page.attributes
    )


def test_hostile_text_is_shown_and_does_not_act(page, written):
    assert "script>" in page.words
    assert "onerror" in page.words
    assert "{{␣7␣*␣7␣}}" in page.words.replace("49", "!")  # a template would have made it 49
    for path in [written.page, written.tables, *(written.path / "tables").iterdir()]:
        text = path.read_bytes().decode("utf-8")
        assert not set(text) & set("\x00\x1b\u202e\u202c")
    assert r"\x1b" in page.words
    assert r"\u202e" in page.words
    assert "⏎" in page.words
    assert "⇥" in page.words


def test_names_are_unique_and_anchors_lead_somewhere(page):
    names = Counter(value for _, key, value in page.attributes if key == "id")
    assert [name for name, n in names.items() if n > 1] == []
    links = [value for _, key, value in page.attributes if key in ("href", "xlink:href")]
    assert {link.removeprefix("#") for link in links} <= names.keys()


def test_sections_are_there(page):
    for anchor in (
        "comparison",
        "run",
        "models",
        "scores",
        "twins",
        "sparsity",
        "neurons",
        "ledger",
    ):
        assert ("h2", "id", anchor) in page.attributes
    for anchor in ("leakage", "published", "reproduce"):
        assert ("h2", "id", anchor) in page.attributes
    assert "the randomly initialised null control of gpt2-2l" in page.words
    assert "No document was both explained from and scored on" in page.words
    assert ("div", "class", "box bad") not in page.attributes
    assert "For reference, not for comparison" in page.words


def test_best_neurons_are_the_best(run, written):
    rows = [r for r in _tables(written)["neurons"]["rows"] if r["model"] == "crate-2l"]
    shown = [r["top_and_random"] for r in rows if r["group"].startswith("4 best")]
    values = [
        100 * s.score.value
        for s in read_scores(run / "scores" / "crate-2l")
        if (s.explainer, s.metric, s.control) == ("trie", "top_and_random", "none")
        and s.score.value is not None
    ]
    assert shown == pytest.approx(sorted(values, reverse=True)[:4])
    assert len([r for r in rows if r["group"] == "4 at random"]) == 4


def test_only_the_excerpts_shown_are_read(run, monkeypatch):
    """Memory does not grow with the model: no more neurons are asked for than are shown."""
    asked: list[int] = []
    read = gallery.read_records

    def watched(folder, split, layers=None, indices=None):
        asked.append(len(indices or ()))
        return read(folder, split, layers=layers, indices=indices)

    monkeypatch.setattr(gallery, "read_records", watched)
    config = ReportConfig(run=run, neurons=2)
    shown = gallery.galleries(read_results(Run(run)), config)
    n_cards = sum(len(cards) for g in shown for _, cards in g.groups)
    assert n_cards == 2 * (2 + 2)  # models x (best + random)
    assert 0 < sum(asked) <= 2 * n_cards  # two splits


def test_same_inputs_give_the_same_files(run, written):
    def files() -> dict[str, bytes]:
        found = {str(p.relative_to(written.path)): p for p in written.path.rglob("*")}
        named = {name: p for name, p in found.items() if p.is_file() and p.suffix != ".json"}
        return {name: p.read_bytes() for name, p in named.items()} | {
            "tables.json": written.tables.read_bytes()
        }

    first = files()
    assert report(ReportConfig(**SETTINGS, run=run, force=True)) == written
    second = files()
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    drawn = ("context_share", "means", "loss", "score_by_layer", "distributions", "sparsity")
    figures = {name for name in first if name.startswith("figures")}
    assert figures == {f"figures/{name}.{kind}" for name in drawn for kind in ("png", "pdf")}
    assert all(first[n].startswith(b"\x89PNG" if n.endswith("png") else b"%PDF") for n in figures)


def test_finished_report_is_kept(run, written, capsys):
    before = written.page.stat().st_mtime_ns
    assert report(ReportConfig(**SETTINGS, run=run)) == written
    assert written.page.stat().st_mtime_ns == before
    assert "report is finished, skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match="--force"):
        report(ReportConfig(**SETTINGS, run=run, seed=1))


def test_commands_make_the_same_run(run, page):
    """The commands on the page, parsed as the command line does, are the configurations that ran."""
    code = page.text.partition("<code>")[2].partition("</code>")[0]
    lines = html.unescape(code).splitlines()
    assert lines[-1].startswith("cratelm report")
    stages = {"tokenize": "tokens", "train": "model", "harvest": "activations"}
    stages |= {"explain": "explanations", "score": "scores"}
    for line in lines[:-1]:
        _, verb, *arguments = shlex.split(line)
        config = cli.parse_options(verb, arguments)
        assert config.run == run
        name = "" if verb == "tokenize" else config.folder if verb == "train" else config.model
        done = Run(run).stage(stages[verb], name).completion()  # type: ignore[arg-type]
        assert done is not None
        assert (config.identity() if verb == "train" else config_dict(config)) == done.config
    assert len(lines) == 2 + 4 * len(MODELS)


def test_any_two_of_several_models(run):
    """With three models there is a line for each, and a comparison of each pair; twins alone have their own tables."""
    results = read_results(Run(run))
    assert not overview.overview_table(results).rows
    assert not overview.pairs_table(results, 50, 0).rows
    (crate, gpt2) = results.principal
    third = replace(gpt2, name="gpt2-solu-2l")
    several = replace(results, models=(crate, gpt2, third))
    rows = overview.overview_table(several).records()
    assert {row["model"] for row in rows} == {"crate-2l", "gpt2-2l", "gpt2-solu-2l"}
    metric = results.metrics[0]
    of_crate = next(row for row in rows if row["model"] == "crate-2l")
    assert of_crate[metric]["value"] == pytest.approx(100 * crate.find(results.explainer, metric).mean)  # fmt: skip
    pairs = overview.pairs_table(several, 50, 0).records()
    assert [row["models"] for row in pairs] == ["crate-2l − gpt2-2l"] * 2 + ["gpt2-2l − gpt2-2l"]
    assert pairs[0]["difference"]["value"] == pytest.approx(pairs[0]["mean_a"] - pairs[0]["mean_b"])
    assert pairs[2]["difference"]["value"] == 0
    assert all(row["p_adjusted"] >= row["p_value"] for row in pairs)


@pytest.mark.usefixtures("undrawn")
def test_one_model_alone(run, tmp_path):
    """No twin, null, tokens, harvest or weights: what is there is shown, the rest is named."""
    gone = [f"scores/{m}" for m in MODELS[1:]]
    gone += ["tokens", "activations/crate-2l", "model/crate-2l"]
    path = _copy(run, tmp_path, *gone)
    written = report(ReportConfig(run=path, force=True))
    page = Page(written.page.read_text(encoding="utf-8"))
    missing = page.words.partition("Not in this report")[2].partition("Comparison")[0]
    for verb in ("tokenize", "train", "harvest"):
        assert f"cratelm {verb} --run" in missing
    assert "null control of crate-2l" in missing
    assert "no CRATE and GPT-2 of the same size" in missing
    assert {"table-twins", "table-sparsity"}.isdisjoint(page.tables)
    assert ("h2", "id", "neurons") not in page.attributes
    assert len(written.comparison) == 1
    assert written.comparison[0]["validation_loss"] is None
    links = {v.removeprefix("#") for t, k, v in page.attributes if (t, k) == ("a", "href")}
    assert links <= {v for _, k, v in page.attributes if k == "id"}


@pytest.mark.usefixtures("undrawn")
def test_explainer_and_models_can_be_chosen(run, tmp_path):
    config: dict[str, Any] = {"run": _copy(run, tmp_path), "force": True, "neurons": 0}
    written = report(ReportConfig(**config, explainer="lookup", models=("gpt2-2l",)))
    assert [row["model"] for row in written.comparison] == ["gpt2-2l"]
    assert "\n\nexplainer: lookup" in comparison_table(written)
    with pytest.raises(InputError, match="trie"):
        report(ReportConfig(**config, explainer="oracle"))
    with pytest.raises(InputError, match="cratelm score"):
        report(ReportConfig(**config, models=("gpt2-3l",)))


def test_without_scores_the_verb_is_named(run, tmp_path):
    path = _copy(run, tmp_path, "scores")
    with pytest.raises(InputError, match="cratelm score --run"):
        report(ReportConfig(run=path))
    assert not list(path.glob(".report*"))
    with pytest.raises(InputError, match="cratelm score --run"):
        report(ReportConfig(run=tmp_path / "nothing"))


@pytest.mark.usefixtures("undrawn")
def test_leakage_is_told(run, tmp_path):
    path = _copy(run, tmp_path)
    summary = path / "scores" / "gpt2-2l" / "summary.json"
    record = json.loads(summary.read_text())
    record["leakage_audit"]["shared"] = [3, 5]
    summary.write_text(json.dumps(record))
    reseal(summary.parent)
    config = ReportConfig(run=path, neurons=0, models=("gpt2-2l",), force=True)
    page = Page(report(config).page.read_text())
    assert "2 documents were both explained from and scored on" in page.words
    assert "do not trust these scores" in page.words
    assert ("div", "class", "box bad") in page.attributes


@pytest.mark.parametrize("bad", [{"neurons": -1}, {"resamples": 1}, {"rank_by": "taste"}])
def test_bad_settings(bad):
    with pytest.raises(InputError, match="--"):
        ReportConfig(**bad)


@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=30))
def test_text_always_shows(text):
    """Of any text, lone surrogates too: it can be encoded, and every character is one that shows."""
    for shown in (printable(text), visible(text)):
        shown.encode("utf-8")
        assert all(c.isprintable() for c in shown)
        assert bool(shown) == bool(text)


def test_text_marks():
    assert visible(" a\tb\n") == "␣a⇥b⏎"
    assert visible("\x1b[0m\u202e\ud800\x00") == r"\x1b[0m\u202e\ud800\x00"
    assert visible("\u0301x") == "◌\u0301x"


def test_shaded_text_holds_the_levels_of_each_token():
    tokens = ["a", "b", " c", "ש", "d", "e"]
    shaded = zip(tokens, [0, 0.2, 5, 0, 0, 10], [0, 0, 5, 0, 0, 10], strict=True)
    found = shaded_html(list(shaded), peak=4, every_value=False)
    assert found == (
        'ab<span class="l5" title="5"><i>␣</i><wbr>c</span><bdi dir="rtl">ש</bdi>'
        '<span class="peak" title="0">d</span><span class="l10" title="10">e</span>'
    )


def test_cells():
    number, whole = Column("x", "x", ".1f"), Column("x", "x", ",d")
    assert number.show(Interval(1.25, -0.04, 2.06)) == "1.2 [0.0, 2.1]"
    assert number.show(Estimate(3.0, 0.5)) == "3.0 ± 0.5"
    assert number.show(None) == number.show(float("nan")) == "–"
    assert whole.show(12345) == "12,345"
    assert Column("x", "x").show("a\x1bb") == r"a\x1bb"
    table = Table("t", "T", (Column("w", "w"), number), (("50% & _", None), ("é", 1.0)))
    assert table.to_latex().splitlines()[5:7] == [
        r"50\% \& \_ & -- \\",
        r"\texttt{U+00E9} & 1.0 \\",
    ]


@pytest.fixture(scope="module")
def chromium() -> str:
    for name in ("chromium", "google-chrome", "chromium-browser"):
        if path := shutil.which(name):
            return path
    pytest.skip("no chromium or google-chrome found: install one to open the page in a browser")


def test_page_in_a_browser(chromium, written, tmp_path):
    """Opened from disk it renders, complains of nothing, and no hostile text has acted."""
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    more = "--disable-background-networking --disable-component-update --enable-logging=stderr"
    command = [chromium, *quiet.split(), *more.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    picture = tmp_path / "page.png"
    address = written.page.resolve().as_uri()
    done = subprocess.run(
        [*command, "--dump-dom", address], capture_output=True, text=True, timeout=60, check=True
    )
    assert (
        ":CONSOLE" not in done.stderr
    )  # errors of scripts, and loads that the page's policy refused
    rendered, file = Page(done.stdout), Page(written.page.read_text(encoding="utf-8"))
    for tag in ("table", "tr", "details", "svg", "h2", "bdi"):
        assert rendered.tags[tag] == file.tags[tag] > 0
    assert "<title>How well the neurons of crate-2l and gpt2-2l can be explained</title>" in (
        done.stdout
    )
    size = ["--window-size=390,1600", f"--screenshot={picture}"]
    subprocess.run([*command, *size, address], capture_output=True, timeout=60, check=True)
    assert picture.stat().st_size > 20_000  # an empty page is 5 kB


def test_what_has_no_value_counts_as_is_named_by_metric():
    assert chance_of(SIMULATION_METRICS) == "0"
    assert chance_of(["top_and_random", "detection"]) == chance_of(["intruder"]) == "chance"


FAKE = "SmolLM2-135M-Instruct"
PAPER = f"{FAKE}+paper-compat"
_METRICS: dict[str, Any] = {name: metric for metric, name in METRIC_NAMES.items()}


@pytest.fixture(scope="module")
def with_model(run, tmp_path_factory) -> Path:
    """The run, and what a made-up language model says of three neurons a layer."""
    path = _copy(run, tmp_path_factory.mktemp("asked"))
    fake = FakeModel(fails=0.02)
    fake.name = FAKE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cratelm.llm.session._backend", lambda config, spec: fake)
        for name in MODELS:
            ask: dict[str, Any] = {"run": path, "model": name, "quiet": True}
            # Another seed than the LLM-free sample's, of which this would else be a part.
            explain(ExplainConfig(**ask, explainer="hf:any", neurons=3, seed=1))
            few = ("top_and_random", "detection")
            metrics = few if name.endswith("-init") else METRICS
            paper = name == "crate-2l"
            score(
                ScoreConfig(
                    **ask, simulator="hf:any", metrics=metrics, paper_compat=paper, resamples=100
                )
            )
    return path


@pytest.fixture(scope="module")
def asked(with_model) -> ReportResult:
    return report(ReportConfig(**SETTINGS, run=with_model, force=True))


def _scores(path: Path, folder: str, explainer: str, metric: str, control: str = "none") -> dict:
    wanted = (explainer, metric, control)
    return {
        (s.neuron.layer, s.neuron.index): s.score
        for s in read_scores(path / "scores" / folder)
        if (s.explainer, s.metric, s.control) == wanted
    }


def _mean(scores: dict) -> float | None:
    """x 100, over the layers of the mean over the neurons with a value."""
    layers: dict[int, list[float]] = {}
    for (layer, _), found in scores.items():
        if found.value is not None:
            layers.setdefault(layer, []).append(100 * found.value)
    return float(np.mean([np.mean(values) for values in layers.values()])) if layers else None


def _value(cell: Any) -> float | None:
    return cell["value"] if isinstance(cell, dict) else cell


def test_sets_are_no_models(with_model, asked, written):
    """The comparison and the tables of the LLM-free scores are those of the run without the sets."""
    assert asked.comparison == written.comparison
    before, after = _tables(written), _tables(asked)
    for name in ("mean_and_variance", "by_layer", "nulls", "twins", "models", "ledger"):
        assert after[name] == before[name]
    assert not [name for name in before if "llm" in name or name == "side_by_side"]
    inputs = Run(with_model).stage("report").completion()
    assert inputs is not None
    for stage in ("explanations", "scores"):
        for name in MODELS:
            assert {f"{stage}/{name}", f"{stage}/{name}@{FAKE}"} <= inputs.inputs.keys()


def test_side_by_side_is_on_the_same_neurons(with_model, asked):
    rows = _tables(asked)["side_by_side"]["rows"]
    seen = set()
    for row in rows:
        model, metric = row["model"], _METRICS[row["metric"]]
        free = row["explainer"] in ("lookup", "trie", "concepts")
        folder = model if free else f"{model}@{FAKE}"
        sample = set(_scores(with_model, f"{model}@{FAKE}", FAKE, "detection"))
        if row["neurons"] < len(sample):
            sample &= set(_scores(with_model, model, "trie", "anthropic"))
        assert row["neurons"] == len(sample)
        for key, control in (("mean", "none"), ("shuffled", "shuffled")):
            found = _scores(with_model, folder, row["explainer"], metric, control)
            mine = {place: s for place, s in found.items() if place in sample}
            expected = _mean(mine)
            assert _value(row[key]) == (None if expected is None else pytest.approx(expected))
            if control == "none":
                counts = Counter(str(s.status) for s in mine.values())
                shown = [str(counts[name]) for name in ("undefined", "dead", "failed")]
                assert row["none"] == " / ".join(shown)
        assert row["chance"] == 100 * CHANCE[metric]
        seen.add((model, row["explainer"], row["neurons"] == 6, metric))
    both = {
        (m, e, False, metric)
        for m in MODELS[:2]
        for e in ("lookup", "trie")
        for metric in SIMULATION_METRICS
    }
    assert both <= seen
    assert {(m, FAKE, whole, metric) for m in MODELS[:2] for whole in (True, False) for metric in METRICS} <= seen  # fmt: skip
    assert ("crate-2l", PAPER, True, "anthropic") in seen
    assert not [row for row in rows if row["explainer"] == PAPER and row["metric"] == "detection"]


def test_side_by_side_has_the_untrained_model(with_model, asked):
    rows = _tables(asked)["side_by_side"]["rows"]
    found = {
        (r["metric"], r["explainer"]): r["init"]
        for r in rows
        if r["model"] == "crate-2l" and r["neurons"] == 6
    }
    null = _mean(_scores(with_model, f"crate-2l-init@{FAKE}", FAKE, "detection"))
    assert _value(found["detection", FAKE]) == pytest.approx(null)
    assert found["intruder", FAKE] is None


def test_language_model_less_free_is_paired_over_neurons(with_model, asked):
    rows = _tables(asked)["llm_minus_llm_free"]["rows"]
    compared = 0
    for row in rows:
        a, b = row["explainers"].split(" − ")
        metric = _METRICS[row["metric"]]
        with_, without = (
            _scores(with_model, f"{row['model']}@{FAKE}", a, metric),
            _scores(with_model, row["model"], b, metric),
        )
        zero = row["policy"] == "counted as chance"
        gaps: dict[int, list[float]] = {}
        for place in with_.keys() & without.keys():
            x, y = with_[place].value, without[place].value
            if zero or (x is not None and y is not None):
                gaps.setdefault(place[0], []).append(100 * ((x or 0) - (y or 0)))
        expected = np.mean([np.mean(layer) for layer in gaps.values()])
        assert _value(row["difference"]) == pytest.approx(expected)
        assert row["paired"] == "yes"
        assert row["n_a"] == row["n_b"] == sum(map(len, gaps.values()))
        compared += 1
    assert compared >= 2 * 3 * 3  # models, LLM-free explainers, metrics
    assert {r["model"] for r in rows} == set(MODELS[:2])


def test_twins_are_compared_under_every_scorer(with_model, asked):
    rows = _tables(asked)["twins_llm"]["rows"]
    for row in rows:
        assert row["models"] == "crate-2l − gpt2-2l"
        metric = _METRICS[row["metric"]]
        if row["paired"] == "no" and row["policy"] == "left out":
            sides = [_mean(_scores(with_model, f"{m}@{FAKE}", FAKE, metric)) for m in MODELS[:2]]
            if row["n_a"] + row["n_b"] == 12:  # else layers may have fallen out
                assert [row["mean_a"], row["mean_b"]] == pytest.approx(sides)
    assert {r["metric"] for r in rows} >= {METRIC_NAMES[m] for m in ("detection", "fuzzing")}
    assert {r["explainer"] for r in rows} == {FAKE}  # the paper's variant was read of one alone


def test_leakage_section_shows_near_duplicates(with_model, asked):
    tables = _tables(asked)
    for name in (f"{m}{suffix}" for m in MODELS for suffix in ("", f"@{FAKE}")):
        audit = json.loads((with_model / "scores" / name / "summary.json").read_text())
        near = audit["near_duplicates"]
        (row,) = [r for r in tables["near_duplicates"]["rows"] if r["model"] == name]
        assert row["near_duplicates"] == near["n_near_duplicates"]
        assert (row["explained"], row["scored"]) == (
            near["n_passages_explained"],
            near["n_passages_scored"],
        )
        effects = [r for r in tables["duplicate_effects"]["rows"] if r["model"] == name]
        assert [(r["neurons"], r["mean_with"], r["mean_without"]) for r in effects] == [
            (e["n_neurons"], e["mean_with"], e["mean_without"]) for e in near["effects"]
        ]
        assert [r["shared"] for r in tables["leakage"]["rows"] if r["model"] == name] == [0]
    page = Page(asked.page.read_text(encoding="utf-8"))
    assert ("h2", "id", "with-model") in page.attributes
    assert {"table-near_duplicates", "table-duplicate_effects", "table-calls"} <= page.tables.keys()


def test_calls_and_preflight_are_shown(with_model, asked):
    tables = _tables(asked)
    for row in tables["calls"]["rows"]:
        stage = {"explain": "explanations", "score": "scores"}[row["verb"]]
        tally = json.loads((with_model / stage / row["model"] / "calls.json").read_text())
        for key in ("calls", "known", "prompt_tokens", "completion_tokens", "seconds"):
            assert row[key] == tally[key]
        failed = ", ".join(f"{n} {kind}" for kind, n in tally["failed"].items())
        assert row["failed"] == (failed or "none")
    assert any("status" in row["failed"] for row in tables["calls"]["rows"])
    assert len(tables["calls"]["rows"]) == 2 * len(MODELS)
    assert [r["levels"] for r in tables["preflights"]["rows"]] == ["0 to 9"] * len(MODELS)
    assert {r["remark"] for r in tables["preflights"]["rows"]} == {""}
    assert tables["preflights"]["rows"][0]["mass"] == pytest.approx(90)


@pytest.mark.usefixtures("undrawn")
def test_little_probability_on_the_levels_is_warned_of(with_model, tmp_path):
    path = _copy(with_model, tmp_path)
    summary = path / "scores" / f"gpt2-2l@{FAKE}" / "summary.json"
    record = json.loads(summary.read_text())
    record["preflight"]["mass"] = 0.49
    summary.write_text(json.dumps(record))
    reseal(summary.parent)
    tables = _tables(report(ReportConfig(run=path, neurons=0, resamples=100, force=True)))
    remarks = {r["model"]: r["remark"] for r in tables["preflights"]["rows"]}
    assert "WARNING" in remarks[f"gpt2-2l@{FAKE}"]
    assert remarks[f"crate-2l@{FAKE}"] == ""


def test_neurons_show_what_the_language_model_said(with_model, asked):
    config = ReportConfig(**SETTINGS, run=with_model)
    first = gallery.galleries(read_results(Run(with_model)), config)[0]
    titles = [title for title, _ in first.groups]
    assert titles[2] == "4 at random among those for which a language model was used"
    said = {
        (e.neuron.layer, e.neuron.index, e.payload["evidence"]): printable(e.text)
        for e in read_explanations(with_model / "explanations" / f"crate-2l@{FAKE}")
    }
    detection = _scores(with_model, f"crate-2l@{FAKE}", FAKE, "detection")
    compat = _scores(with_model, f"crate-2l@{FAKE}", PAPER, "anthropic")
    shown = 0
    for card in first.groups[2][1]:
        place = card.neuron.layer, card.neuron.index
        for explanation in card.llm_explanations:
            assert explanation.text == said[*place, explanation.evidence]
            top = explanation.evidence == "top"
            value = (detection if top else compat)[place]
            figure = value.status if value.value is None else f"{100 * value.value:.1f}"
            before = "detection" if top else "paper-compat: Anthropic"
            assert f"{before} {figure}" in explanation.scores
            assert ("Anthropic" in explanation.scores) != top
            shown += 1
    assert shown >= 2
    page = Page(asked.page.read_text(encoding="utf-8"))
    assert f"{FAKE}, from its strongest excerpts" in page.words


@pytest.mark.usefixtures("undrawn")
def test_language_model_alone(with_model, tmp_path):
    """Scores of a language model without any others: it is the explainer, and nothing stands beside."""
    path = _copy(with_model, tmp_path, *(f"scores/{m}" for m in MODELS))
    written = report(ReportConfig(**SETTINGS, run=path, force=True))
    assert [row["model"] for row in written.comparison] == ["crate-2l", "gpt2-2l"]
    assert f"\n\nexplainer: {FAKE}" in comparison_table(written)
    tables = _tables(written)
    assert "llm_minus_llm_free" not in tables
    assert {r["neurons"] for r in tables["side_by_side"]["rows"]} == {6}
    assert "cratelm score --run" in Page(written.page.read_text()).words


@pytest.mark.usefixtures("undrawn")
def test_scores_under_another_name_have_rows_of_their_own(with_model, tmp_path, monkeypatch):
    path = _copy(with_model, tmp_path)
    fake = FakeModel()
    fake.name = FAKE
    monkeypatch.setattr("cratelm.llm.session._backend", lambda config, spec: fake)
    ask: dict[str, Any] = {"run": path, "model": "gpt2-2l", "quiet": True, "name": "again"}
    score(ScoreConfig(**ask, simulator="hf:any", metrics=("random_only",), resamples=100))
    tables = _tables(report(ReportConfig(run=path, neurons=1, resamples=100, force=True)))
    rows = [r for r in tables["side_by_side"]["rows"] if r["model"] == "gpt2-2l"]
    random = [r for r in rows if r["metric"] == "random-only" and r["neurons"] == 6]
    assert [r["explainer"] for r in random] == [FAKE, f"{FAKE} (again)"]


def test_an_imported_run_is_reproduced_by_its_import(tmp_path):
    from cratelm.report.reproduce import _command, _settings, _verb
    from cratelm.runs import Completion

    config = {"import": "records", "files": ["a.json", "b"], "name": "gpt2-mlp", "site": "mlp"}
    done = Completion("activations", "gpt2-mlp", config, {}, {}, "", 0.0, "", {}, "")
    results = SimpleNamespace(run=SimpleNamespace(path=tmp_path / "run"))
    told = _command(*_verb(done), _settings(done), results)
    assert told == (
        f"cratelm import records --run {tmp_path / 'run'} --files a.json b --model gpt2-mlp"
    )


def test_a_model_without_a_live_neuron_has_a_report(run, tmp_path):
    path = _copy(run, tmp_path, "activations", "explanations", "scores")
    model = load(path / "model" / "gpt2-2l")
    for block in model.transformer.h:
        block.mlp.c_fc.weight.data.zero_()
    model.save_pretrained(tmp_path / "dead")
    shutil.copy(path / "tokens" / "tokenizer.json", tmp_path / "dead")
    dead: dict[str, Any] = {"run": path, "model": str(tmp_path / "dead"), "name": "dead"}
    harvest(HarvestConfig(**dead, tokens=2000, pilot_tokens=256, device="cpu"))
    explain(ExplainConfig(run=path, model="dead", neurons=4, quiet=True))
    score(ScoreConfig(run=path, model="dead", resamples=100, quiet=True))
    found = _tables(report(ReportConfig(run=path, force=True, **SETTINGS)))
    assert {row["dead"] for row in found["ledger"]["rows"]} == {8}


@pytest.mark.usefixtures("undrawn")
def test_tokens_that_a_neuron_promotes_are_shown_with_their_spaces(run, tmp_path):
    """And hostile ones are harmless."""
    path = _copy(run, tmp_path)
    assert not read_results(Run(path)).side_stages
    row = {"model": "crate-2l", "site": "ista", "kind": "exact", "activation": 1.0}
    row |= {"n_positions": 3, "promoted_ids": [4, 2], "promoted": ["\n  x", "<script>alert(1)"]}
    row |= {"promoted_values": [2.5, 1.0], "suppressed_ids": [1], "suppressed": [" b"]}
    row |= {"suppressed_values": [-1.5]}
    rows = [{**row, "layer": layer, "index": i} for layer in range(2) for i in range(64)]
    with Run(path).stage("steer", "crate-2l").write({}, {}) as draft:
        table = pa.Table.from_pylist(rows, schema=LOGIT_EFFECTS.schema)
        pq.write_table(table, draft.path / "logit_effects.parquet")
        summary = {
            "model": "crate-2l",
            "layers": [],
            "ablation": "zero",
            "n_tokens": 0,
            "n_documents": 0,
        }
        summary["loss"] = {"value": 3.0, "error": 0.1}
        (draft.path / "summary.json").write_text(json.dumps(summary))
    page = report(ReportConfig(run=path, force=True, **SETTINGS)).page.read_text(encoding="utf-8")
    assert "<dt>promotes</dt>" in page
    assert "⏎" in page[page.index("<dt>promotes</dt>") :][:200]
    assert "<script>alert(1)" not in page
    assert "cratelm effects" in page
