"""`cratelm sae compare`, the report's section about autoencoders, and `cratelm demo --sae`."""

import importlib
import json
import random
import shlex
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from undrawn import leave_out_drawing

from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import harvest
from cratelm.cli import config_class, main, split_words
from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.pipelines.config import DemoConfig, SaeCompareConfig
from cratelm.pipelines.sae_compare import SaeCompareResult, sae_compare, steps
from cratelm.report.config import ReportConfig
from cratelm.report.report import report
from cratelm.runs import Run
from cratelm.sae.train import sae_train
from cratelm.score.config import ScoreConfig
from cratelm.score.score import score
from cratelm.score.store import read_scores
from cratelm.stats.ratio import ratio
from cratelm.stats.scores import compare_models, model_statistics
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.tokenize import tokenize
from cratelm.train.config import TrainConfig
from cratelm.train.loop import train

pytest.importorskip("sae_lens", reason="the extra sae is not installed")

MODELS = ("crate-2l", "gpt2-2l")
SMALL: dict[str, Any] = {
    "architecture": "topk", "k": 4, "expansion": 2, "train_tokens": 2048, "batch_size": 256,
    "lr": 3e-3, "evaluate_tokens": 640, "quiet": True,
}  # fmt: skip
WORDS = [
    "red",
    "blue",
    "stone",
    "river",
    "the",
    "over",
    "def",
    "return",
    "import",
    "under",
    "seven",
]


