"""Null controls made from a trained model, and models with frozen parts: what stays, what changes, how they are shown."""

import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_llm import FakeModel
from safetensors.torch import load_file
from test_train import SMALL, TINY, T, make_run

from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import harvest
from cratelm.cli import main
from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.models import build, load
from cratelm.models.nulls import null_control
from cratelm.models.parts import freeze, parts_of
from cratelm.report.cells import METRIC_NAMES, mean_cell
from cratelm.report.config import ReportConfig
from cratelm.report.reproduce import commands
from cratelm.report.sections.llm import side_by_side_table
from cratelm.report.sections.scores import nulls_table
from cratelm.results.run_results import missing_results, read_results
from cratelm.results.run_summary import run_card
from cratelm.runs import Run, hash_json, names
from cratelm.sae.train_config import SaeTrainConfig
from cratelm.score.config import ScoreConfig
from cratelm.score.score import score
from cratelm.score.store import read_scores
from cratelm.tokens.shards import TokenStore
from cratelm.train.config import TrainConfig
from cratelm.train.loop import train
from cratelm.train.optimizers import make_optimizers

NULLS = ("crate-2l-embeddings", "crate-2l-permuted")
SHAPE: dict[str, Any] = {"vocab_size": 40, "max_position_embeddings": 8, "hidden_size": 16, "num_attention_heads": 2}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained CRATE, its untrained control, and the two nulls made from it."""
    path = make_run(tmp_path_factory.mktemp("nulls"))
    train(TrainConfig(run=path, **SMALL))
    train(TrainConfig(run=path, **{**SMALL, "steps": 0}))
    for kind in ("permuted", "embeddings"):
        train(TrainConfig(run=path, null=kind, quiet=True))
    return path


def trained_like(name: str, **others: Any) -> Any:
    """A model of random weights, also in the vectors, that no initialisation would give."""
    model = build(name, **SHAPE, **others)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def in_blocks(name: str) -> bool:
    return ".layers." in name or ".h." in name


KINDS = [("crate-2l", {}), ("crate-1l", {"decoupled_dictionary": True}), ("gpt2-2l", {})]


# ---- nulls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "others"), KINDS)
def test_permuted_keeps_the_values_of_each_tensor_of_the_blocks_and_all_else(name, others):
    trained = trained_like(name, **others)
    before = state(trained)
    after = state(null_control(trained, "permuted", 3))
    assert any(in_blocks(key) for key in before)
    for key, old in before.items():
        new = after[key]
        assert torch.equal(new.flatten().sort().values, old.flatten().sort().values), key
        assert torch.equal(new, old) != in_blocks(key), key
        if in_blocks(key) and new.ndim == 2:
            assert (new == old).float().mean() < 0.05, key
            rows = {tuple(row.sort().values.tolist()) for row in old}
            assert not any(tuple(row.sort().values.tolist()) in rows for row in new), key
    again = state(null_control(trained_like(name, **others), "permuted", 3))
    other = state(null_control(trained_like(name, **others), "permuted", 4))
    assert all(torch.equal(again[key], after[key]) for key in after)
    assert not any(torch.equal(other[key], after[key]) for key in after if in_blocks(key))


@pytest.mark.parametrize(("name", "others"), [*KINDS, ("crate-1l", {"tie_word_embeddings": False})])
def test_embeddings_keeps_these_and_starts_the_rest_anew(name, others):
    trained = trained_like(name, **others)
    before, fresh = state(trained), state(build(name, seed=3, **SHAPE, **others))
    after = state(null_control(trained, "embeddings", 3))
    kept = {key for key in after if "embed" in key or "wte" in key or "wpe" in key or "head" in key}
    assert len(kept) == (3 if "tie_word_embeddings" in others else 2)
    for key, new in after.items():
        assert torch.equal(new, (before if key in kept else fresh)[key]), key


def test_a_null_is_a_model_of_the_run_made_from_the_trained_one(run, capsys):
    trained = Run(run).stage("model", "crate-2l")
    for name, kind in zip(NULLS, ("embeddings", "permuted"), strict=True):
        stage = Run(run).stage("model", name)
        done = stage.require()
        assert done.inputs["model"] == trained.require().identity
        assert (done.config["sequence_length"], done.results["steps"]) == (T, 0)
        expected = null_control(load(trained.path), kind, 0)
        saved = load_file(stage.path / "model.safetensors")
        assert saved.keys() <= expected.state_dict().keys()
        assert all(torch.equal(expected.state_dict()[key], saved[key]) for key in saved)
        assert (stage.path / "config.json").read_bytes() == (trained.path / "config.json").read_bytes()  # fmt: skip
        capsys.readouterr()
        train(TrainConfig(run=run, null=kind, quiet=True))
        assert f"model/{name} is finished, skipped" in capsys.readouterr().out
    assert Run(run).null_controls(Run(run).models()) == dict.fromkeys([*NULLS, "crate-2l-init"], "crate-2l")  # fmt: skip


def test_a_null_is_stale_after_another_training(run, tmp_path):
    path = make_run(tmp_path)
    few = {**SMALL, "steps": 1, "validate_every": 1}
    train(TrainConfig(run=path, **few))
    train(TrainConfig(run=path, null="permuted", quiet=True))
    train(TrainConfig(run=path, **few, seed=1, name="crate-2l", force=True))
    freshness = Run(path).stage("model", "crate-2l-permuted").freshness()
    assert freshness.is_stale
    assert freshness.commands == (f"cratelm train --run {path} --model crate-2l --null permuted --force",)  # fmt: skip


def test_names_of_nulls():
    for kind in names.NULLS:
        assert names.untrained_name("m+s", kind) == f"m-{kind}+s"
        assert names.trained_name(f"m-{kind}+s") == "m+s"
        assert names.null_kind(f"m-{kind}") == names.null_kind(f"m-{kind}+s") == kind
    assert names.trained_name("-permuted") == names.trained_name("m-frozen-embeddings-x") == ""
    assert names.null_controls(["X", "X-permuted"], {"X-permuted"}.__contains__) == {"X-permuted": "X"}  # fmt: skip
    assert names.null_controls(["X", "X-permuted"], lambda _: False) == {}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model": "gpt2-2l"}, "type `cratelm train --run .* --model gpt2-2l` first"),
        ({"model": "crate-2l-init"}, "crate-2l-init was not trained, but --null"),
        ({"model": "crate-2l", "steps": 5}, "without training it: omit --steps"),
        ({"model": "crate-2l", "freeze": ("attention",)}, "omit --freeze"),
        ({"model": "crate-2l", "model_overrides": TINY}, "omit --model-overrides"),
        ({"model": "crate-2l", "name": "x", "sequence_length": 17}, "longer than the 16 positions of crate-2l"),
        ({"model": "crate-2l", "null": "shuffled"}, "choose from permuted, embeddings"),
    ],
)  # fmt: skip
def test_what_has_no_null_is_one_line(run, options, expected):
    with pytest.raises(InputError, match=expected) as raised:
        train(TrainConfig(run=run, **{"null": "permuted", "quiet": True, **options}))
    assert "\n" not in str(raised.value)
    assert not (run / "model" / "x").exists()


def scored(run: Path, name: str) -> None:
    common: dict[str, Any] = {"run": run, "model": name, "quiet": True}
    harvest(HarvestConfig(**common, tokens=1000, pilot_tokens=256, top=10, device="cpu"))
    explain(ExplainConfig(**common, neurons=6, explainers=("lookup",)))
    score(ScoreConfig(**common, resamples=100, metrics=("random_only",), all_tokens=False))


@pytest.fixture(scope="module")
def scored_run(run) -> Path:
    """The run, in which the model and its three nulls are scored."""
    for name in ("crate-2l", "crate-2l-init", *NULLS):
        scored(run, name)
    return run


def test_nulls_are_controls_of_their_family_in_report_and_browser(scored_run, monkeypatch):
    pytest.importorskip("sklearn", reason="the extra `viewer` is not installed")
    from cratelm.viewer.drawings import scores_by_layer
    from cratelm.viewer.pages import Pages
    from cratelm.viewer.run_reader import Library

    run = scored_run
    results = read_results(Run(run))
    assert [m.name for m in results.principal] == ["crate-2l"]
    assert all(results.model(f"crate-2l-{kind}").null_of == "crate-2l" for kind in names.NULLS)  # pyright: ignore
    table = nulls_table(results)
    columns = [column.key for column in table.columns]
    assert columns[3:7] == ["shuffled", *names.NULLS]
    for metric, row in zip(results.metrics, table.rows, strict=True):
        cells = dict(zip(columns, row, strict=True))
        nulls = {kind: results.model(f"crate-2l-{kind}") for kind in names.NULLS}
        expected = {kind: mean_cell(m.find(results.explainer, metric)) for kind, m in nulls.items()}  # pyright: ignore
        assert {kind: cells[kind] for kind in names.NULLS} == expected
        assert len(set(map(str, expected.values()))) == 3
    typed = commands(results, ReportConfig(run=run)).splitlines()
    (line,) = [x for x in typed if "train" in x and "--null permuted" in x]
    assert "--name" not in line
    page = Pages(Library([run]), live=False).overview()
    assert all(f"null: {words}" in page for words in ("untrained model", "permuted weights", "only embeddings trained"))  # fmt: skip
    assert "Y with permuted weights, inverted Y with only the embeddings trained" in page
    drawn = []
    monkeypatch.setattr("cratelm.viewer.drawings.scores_panel", lambda title, series, lines: drawn.extend(series))  # fmt: skip
    with pytest.raises(AttributeError):  # the panel is none
        scores_by_layer(run_card("run", Run(run)), "random_only")
    assert [series.null for series in drawn] == ["", *names.NULLS]
    assert "Null controls: " in page
    assert all(name in page for name in NULLS)


# ---- with a language model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(scored_run, tmp_path_factory) -> Path:
    """A copy of the run, whose model a made-up language model has explained and scored, and none of its controls."""
    path = tmp_path_factory.mktemp("asked") / "run"
    shutil.copytree(scored_run, path)
    with answering():
        ask(path, "crate-2l")
    return path


@pytest.fixture(scope="module")
def all_asked(asked, tmp_path_factory) -> Path:
    """The run after the commands that it names for the untrained model, and the same for the others."""
    path = Path(shutil.copytree(asked, tmp_path_factory.mktemp("all_asked") / "run"))
    train(TrainConfig(run=path, **{**SMALL, "steps": 1, "validate_every": 1}, freeze=("dictionary",)))  # fmt: skip
    harvest(HarvestConfig(run=path, model=FROZEN, tokens=1000, pilot_tokens=256, top=10, device="cpu", quiet=True))  # fmt: skip
    with answering():
        for command in commands_in(missing_of_untrained(path)[0]):
            assert main([*command[1:], "--quiet"]) == 0
        for name in (*NULLS, FROZEN):
            ask(path, name)
    return path


FROZEN = "crate-2l-frozen-dictionary"


@contextmanager
def answering() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cratelm.llm.session._backend", lambda config, spec: FakeModel())
        yield


def ask(run: Path, name: str) -> None:
    common: dict[str, Any] = {"run": run, "model": name, "quiet": True}
    explain(ExplainConfig(**common, explainer="hf:any", neurons=3, seed=1))
    metrics = ("random_only", "detection")
    score(ScoreConfig(**common, simulator="hf:any", metrics=metrics, resamples=100))


def missing_of_untrained(run: Path) -> list[str]:
    return [line for line in missing_results(read_results(Run(run))) if "crate-2l-init" in line]


def commands_in(line: str) -> list[list[str]]:
    return [shlex.split(command) for command in re.findall("`(cratelm [^`]*)`", line)]


def test_a_control_that_no_language_model_has_scored_is_named_with_the_commands(asked, all_asked, tmp_path):  # fmt: skip
    (line,) = missing_of_untrained(asked)
    assert line.startswith("scores by fake of crate-2l-init, the untrained control of crate-2l (")
    assert [command[1] for command in commands_in(line)] == ["explain", "score"]
    cards = {card.name: card.missing for card in run_card("run", Run(asked)).models}
    (shown,) = cards.pop("crate-2l-init")
    assert commands_in(shown) == commands_in(line)
    assert not any(cards.values())

    rows = [
        [(s.neuron.key, s.metric, s.control) for s in read_scores(all_asked / "scores" / f"{name}@fake")]
        for name in ("crate-2l", "crate-2l-init")
    ]  # fmt: skip
    assert rows[0] == rows[1] != []
    assert missing_of_untrained(all_asked) == []
    without = Path(shutil.copytree(all_asked, tmp_path / "run"))
    shutil.rmtree(without / "scores" / "crate-2l-init@fake")
    (line,) = missing_of_untrained(without)
    assert [command[1] for command in commands_in(line)] == ["score"]


def test_a_language_model_scores_every_control_in_the_same_table(all_asked):
    results = read_results(Run(all_asked))
    table = side_by_side_table(results, 100, 0)
    keys = [column.key for column in table.columns]
    rows = [dict(zip(keys, row, strict=True)) for row in table.rows]
    of_llm = [r for r in rows if (r["explainer"], r["neurons"]) == ("fake", 6)]
    whole = {(r["model"], r["metric"]): r for r in of_llm}
    for metric in ("random_only", "detection"):
        row = whole["crate-2l", METRIC_NAMES[metric]]
        for kind in names.NULLS:
            null = results.model(f"crate-2l-{kind}")
            assert null is not None
            expected = mean_cell(null.find("fake", metric))
            assert expected is not None
            assert row[kind] == whole[null.name, METRIC_NAMES[metric]]["mean"] == expected
        assert whole[FROZEN, METRIC_NAMES[metric]]["mean"] is not None
    assert len({str(whole["crate-2l", "random-only"][kind]) for kind in names.NULLS}) == 3


def test_the_browser_shows_scores_by_a_language_model_next_to_their_nulls(asked, all_asked, tmp_path):  # fmt: skip
    pytest.importorskip("sklearn", reason="the extra `viewer` is not installed")
    from cratelm.viewer.pages import Pages
    from cratelm.viewer.run_reader import Library

    def lines_of(run: Path, label: str) -> dict[str, str]:
        """By the name of the row: the first cell of the rows that belong to a metric."""
        page = Pages(Library([run]), live=False).overview()
        rows = re.findall(r'<tr class="(\w+)"><th scope="row">(.*?)</th><td class="r">(.*?)</td>', page)  # fmt: skip
        start = next(i for i, (_, name, _) in enumerate(rows) if name.startswith(label))
        stop = next(i for i in range(start + 1, len(rows)) if rows[i][0] == "head")
        return {name: cell for _, name, cell in rows[start + 1 : stop]}

    assert lines_of(asked, "fake: detection")["null: untrained model"] == "–"
    nulls = {m.name: m for m in read_results(Run(all_asked)).models if m.null_of}
    words = ("untrained model", "permuted weights", "only embeddings trained")
    for metric in ("random_only", "detection"):
        shown = lines_of(all_asked, f"fake: {METRIC_NAMES[metric]}")
        for name, row in zip(("crate-2l-init", *NULLS[::-1]), words, strict=True):
            found = nulls[name].find("fake", metric)
            assert found is not None
            assert shown[f"null: {row}"] == f"{found.mean:.1f}"

    # A null that a language model alone has scored is not shown next to scores by the look-up.
    without = Path(shutil.copytree(all_asked, tmp_path / "run"))
    before = lines_of(without, "random-only")
    shutil.rmtree(without / "scores" / "crate-2l-permuted")
    shown = lines_of(without, "random-only")
    assert shown == before | {"null: permuted weights": "–"} != before


# ---- frozen parts -----------------------------------------------------------------------------------

PARTS = [
    ("crate-2l", ("dictionary",)),
    ("crate-2l", ("attention", "dictionary", "embeddings")),
    ("gpt2-2l", ("mlp",)),
    ("gpt2-2l", ("embeddings",)),
]


@pytest.mark.parametrize(("model", "parts"), PARTS)
def test_frozen_parts_keep_their_bits_and_the_others_are_trained(run, model, parts):
    config = TrainConfig(run=run, **{**SMALL, "steps": 4, "checkpoint_every": 2}, model=model, freeze=parts, seed=2)  # fmt: skip
    result = train(config)
    assert result.name == f"{model}-frozen-{'-'.join(parts)}-seed2"
    vocab = TokenStore(run / "tokens").padded_vocab_size
    fresh = build(model, vocab_size=vocab, max_position_embeddings=T, seed=2, hidden_size=32, num_attention_heads=2)  # fmt: skip
    of_parts = {id(p) for part in parts for p in parts_of(fresh)[part]}
    biases = {id(p) for p in fresh.parameters() if not p.requires_grad}
    saved = load_file(result.path / "model.safetensors")
    for name, start in fresh.named_parameters():
        frozen = id(start) in of_parts | biases
        assert torch.equal(saved[name], start) == frozen, name
    assert result.parameters == sum(
        p.numel()
        for name, p in fresh.named_parameters()
        if id(p) not in of_parts | biases and "embed_positions" not in name and "wpe" not in name
    )
    recorded = Run(run).stage("model", result.name).require().config
    assert recorded["freeze"] == sorted(parts)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_frozen_part_has_no_state(kind):
    model = build("crate-1l", **SHAPE)
    freeze(model, ["dictionary", "embeddings"])
    optimizers = make_optimizers(model, kind, 0.1)
    updated = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    parts = parts_of(model)
    frozen = [id(p) for part in ("dictionary", "embeddings") for p in parts[part]]
    assert len(frozen) == 3
    assert not updated & set(frozen)
    assert updated == {id(p) for p in model.parameters()} - set(frozen)
    freeze(model, ["attention"])
    (only,) = make_optimizers(model, kind, 0.1)
    assert isinstance(only, torch.optim.AdamW)


@pytest.mark.parametrize(
    ("model", "part", "others"),
    [("crate-2l", "mlp", "dictionary, attention, embeddings"), ("gpt2-2l", "dictionary", "mlp, attention, embeddings")],
)  # fmt: skip
def test_a_part_that_the_family_lacks_is_one_line(run, model, part, others):
    config = TrainConfig(run=run, **SMALL, model=model, freeze=(part,), name="lacking")
    with pytest.raises(InputError, match=f"--freeze is {part}, .*: choose from {others}$"):
        train(config)
    assert not (run / "model" / "lacking").exists()
    with pytest.raises(InputError, match="choose from dictionary, mlp, attention, embeddings"):
        TrainConfig(freeze=("head",))  # pyright: ignore


def test_identities_are_those_before_there_were_controls():
    """Hashes written down from the version without `--freeze` and `--null`."""
    given = TrainConfig(model="crate-2l", steps=7)
    assert hash_json(given.identity()) == "53389d3d888c8074b2602a325b1eb838ce9d6f30dd5f09e770cd711ab6f7c6c3"  # fmt: skip
    sae = SaeTrainConfig(model="crate-2l", k=4, architecture="topk").settings()
    assert hash_json(sae.values) == "a131ac628c9fecbd2569bc9a00f7e4dcdfefce02c2e0135de70baffee05aa684"  # fmt: skip
    frozen = TrainConfig(model="crate-2l", steps=7, freeze=("embeddings", "dictionary"))
    assert frozen.identity()["freeze"] == ["dictionary", "embeddings"]
    assert frozen.folder == "crate-2l-frozen-dictionary-embeddings"
    assert SaeTrainConfig(freeze="encoder").settings().values["freeze"] == "encoder"