def write_corpus(path: Path, documents: int) -> Path:
    draw = random.Random(0)
    lines = (" ".join(draw.choices(WORDS, k=draw.randint(20, 60))) for _ in range(documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    return path


def scored_model(path: Path, model: str, steps: int) -> None:
    name = train(TrainConfig(
        run=path, model=model, steps=steps, batch_size=4, sequence_length=32, validation_sequences=8,
        validate_every=3, tensorboard=False, quiet=True,
        model_overrides=("hidden_size=32", "num_attention_heads=2"),
    )).name  # fmt: skip
    harvest(HarvestConfig(run=path, model=name, tokens=2000, pilot_tokens=256, seed=3))
    explain(ExplainConfig(run=path, model=name, neurons=20, quiet=True))
    score(ScoreConfig(run=path, model=name, resamples=100, quiet=True))


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """Twins with 128 neurons a layer, of which 20 are explained and scored."""
    folder = tmp_path_factory.mktemp("compare")
    path = folder / "run"
    corpus = write_corpus(folder / "corpus.jsonl", 160)
    tokenize(TokenizeConfig(run=path, corpus=str(corpus), vocab_size=300, sequence_length=16, fit=0.3, held_out=0.3, quiet=True))  # fmt: skip
    for name in MODELS:
        scored_model(path, name, steps=6)
    with pytest.MonkeyPatch.context() as patch:
        leave_out_drawing(patch)
        report(ReportConfig(run=path, neurons=2, resamples=200))
    return path


@pytest.fixture(scope="module")
def compared(scored, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("compared") / "run"
    shutil.copytree(scored, path)
    sae_compare(SaeCompareConfig(run=path, **SMALL))
    return path


SOFT, UNTRAINED = "crate-2l+topk-2x-frozen-soft-decoder", "crate-2l-init+topk-2x"


@pytest.fixture(scope="module")
def controlled(compared, tmp_path_factory) -> SaeCompareResult:
    """The comparison of CRATE with two random controls: a soft-frozen decoder, and the untrained model."""
    path = tmp_path_factory.mktemp("controlled") / "run"
    shutil.copytree(compared, path)
    with pytest.MonkeyPatch.context() as patch:
        leave_out_drawing(patch)
        scored_model(path, "crate-2l", steps=0)
        for step in steps(SaeCompareConfig(run=path, **SMALL), ["crate-2l-init"]):
            step.work()
        return sae_compare(SaeCompareConfig(run=path, models=("crate-2l",), freeze=("soft-decoder",), **SMALL))  # fmt: skip


@pytest.fixture
def run(scored, tmp_path) -> Path:
    shutil.copytree(scored, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def tables(compared) -> dict[str, Any]:
    return json.loads((compared / "report" / "tables.json").read_text())


def rows(tables, name, **wanted):
    return [r for r in tables[name]["rows"] if all(r[k] == v for k, v in wanted.items())]


# ---- what is done ---------------------------------------------------------------------------------


def test_latents_get_the_budget_of_the_neurons(compared):
    run = Run(compared)
    for name in MODELS:
        own, other = (run.stage("activations", n).completion() for n in (name, f"{name}+topk-2x"))
        assert {k: v for k, v in own.config.items() if other.config[k] != v} == {"sae": None}
        assert other.results["neurons"] == [256, 256]
        assert other.results["tokens"] == own.results["tokens"]
        for stage, count in (("explanations", "neurons.parquet"), ("scores", "scores.parquet")):
            a, b = (pq.read_table(compared / stage / n / count) for n in (name, f"{name}+topk-2x"))
            assert len(a) == len(b)
            configs = [run.stage(stage, n).completion().config for n in (name, f"{name}+topk-2x")]
            assert {k for k in configs[0] if configs[0][k] != configs[1][k]} == {"model"}


@pytest.mark.usefixtures("undrawn")
def test_a_model_explained_whole_is_compared_with_as_many_latents(run):
    explain(ExplainConfig(run=run, model="crate-2l", quiet=True, force=True))
    score(ScoreConfig(run=run, model="crate-2l", resamples=100, quiet=True, force=True))
    sae_compare(SaeCompareConfig(run=run, models=("crate-2l",), **SMALL))
    told = pq.read_table(run / "explanations" / "crate-2l+topk-2x" / "neurons.parquet")
    assert len(told) == 2 * 128


@pytest.mark.usefixtures("undrawn")
def test_autoencoders_are_of_the_site_that_was_harvested(run):
    harvest(HarvestConfig(run=run, model="crate-2l", site="mssa", polarity="positive", tokens=2000, pilot_tokens=256, force=True))  # fmt: skip
    explain(ExplainConfig(run=run, model="crate-2l", neurons=20, quiet=True, force=True))
    score(ScoreConfig(run=run, model="crate-2l", resamples=100, quiet=True, force=True))
    report(ReportConfig(run=run, models=("crate-2l",), neurons=0, resamples=100, force=True))
    sae_compare(SaeCompareConfig(run=run, models=("crate-2l",), **SMALL))
    told = json.loads((run / "sae" / "crate-2l@topk-2x" / "layer-0" / "cfg.json").read_text())
    assert told["metadata"]["site"] == "mssa"
    assert told["d_in"] == Run(run).stage("activations", "crate-2l").completion().results["neurons"][0]  # fmt: skip
    shown = json.loads((run / "report" / "tables.json").read_text())["comparison"]["rows"]
    assert [r["model"] for r in shown] == ["crate-2l", "crate-2l+topk-2x", "gpt2-2l"]


@pytest.mark.usefixtures("undrawn")
def test_the_same_command_does_nothing_twice(compared, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(compared, run)
    before = {p: p.read_bytes() for p in run.rglob("*.parquet")}
    capsys.readouterr()
    result = sae_compare(SaeCompareConfig(run=run, **SMALL))
    told = capsys.readouterr().out
    assert told.count("skipped") == 10
    assert "[11/11] report" in told
    assert {p: p.read_bytes() for p in run.rglob("*.parquet")} == before
    assert result.models == ("crate-2l", "crate-2l+topk-2x", "gpt2-2l", "gpt2-2l+topk-2x")
    assert "report.html#autoencoders" in str(result)
    with pytest.raises(InputError, match="--force"):
        sae_compare(SaeCompareConfig(run=run, **{**SMALL, "lr": 1e-3}))


def test_the_report_is_asked_for_as_before(compared):
    done = Run(compared).stage("report").completion()
    assert done.config["neurons"] == 2
    assert done.config["resamples"] == 200


# ---- the section ----------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["top_and_random", "random_only", "anthropic"])
@pytest.mark.parametrize("model", ["gpt2-2l", "gpt2-2l+topk-2x"])
def test_means_under_each_way_to_count(compared, tables, model, metric):
    shown = {"top_and_random": "top-and-random", "random_only": "random-only", "anthropic": "Anthropic"}  # fmt: skip
    (row,) = rows(tables, "sae_policies", model=model, metric=shown[metric])
    told = pq.read_table(compared / "scores" / model / "scores.parquet").to_pylist()
    mine = [r for r in told if (r["explainer"], r["metric"], r["control"]) == ("trie", metric, "none")]  # fmt: skip
    assert row["neurons"] == len(mine) == 40
    means: dict[str, list[float]] = {"leave_out": [], "live": [], "all": []}
    for layer in (0, 1):
        here = [r for r in mine if r["layer"] == layer]
        values = [100 * r["value"] for r in here if r["status"] == "defined"]
        live = [r for r in here if r["status"] != "dead"]
        if values:
            means["leave_out"].append(np.mean(values))
        if live:
            means["live"].append(sum(values) / len(live))
        means["all"].append(sum(values) / len(here))
    for key, layers in means.items():
        value = row[key]["value"] if isinstance(row[key], dict) else row[key]
        assert value == pytest.approx(np.mean(layers))
    for status in ("defined", "undefined", "dead", "failed"):
        assert row[status] == sum(r["status"] == status for r in mine)


def test_the_ways_to_count_differ(compared, tables):
    """Else the test above would show little: rarely firing latents have no score at random excerpts."""
    (row,) = rows(tables, "sae_policies", model="crate-2l+topk-2x", metric="random-only")
    assert row["undefined"] + row["dead"] > 0
    assert row["leave_out"]["value"] != row["all"]["value"]


def test_differences_are_those_of_the_statistics(compared, tables):
    a, b = (read_scores(compared / "scores" / n) for n in ("crate-2l", "gpt2-2l+topk-2x"))
    own = [[s for s in scores if s.control == "none"] for scores in (a, b)]
    expected = compare_models(*own, "random_only", explainer="trie", paired=False, resamples=200)
    wanted = {"models": "crate-2l − gpt2-2l+topk-2x", "metric": "random-only", "policy": "left out"}
    (row,) = rows(tables, "sae_built_in", **wanted)
    assert row["difference"]["value"] == expected.difference
    assert row["difference"]["low"] == expected.low
    assert row["p_value"] == expected.p_value
    assert {r["models"] for r in rows(tables, "sae_built_in")} == {
        "crate-2l − gpt2-2l+topk-2x",
        "crate-2l − crate-2l+topk-2x",
        "gpt2-2l − gpt2-2l+topk-2x",
    }


def test_random_controls_are_further_rows_and_columns(compared, tables, controlled):
    """And the figures of the others stay."""
    run = controlled.report.parent.parent
    found = json.loads((run / "report" / "tables.json").read_text())
    assert controlled.models == ("crate-2l", "crate-2l+topk-2x", SOFT)
    for name, key in (("sae_policies", "init"), ("sae_rebuilt", ""), ("sae_steering", "")):
        before = {
            json.dumps({k: v for k, v in r.items() if k != key}) for r in tables[name]["rows"]
        }
        after = {json.dumps({k: v for k, v in r.items() if k != key}) for r in found[name]["rows"]}
        added = [json.loads(row)["model"] for row in after - before]
        assert not before - after, name
        assert set(added) == ({SOFT, UNTRAINED} if name == "sae_rebuilt" else {SOFT}), name
    for metric in ("top-and-random", "random-only"):
        null = Run(run).path / "scores" / UNTRAINED
        own = [s for s in read_scores(null) if s.control == "none"]
        mean = model_statistics(own, explainer="trie", metric=metric.replace("-", "_")).mean  # pyright: ignore
        (row,) = rows(found, "sae_policies", model="crate-2l+topk-2x", metric=metric)
        assert row["init"]["value"] == mean
    assert "sae_controls" not in tables
    assert not rows(tables, "sae_policies", model="crate-2l+topk-2x", metric="top-and-random")[0]["init"]  # fmt: skip
    assert "--freeze soft-decoder" in controlled.report.read_text()


@pytest.mark.parametrize(("control", "words"), [(SOFT, "decoder near its start"), (UNTRAINED, "untrained model")])  # fmt: skip
def test_latents_minus_those_of_random_controls(controlled, control, words):
    run = controlled.report.parent.parent
    found = json.loads((run / "report" / "tables.json").read_text())
    assert {r["control"] for r in found["sae_controls"]["rows"]} == {"decoder near its start", "untrained model"}  # fmt: skip
    a, b = ([s for s in read_scores(run / "scores" / n) if s.control == "none"] for n in ("crate-2l+topk-2x", control))  # fmt: skip
    for metric, shown in (("top_and_random", "top-and-random"), ("random_only", "random-only")):
        statuses = [Counter(str(s.score.status) for s in side if (s.explainer, s.metric) == ("trie", metric)) for side in (a, b)]  # fmt: skip
        for policy, words_of in (("leave_out", "left out"), ("count_zero", "counted as chance")):
            expected = compare_models(a, b, metric, explainer="trie", policy=policy, paired=False, resamples=200)  # fmt: skip
            (row,) = rows(found, "sae_controls", control=words, metric=shown, policy=words_of)
            assert row["models"] == f"crate-2l+topk-2x − {control}"
            assert row["difference"]["value"] == expected.difference
            assert (row["difference"]["low"], row["p_value"]) == (expected.low, expected.p_value)
            for side, of in zip("ab", statuses, strict=True):
                assert row[f"n_{side}"] == (of["defined"] if policy == "leave_out" else of.total())
                assert row[f"none_{side}"] == f"{of['undefined']} / {of['dead']} / {of['failed']}"


def test_losses_are_compared_on_the_same_documents(compared, tables):
    told = {m: json.loads((compared / "sae" / f"{m}@topk-2x" / "evaluation.json").read_text()) for m in MODELS}  # fmt: skip
    points = {r["model"]: r for r in tables["sae_loss_and_scores"]["rows"]}
    best = min(points, key=lambda name: points[name]["loss"]["value"])
    assert points[best]["above"]["value"] == 0
    name = best.partition("+")[0]
    sums = {m: told[m]["by_document"] for m in MODELS}
    base = np.array(sums[name]["reconstruction" if "+" in best else "loss"])
    targets = np.array(sums[name]["targets"], float)
    for m in MODELS:
        assert points[m]["loss"]["value"] == told[m]["loss"]["value"]
        assert points[m]["added"] is None
        spliced = told[m]["places"][-1]["reconstruction"]
        row = points[f"{m}+topk-2x"]
        assert row["loss"]["value"] == spliced["loss"]["value"]
        assert row["added"]["value"] == spliced["added"]["value"]
        above = ratio(np.array(sums[m]["reconstruction"]) - base, targets)
        assert row["above"]["value"] == pytest.approx(above.value)
        assert row["above"]["error"] == pytest.approx(above.error)
        assert sum(sums[m]["loss"]) / targets.sum() == pytest.approx(told[m]["loss"]["value"])


def test_the_rest_of_the_section(compared, tables):
    assert {r["same"] for r in tables["sae_budget"]["rows"]} == {"", "yes"}
    steered = {(r["model"], r["layer"]): r for r in tables["sae_steering"]["rows"]}
    assert len(steered) == 8
    for layer in (0, 1):
        assert steered["crate-2l", layer]["rebuilt"] == 0
        assert steered["crate-2l", layer]["added"]["value"] == 0
        assert steered["crate-2l", layer]["fidelity"]["value"] == pytest.approx(1, abs=1e-4)
        assert steered["crate-2l+topk-2x", layer]["fidelity"]["value"] < 0.9999
        assert steered["crate-2l+topk-2x", layer]["rebuilt"] > 0
    rebuilt = rows(tables, "sae_rebuilt", model="gpt2-2l+topk-2x")
    assert [r["layer"] for r in rebuilt] == ["0", "1", "all"]
    assert rebuilt[0]["l0"]["value"] == 4
    page = (compared / "report" / "report.html").read_text()
    assert '<h2 id="autoencoders">' in page
    assert '<a href="#autoencoders">' in page
    for figure in ("sae_scores", "sae_loss"):
        assert f'id="figure-{figure}"' in page
        assert (compared / "report" / "figures" / f"{figure}.png").is_file()
    assert "was not trained in this run" not in page
    text = (compared / "report" / "comparison.txt").read_text()
    assert "loss added by the reconstruction" in text


def test_the_page_tells_how_to_do_it_again(compared):
    page = (compared / "report" / "report.html").read_text()
    block = page[page.index("<pre><code>") :]
    lines = [ln for ln in block.splitlines() if ln.startswith(("<pre><code>cratelm", "cratelm"))]
    commands = [shlex.split(line.removeprefix("<pre><code>"))[1:] for line in lines]
    verbs = [split_words(words)[0] for words in commands]
    assert verbs.count("sae train") == verbs.count("sae evaluate") == 2
    latents = [i for i, words in enumerate(commands) if "--sae" in words and words[0] == "harvest"]
    assert len(latents) == 2
    assert max(i for i, v in enumerate(verbs) if v == "sae train") < min(latents)


def test_a_report_without_latents_has_no_section(scored):
    page = (scored / "report" / "report.html").read_text()
    assert "autoencoders" not in page
    assert "loss added" not in (scored / "report" / "comparison.txt").read_text()


def copied(compared, tmp_path) -> Path:
    shutil.copytree(compared, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.usefixtures("undrawn")
def test_figures_of_other_autoencoders_are_not_shown(compared, tmp_path):
    run = copied(compared, tmp_path)
    path = run / "sae" / "crate-2l@topk-2x" / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"identity": "of others"}))
    made = report(ReportConfig(run=run, neurons=0, resamples=100, force=True))
    page = made.page.read_text()
    assert "cratelm sae evaluate --run" in page[: page.index("<h2")]
    found = json.loads(made.tables.read_text())
    assert {r["model"] for r in found["sae_rebuilt"]["rows"]} == {"gpt2-2l+topk-2x"}
    assert {r["model"] for r in found["sae_policies"]["rows"]} >= {"crate-2l+topk-2x"}


@pytest.mark.usefixtures("undrawn")
def test_another_budget_is_told(compared, tmp_path):
    run = copied(compared, tmp_path)
    asked = HarvestConfig(run=run, model="crate-2l", sae="topk-2x", tokens=900, pilot_tokens=256, force=True)  # fmt: skip
    harvest(asked)
    explain(ExplainConfig(run=run, model="crate-2l+topk-2x", neurons=5, quiet=True, force=True))
    score(ScoreConfig(run=run, model="crate-2l+topk-2x", resamples=100, quiet=True, force=True))
    made = report(ReportConfig(run=run, neurons=0, resamples=100, force=True))
    found = json.loads(made.tables.read_text())
    (row,) = rows(found, "sae_budget", model="crate-2l+topk-2x")
    assert row["same"] == "no: tokens, seed differ"


@pytest.mark.usefixtures("undrawn")
def test_losses_on_other_tokens_are_not_subtracted(compared, tmp_path):
    run = copied(compared, tmp_path)
    assert main(["sae", "evaluate", "--run", str(run), "--model", "gpt2-2l", "--tokens", "300", "--steered", "0", "--quiet"]) == 0  # fmt: skip
    made = report(ReportConfig(run=run, neurons=0, resamples=100, force=True))
    found = json.loads(made.tables.read_text())
    assert {r["above"] for r in found["sae_loss_and_scores"]["rows"]} == {None}
    assert "The losses were measured on different tokens" in found["sae_loss_and_scores"]["note"]
    assert not (run / "report" / "figures" / "sae_loss.png").exists()
    assert {r["model"] for r in found["sae_steering"]["rows"]} == {"crate-2l", "crate-2l+topk-2x"}


@pytest.mark.usefixtures("undrawn")
def test_autoencoders_from_a_folder(compared, run, tmp_path):
    """Those that somebody else trained, for one model."""
    shutil.copytree(compared / "sae" / "crate-2l@topk-2x", tmp_path / "theirs")
    for name in ("completed.json", "evaluation.json", "sae.json"):
        (tmp_path / "theirs" / name).unlink()
    options = {"sae": str(tmp_path / "theirs"), "evaluate_tokens": 640, "quiet": True}
    with pytest.raises(InputError, match="is a folder of autoencoders for one model"):
        sae_compare(SaeCompareConfig(run=run, **options))
    result = sae_compare(SaeCompareConfig(run=run, models=("crate-2l",), **options))
    assert result.models == ("crate-2l", "crate-2l+theirs")
    found = json.loads((run / "report" / "tables.json").read_text())
    own = json.loads((compared / "report" / "tables.json").read_text())
    assert (run / "sae" / "crate-2l@theirs.json").is_file()
    (mine,), (theirs,) = (rows(t, "sae_rebuilt", model=f"crate-2l+{n}", layer="all") for t, n in ((own, "topk-2x"), (found, "theirs")))  # fmt: skip
    assert mine["added"] == theirs["added"]
    a, b = (pq.read_table(p / "scores" / f"crate-2l+{n}" / "scores.parquet") for p, n in ((compared, "topk-2x"), (run, "theirs")))  # fmt: skip
    assert a["value"].equals(b["value"])


def test_a_random_control_is_compared_by_its_name(run):
    usual = SaeCompareConfig(run=run, **SMALL).training("crate-2l")
    trained = sae_train(replace(usual, freeze="soft-decoder", sequence_length=32))
    name = "topk-2x-frozen-soft-decoder"
    assert trained.name == f"crate-2l@{name}"
    compare = SaeCompareConfig(run=run, sae=name, evaluate_tokens=640, quiet=True)
    pending = steps(compare, ["crate-2l"])
    latents = f"crate-2l+{name}"
    assert [step.label for step in pending] == [
        f"{stage} {latents}" for stage in ("evaluation", "activations", "explanations", "scores")
    ]
    for step in pending[:2]:
        step.work()
    harvested = Run(run).stage("activations", latents).require()
    assert harvested.input_stages["sae"] == f"sae/crate-2l@{name}"


def test_every_key_of_an_evaluation_is_documented(compared):
    written = json.loads((compared / "sae" / "crate-2l@topk-2x" / "evaluation.json").read_text())
    text = (Path(__file__).parents[1] / "docs" / "files.md").read_text()
    section = text[text.index("### `evaluation.json`") :].partition("\n## ")[0]
    keys = [ln.split("`")[1] for ln in section.splitlines() if ln.startswith("| `")]
    assert sorted(keys) == sorted(written)


# ---- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"models": ("crate-9l",)}, "crate-9l is missing or not finished: type `cratelm score"),
        ({"models": ("crate-2l", "crate-2l")}, "name each model once"),
        ({"sae": "l1-16x"}, "is neither a folder nor a name in the run"),
        ({"train_tokens": 8, "batch_size": 64}, "--train-tokens 8 is less than one batch"),
        ({"architecture": "l1", "k": 3}, "--k is an option of topk and batchtopk"),
        ({"evaluate_tokens": 0}, "--evaluate-tokens must be at least 1, not 0"),
        ({"freeze": ("decoder", "decoder")}, "--freeze decoder decoder: name each part once"),
        ({"freeze": ("decoder",), "sae": "l1-16x"}, "--freeze trains others: omit one of them"),
        ({"freeze": ("head",)}, "choose from decoder, soft-decoder, encoder"),
    ],
)
def test_what_cannot_be_compared_is_told(run, options, told):
    with pytest.raises(InputError, match=told):
        sae_compare(SaeCompareConfig(run=run, **options))
    assert not (run / "sae").exists()


def test_a_run_without_scores_is_told(run, capsys):
    shutil.rmtree(run / "scores")
    assert main(["sae", "compare", "--run", str(run)]) == 2
    assert "no neurons of" in capsys.readouterr().err


def test_neurons_named_one_by_one_have_no_latents(run):
    explain(ExplainConfig(run=run, model="crate-2l", only=("0:3",), quiet=True, force=True))
    score(ScoreConfig(run=run, model="crate-2l", resamples=100, quiet=True, force=True))
    with pytest.raises(InputError, match="--only, which selects neurons but cannot select latents"):
        sae_compare(SaeCompareConfig(run=run, **SMALL))


def test_latents_of_latents_are_refused(compared):
    with pytest.raises(
        InputError, match=r"crate-2l\+topk-2x already consists of latents: name crate-2l"
    ):
        sae_compare(SaeCompareConfig(run=compared, models=("crate-2l+topk-2x",), **SMALL))


# ---- in the demo ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_demo_with_autoencoders(tmp_path, monkeypatch, capsys):
    demo_module = importlib.import_module("cratelm.pipelines.demo")
    monkeypatch.setattr(demo_module, "_SAE_TOKENS", 2048)
    monkeypatch.setattr(demo_module, "_ANALYZED", 2000)
    monkeypatch.setattr(demo_module, "_measure", lambda name, config: (0.1, 1e-5))
    corpus = write_corpus(tmp_path / "corpus.jsonl", 300)
    result = demo_module.demo(DemoConfig(
        run=tmp_path / "run", corpus=str(corpus), size="1l", vocab_size=300, steps=4, tokens=3000,
        neurons=6, sae=True,
    ))  # fmt: skip
    told = capsys.readouterr().out
    assert "autoencoders" in told.splitlines()[0]
    assert "[34/34] report" in told
    assert "crate-1l+topk-2x" in result.table
    assert "loss added by the reconstruction" in result.table
    assert '<h2 id="autoencoders">' in result.report.read_text()


def test_every_option_has_a_default_of_training():
    """So that `sae train --name` and `sae compare` without options mean the same autoencoders."""
    ours, theirs = (config_class(v)() for v in ("sae compare", "sae train"))
    assert ours.training("crate-2l") == theirs
