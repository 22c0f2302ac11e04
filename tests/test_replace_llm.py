"""Models that run on explanations that a language model reads: calibration, nulls, failed calls, budgets, the verb."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_llm import FakeModel
from test_activations import EOT
from test_replace import CPU, any_model, plan_of, split_of, text_of
from test_steer import small_run

import cratelm
from cratelm.cli import main
from cratelm.errors import BudgetReached, InputError
from cratelm.explain.named_set import simulated_label, simulated_name
from cratelm.llm.client import DryRun, WorkerResult
from cratelm.models import site_of
from cratelm.replace.config import ReplaceConfig
from cratelm.replace.fit import FitText
from cratelm.replace.forward import ExplainedModel
from cratelm.replace.layers import ALL, LayerSet
from cratelm.replace.levels import PIECE, Levels, Simulated, pieces_of, tokens_of_pieces
from cratelm.replace.measure import HeldOut, Shuffled, Variant, measure
from cratelm.replace.predictors import Constant
from cratelm.replace.replace import replace
from cratelm.replace.store import read_curve, read_documents, read_neurons
from cratelm.replace.text import BatchText
from cratelm.report.sections.replacement import replacement_table
from cratelm.results.replacement import read_replacement
from cratelm.results.run_results import read_results
from cratelm.runs import Run
from cratelm.runs.ranks import Ranks

# ---- pieces and levels ----------------------------------------------------------------------------


def test_pieces_are_the_text_of_one_document_and_at_most_64_tokens():
    rng = np.random.default_rng(0)
    split = split_of([rng.integers(1, 40, n) for n in (3, 200, 70, 64, 1)])
    plan = plan_of(split, length=150)
    texts = [BatchText.of(b) for b in plan.batches(150, CPU)]
    covered = 0
    for text in texts:
        for low, high in pieces_of(text):
            assert 0 < high - low <= PIECE
            assert len(set(text.document[low:high])) == 1
            assert (text.ids[low:high] != EOT).all()
            covered += high - low
    assert covered == 3 + 200 + 70 + 64 + 1
    pieces = tokens_of_pieces([*texts, *texts])
    assert len(pieces) == sum(len(pieces_of(text)) for text in texts)  # equal ones count once
    assert all(piece.tobytes() == key for key, piece in pieces.items())


@pytest.fixture
def text() -> BatchText:
    rng = np.random.default_rng(0)
    return text_of(split_of([rng.integers(1, 40, 15) for _ in range(12)]))


def levels_of(text: BatchText, neurons: list[int], values: np.ndarray) -> Levels:
    """Levels [n, K] at the text tokens of a batch, by piece."""
    levels = Levels(np.array(neurons))
    for low, high in pieces_of(text):
        for column in range(len(neurons)):
            levels.put(text.ids[low:high], column, values[low:high, column])
    return levels


def test_levels_are_calibrated_by_least_squares_on_the_fit_tokens(text):
    rng = np.random.default_rng(1)
    values = rng.random((text.n_tokens, 4))
    activations = rng.random((text.n_tokens, 6)).astype(np.float32)
    activations[:, 5] = 3 * values[:, 2] - 0.25 + 0.1 * activations[:, 5]
    activations[:, 4] = 1 - values[:, 1]  # falls with its level
    values[:, 3] = 0.5  # no level differs from another
    means = rng.random(6).astype(np.float32)
    neurons = [0, 4, 5, 2]
    levels = levels_of(text, neurons, values)
    (low, high), *_ = pieces_of(text)
    levels.by_piece[text.ids[low:high].tobytes()][:, 2] = np.nan  # a failed call
    made = Simulated.calibrated(levels, [(text, activations)], means)
    used = (text.document >= 0) & ~np.isin(np.arange(text.n_tokens), np.arange(low, high))
    slope, intercept = np.polyfit(values[used, 2], activations[used, 5], 1)
    assert made.slope[2] == pytest.approx(slope)
    assert made.intercept[2] == pytest.approx(intercept)
    predicted = made.predict(text)
    is_text = text.document >= 0
    assert predicted[used, 5] == pytest.approx(intercept + slope * values[used, 2], rel=1e-5)
    assert (predicted[low:high, 5] == means[5]).all()  # where the call failed
    assert (predicted[~is_text] == means).all()  # end marks
    for constant in (1, 2, 3, 4):  # without an explanation, or an activation that does not rise
        assert (predicted[:, constant] == means[constant]).all()
    assert len(np.unique(predicted[is_text, 0])) > 1 or made.slope[0] == 0
    assert [made.context_length(text, at, 5) for at in (low, high - 1)] == [0, 0]
    (start, _) = pieces_of(text)[1]
    assert [made.context_length(text, start + i, 5) for i in (0, 1, 2)] == [1, 2, 3]
    assert made.context_length(text, start, 1) == 0


def test_other_text_has_no_level(text):
    levels = levels_of(text, [0], np.ones((text.n_tokens, 1)))
    other = BatchText(text.ids[None, :15] + 1, np.zeros((1, 15), int))
    assert np.isnan(levels.at(other)).all()
    assert np.isfinite(levels.at(text)[text.document >= 0]).all()


def test_shuffled_stays_among_the_replaced_neurons():
    mask = np.array([True, False, True, True, False])
    sets = [LayerSet(ALL, (0,), {0: mask})]
    means = np.arange(5, dtype=np.float32)
    by = Shuffled.of(sets, means, 0, 0)
    assert sorted(by.order[mask]) == [0, 2, 3]
    assert (by.order[mask] != np.flatnonzero(mask)).all()
    codes = 10 + np.arange(10, dtype=np.float32).reshape(2, 5)
    assert (by.codes(codes)[:, mask] == codes[:, by.order[mask]]).all()
    alone = Shuffled.of([LayerSet(ALL, (0,), {0: means == 2})], means, 0, 0)
    assert (
        alone.codes(codes)[:, 2] == 2
    ).all()  # no other neuron: its mean, not its own explanation
    whole = Shuffled.of([], means, 0, 0)
    assert sorted(whole.order) == [0, 1, 2, 3, 4]
    assert (whole.order != np.arange(5)).all()


# ---- running on simulated levels ------------------------------------------------------------------


def documents_of_sequences(n: int, seed: int) -> Any:
    """A split in which every sequence of 16 tokens is one document with its end mark."""
    rng = np.random.default_rng(seed)
    return split_of([rng.integers(1, 40, 15) for _ in range(n)])


@pytest.fixture(scope="module", params=["crate", "gpt2", "neox"])
def subject(request):
    """A model of two layers, its true codes on held-out text, and seven neurons that are replaced."""
    model = any_model(request.param)
    site = site_of(model)
    explained = ExplainedModel(model, site)
    plan = plan_of(documents_of_sequences(12, 1), "held_out")
    held_out = HeldOut(explained, plan, 64, 101, True)
    texts, codes = [], []
    for batch, of in held_out.batches(Ranks().share, "", 0):
        texts.append(of)
        trace = explained.trace(batch.input_ids)
        codes.append([a.flatten(0, 1).numpy() for a in trace.activations])
    neurons = {0: [1, 5, 7, 11], 1: [0, 2, 9]}
    masks = {p: np.isin(np.arange(site.n_neurons[p]), of) for p, of in neurons.items()}
    means = [np.concatenate([c[p] for c in codes]).mean(0) + 0.3 for p in (0, 1)]
    fit = FitText.of(plan_of(documents_of_sequences(12, 2)), 64, 2, 101)
    return SimpleNamespace(
        model=model, site=site, explained=explained, held_out=held_out, texts=texts, codes=codes,
        neurons=neurons, replaced=LayerSet(ALL, (0, 1), masks), means=means, fit=fit,
    )  # fmt: skip


def simulated(subject, change=lambda place, values: values) -> list[Simulated]:
    """Predictors whose levels are a third of the true activations, changed."""
    predictors = []
    for place, neurons in subject.neurons.items():
        levels = Levels(np.array(neurons))
        for text, codes in zip(subject.texts, subject.codes, strict=True):
            values = change(place, codes[place][:, neurons] / 3.0)
            levels.by_piece |= levels_of(text, neurons, values).by_piece
        fit = [(t, c[place]) for t, c in zip(subject.texts, subject.codes, strict=True)]
        predictors.append(Simulated.calibrated(levels, fit, subject.means[place]))
    return predictors


def losses_of(subject, explained) -> dict[Variant, np.ndarray]:
    losses, _ = measure(
        subject.held_out, explained, subject.means, [subject.replaced],
        (subject.fit.contexts, subject.fit.ngrams), [10.0, 10.0], 0, Ranks(),
    )  # fmt: skip
    return losses.sums


def test_levels_that_equal_the_activations_give_the_loss_of_the_model(subject):
    sums = losses_of(subject, {"x": simulated(subject)})
    true = sums[Variant("none")]
    assert sums[Variant("own", "x", ALL)] == pytest.approx(true, rel=1e-5)
    for other in ("mean", "zero"):
        assert abs(sums[Variant(other, layers=ALL)] - true).max() > 1e-3  # type: ignore[arg-type]
    assert abs(sums[Variant("shuffled", "x", ALL)] - true).max() > 1e-3


def test_constant_levels_give_the_loss_at_the_means(subject):
    sums = losses_of(subject, {"x": simulated(subject, lambda _, v: np.full_like(v, 0.5))})
    assert (sums[Variant("own", "x", ALL)] == sums[Variant("mean", layers=ALL)]).all()
    assert (sums[Variant("shuffled", "x", ALL)] != sums[Variant("none")]).any()


def test_other_neurons_stay_what_the_model_computes(subject):
    """Against hooks on the whole model that replace the chosen neurons alone."""
    from cratelm.models.sites import hooked

    sums = losses_of(subject, {"x": [Constant(np.full_like(m, 0.7)) for m in subject.means]})
    masks = subject.replaced.neurons
    total = 0.0
    for batch, text in subject.held_out.batches(Ranks().share, "", 0):

        def put(place, activations):
            return torch.where(torch.from_numpy(masks[place]), 0.7, activations)

        with torch.no_grad(), hooked(subject.model, subject.site, put):
            logits = subject.model(input_ids=batch.input_ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none"
        )
        total += losses.view(-1, 15)[torch.from_numpy(text.document.reshape(-1, 16)[:, :-1] >= 0)].sum().item()  # fmt: skip
    assert sums[Variant("own", "x", ALL)].sum() == pytest.approx(total, rel=1e-5)


def test_nothing_of_the_truth_leaks_where_a_call_failed(subject):
    """The true codes of the replaced neurons are poisoned at a piece whose calls failed, and at all others."""
    predictors = simulated(subject)
    failed = subject.texts[0].ids[:15].tobytes()
    for predictor in predictors:
        predictor.levels.by_piece[failed][:] = np.nan
    for place, predictor in enumerate(predictors):
        neurons = subject.neurons[place]
        first = predictor.predict(subject.texts[0])[:15][:, neurons]
        assert (first == subject.means[place][neurons]).all()
    expected = losses_of(subject, {"x": predictors})[Variant("own", "x", ALL)]
    masks = subject.replaced.neurons
    handles = []
    for place, path in enumerate(subject.site.paths):
        chosen = torch.from_numpy(masks[place])

        def poison(module, args, output=None, chosen=chosen):
            codes = args[0] if output is None else output
            bad = torch.where(chosen, torch.nan, codes)
            return (bad,) if output is None else bad

        module = subject.model.get_submodule(path)
        if subject.site.side == "output":
            handles.append(module.register_forward_hook(poison, prepend=True))
        else:
            handles.append(module.register_forward_pre_hook(poison, prepend=True))
    # the stored outputs of blocks are those before the poison, as they do not depend on what is replaced
    found = losses_with_clean_traces(subject, predictors, handles)
    assert np.isfinite(found).all()
    assert found == pytest.approx(expected, rel=1e-5)


def losses_with_clean_traces(subject, predictors, handles) -> np.ndarray:
    """Losses by document with hooks of the model that stay, and are removed in the end."""
    losses = subject.held_out.losses()
    masks = {p: torch.from_numpy(of) for p, of in subject.replaced.neurons.items()}
    for batch, text in subject.held_out.batches(Ranks().share, "", 0):
        trace = subject.explained.trace(batch.input_ids)
        assert torch.isnan(trace.activations[0]).any()  # poisoned: it is seen
        trace.outputs.clear()  # no block is skipped
        codes = {p: of.predict(text) for p, of in enumerate(predictors)}
        of_batch = subject.held_out.token_losses(trace, text, codes, masks)
        losses.add(Variant("own", "x", ALL), losses.columns(text), of_batch)
        assert np.isnan(subject.held_out.token_losses(trace, text, {})).any()
    for handle in handles:
        handle.remove()
    return losses.sums[Variant("own", "x", ALL)]


# ---- the verb -------------------------------------------------------------------------------------

MODELS = ("crate-2l", "gpt2-2l")
OPTIONS: dict[str, Any] = {
    "simulator": "hf:any", "explainers": ("lookup", "trie:20"), "fit_tokens": 2000, "resamples": 200,
    "depth": 2, "quiet": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def explained_run(tmp_path_factory) -> Path:
    """A run with two models, of which six neurons per layer are explained by the made-up language model."""
    run = small_run(tmp_path_factory.mktemp("replace_llm") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cratelm.llm.session._backend", lambda config, spec: FakeModel())
        for model in MODELS:
            cratelm.api.harvest(
                run=run.path, model=model, tokens=3000, top=10, random=10, per_bin=4, device="cpu",
                quiet=True,
            )  # fmt: skip
            cratelm.api.explain(
                run=run.path, model=model, explainer="hf:any", neurons=6, quiet=True
            )
    return run.path


@pytest.fixture
def path(explained_run, tmp_path) -> Path:
    """A copy, to be written to."""
    return Path(shutil.copytree(explained_run, tmp_path / "run"))


@pytest.fixture
def fake(monkeypatch) -> FakeModel:
    return named(monkeypatch, FakeModel())


def named(monkeypatch, fake: FakeModel) -> FakeModel:
    """Make every specification name this language model."""
    monkeypatch.setattr("cratelm.llm.session._backend", lambda config, spec: fake)
    return fake


def run_on(path: Path, model: str = "gpt2-2l", **options: Any):
    return replace(ReplaceConfig(run=path, model=model, **{**OPTIONS, **options}))


@pytest.mark.parametrize("model", MODELS)
def test_the_verb_writes_what_it_says(path, fake, model, capsys):
    result = run_on(path, model)
    printed = capsys.readouterr().out
    folder = path / "replacement" / f"{model}@fake"
    assert result.path == folder
    n = result.n_replaced
    assert 10 <= n <= 12
    assert (result.explanations, result.simulator, result.n_failed) == ("fake", "fake", 0)
    assert f"calls: {n} explanations x " in printed
    assert "of 256 fit and 256 held-out tokens" in printed
    assert [(r.explainer, r.layers, r.control) for r in result.rows] == [
        (explainer, "all", control)
        for explainer in ("fake", "lookup", "trie:20")
        for control in ("none", "shuffled")
    ]
    assert {r.loss_true for r in result.rows} == {result.rows[0].loss_true}
    assert {r.loss_mean for r in result.rows} == {result.rows[0].loss_mean}
    assert 200 < result.n_tokens <= 256
    rows = read_documents(folder)
    own = [d for d in rows if (d.replaced_by, d.explainer) == ("own", "fake")]
    assert sum(d.n_tokens for d in own) == result.n_tokens
    total = sum(d.loss for d in own)
    assert total / result.n_tokens == pytest.approx(result.rows[0].loss_replaced.value)
    neurons = read_neurons(folder)
    assert len(neurons) == 3 * n
    assert {x.cost for x in neurons} == {None}
    assert read_curve(folder) == []
    assert json.loads((folder / "calls.json").read_text())["failed"] == {}
    assert not (folder / "explanations.safetensors").exists()
    assert f"with {n} of {result.n_neurons} neurons on its explanations (fake)" in str(result)
    read = read_replacement(Run(path), f"{model}@fake")
    assert read is not None
    assert read.rows == result.rows
    assert read_replacement(Run(path), model) is None
    again = run_on(path, model)
    assert "is finished" in capsys.readouterr().out
    assert again.rows == result.rows


def test_the_prediction_is_what_the_answers_say(path, fake):
    """Levels are high at the token that an explanation names: the mean activation there is given back."""
    result = run_on(path, simulated_tokens=1024)
    first, shuffled = result.rows[:2]
    assert first.loss_replaced.value < shuffled.loss_replaced.value
    assert first.given_back.value > 0


def test_as_many_calls_as_the_dry_run_says(path, fake):
    dry = run_on(path, dry_run=True)
    assert isinstance(dry, DryRun)
    assert not (path / "replacement").exists()
    probes = sum(fake.asked.values())
    assert probes <= 2
    run_on(path)
    assert sum(fake.asked.values()) - probes == dry.calls > 0
    assert set(fake.asked.values()) == {1}
    assert run_on(path, dry_run=True, force=True).calls == 0


def test_as_many_calls_as_pieces_and_neurons(path, fake):
    """At most the number of explained neurons times the pieces of both samples, and nothing for what is not simulated."""
    result = run_on(path)
    n_pieces = pieces_read(path, 256, "gpt2-2l")
    distinct = len({e.text for e in explanations(path, "gpt2-2l")})
    levels = sum(fake.asked.values()) - 2
    assert levels <= result.n_replaced * n_pieces
    assert levels == distinct * n_pieces  # equal requests are made once
    before = sum(fake.asked.values())
    short = run_on(path, simulated_tokens=64, name="short")
    assert short.n_calibration_tokens <= 64
    assert short.n_tokens < 64
    assert sum(fake.asked.values()) - before <= distinct * pieces_read(path, 64, "gpt2-2l")


def explanations(path: Path, model: str):
    from cratelm.explain.store import read_explanations

    found = read_explanations(path / "explanations" / f"{model}@fake")
    return [e for e in found if e.payload["evidence"] == "top"]


def pieces_read(path: Path, tokens: int, model: str) -> int:
    """The number of different pieces of at most 64 tokens in both samples, cut by hand."""
    from cratelm.activations.open_harvest import open_harvested
    from cratelm.replace.prepared import planned
    from cratelm.runs.model_options import HarvestedModelOptions

    opened = open_harvested(Run(path), model, HarvestedModelOptions(device="cpu"))
    config = ReplaceConfig(run=path, model=model)
    found = set()
    for split in ("fit", "held_out"):
        plan = planned(config, opened, split, tokens)
        assert plan.n_tokens() <= tokens
        for sequence in plan.sequences:
            part: list[int] = []
            for token in [*plan.split.read(*plan.bounds(sequence)).tolist(), plan.eot_id]:
                if part and (token == plan.eot_id or len(part) == PIECE):
                    found.add(tuple(part))
                    part = []
                if token != plan.eot_id:
                    part.append(token)
    return len(found)


def test_failed_calls_are_counted_and_repeated_when_asked(path, monkeypatch):
    fake = named(monkeypatch, FakeModel(fails=0.3))
    result = run_on(path)
    texts = [e.text for e in explanations(path, "gpt2-2l")]
    assert 0 < result.n_failed < len(texts) * pieces_read(path, 256, "gpt2-2l")
    assert "calls failed: neurons have their means there" in str(result)
    failed = json.loads((result.path / "calls.json").read_text())["failed"]
    assert sum(failed.values()) in range(result.n_failed, result.n_failed + 3)  # and probes
    asked = fake.asked.copy()
    sound = named(monkeypatch, FakeModel())
    repeated = run_on(path, retry_failed=True)
    assert repeated.n_failed == 0
    assert set(sound.asked) < set(asked)
    fresh = run_on(path, force=True, name="fresh")
    assert fresh.rows == repeated.rows
    assert repeated.rows[0] != result.rows[0]


def test_no_stage_is_written_if_every_call_fails(path, monkeypatch):
    named(monkeypatch, FakeModel(fails=1.1))
    with pytest.raises(InputError, match="no stage was written"):
        run_on(path)
    assert not list((path / "replacement").glob("*/completed.json"))


def test_a_killed_command_resumes_from_the_ledger(path, monkeypatch):
    killed = named(monkeypatch, FakeModel(dies_after=20))
    with pytest.raises(KeyboardInterrupt):
        run_on(path)
    other = named(monkeypatch, FakeModel())
    result = run_on(path)
    assert not set(killed.asked) & set(other.asked)
    assert result.n_failed == 0


def test_a_budget_stops_before_it_is_exceeded(path, fake):
    with pytest.raises(BudgetReached):
        run_on(path, max_calls=Spent.of(path) + 12)
    assert sum(fake.asked.values()) == 12
    run_on(path)
    assert set(fake.asked.values()) == {1}


class Spent:
    @staticmethod
    def of(path: Path) -> int:
        """Calls in the ledger of the run."""
        import sqlite3

        with sqlite3.connect(path / "ledger.sqlite") as ledger:
            return ledger.execute("SELECT count(*) FROM calls").fetchone()[0]


def test_workers_share_the_neurons(path, fake):
    sent = []
    for index in (0, 1):
        worker = run_on(path, shard=f"{index}/2")
        assert isinstance(worker, WorkerResult)
        assert worker.n_neurons in (5, 6)
        sent.append(sum(fake.asked.values()))
    assert 0.3 * sent[1] < sent[0] < 0.8 * sent[1]
    assert not (path / "replacement").exists()
    before = sum(fake.asked.values())
    result = run_on(path)
    assert sum(fake.asked.values()) - before <= 2  # the probe
    assert result.n_failed == 0


def test_servers_without_log_probabilities_are_asked_for_json(path, fake, monkeypatch):
    expected = run_on(path)
    named(monkeypatch, FakeModel(supports_logprobs=False))
    found = run_on(path, name="json")
    assert found.path.name == "gpt2-2l@json"
    # the levels are 0 and 10 instead of nearly 0 and 9: calibration takes the unit away
    assert found.rows[0].loss_replaced.value == pytest.approx(expected.rows[0].loss_replaced.value, abs=1e-5)  # fmt: skip


def test_names_of_results_and_labels():
    assert simulated_name("a", "a") == simulated_label("a", "a") == "a"
    assert simulated_name("a", "b") == "a-by-b"
    assert simulated_name("", "b") == "llm-free-by-b"
    assert simulated_label("a", "b") == "a/b"
    assert simulated_label("trie", "") == "trie"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--explanations x", "--explanations needs a language model as simulator: add --simulator"),
        ("--name x", "--name needs a language model"),
        ("--dry-run", "--dry-run needs a language model"),
        ("--shard 0/2", "--shard needs a language model"),
        ("--simulator x", "--simulator x: it must be hf:ID_OR_PATH"),
        ("--simulator hf:any --simulated-tokens 1", "--simulated-tokens must be at least 2, not 1"),
        ("--simulator hf:any --explanations llm-free", "omit --simulator, and name them with --explainers"),
        ("--simulator hf:any --explanations x", "no explanations of crate-2l by x: name one of fake with --explanations"),
        ("--simulator hf:any --model other", "has no explanations of other by fake: type `cratelm explain"),
        ("--simulator hf:any --name a/b", "--name"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(explained_run, fake, capsys, options, message):
    status = main(["replace", "--run", str(explained_run), "--quiet", *options.split()])
    out, err = capsys.readouterr()
    assert status == 2
    assert not out
    assert message in err
    assert err.count("\n") == 1
    assert not (explained_run / "replacement").exists()


def test_torchrun_is_refused(explained_run, fake, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="--simulator runs in one process: omit torchrun"):
        run_on(explained_run)


def test_a_bound_below_the_length_of_a_sequence_holds(path, fake):
    """Sequences have 64 tokens here: a part of one is read."""
    result = run_on(path, simulated_tokens=20)
    assert result.n_calibration_tokens == 20
    assert 0 < result.n_tokens < 20
    assert result.rows[0].loss_true.value > 0


def test_the_report_has_a_row_for_each_set(path, fake):
    cratelm.api.explain(run=path, model="gpt2-2l", explainers=("lookup",), quiet=True)
    cratelm.api.score(run=path, model="gpt2-2l", all_tokens=False, resamples=100, quiet=True)
    by_itself = run_on(path)
    named_b = FakeModel()
    named_b.name = "b"
    with pytest.MonkeyPatch.context() as patch:
        named(patch, named_b)
        run_on(path, explanations="fake")
    results = read_results(Run(path))
    (model,) = results.models
    assert [of.simulator for of in model.replacement_sets] == ["fake", "b"]
    table = replacement_table(results)
    found = [row[1:3] for row in table.rows]
    n = f"{by_itself.n_replaced} neurons"
    assert found[0] == (n, "fake")
    assert (n, "fake, shuffled") in found
    assert (n, "fake/b") in found
    assert len(found) == 12
    assert "a language model explained these" in table.note
    assert {done.name for done in results.side_stages} == {"gpt2-2l@fake", "gpt2-2l@fake-by-b"}
    stage = Run(path).stage("replacement", "gpt2-2l@fake-by-b")
    assert "--simulator hf:any --explanations fake" in stage.command()


def test_explanations_made_again_make_the_results_stale(path, fake):
    run_on(path)
    cratelm.api.explain(run=path, model="gpt2-2l", explainer="hf:any", neurons=3, quiet=True, force=True)  # fmt: skip
    stale = Run(path).stale("gpt2-2l")
    assert "replacement/gpt2-2l@fake" in stale
    assert any("cratelm replace" in c for c in stale["replacement/gpt2-2l@fake"].commands)


def test_a_set_without_explanations_of_the_strongest_excerpts_is_refused(path, fake):
    cratelm.api.explain(
        run=path, model="gpt2-2l", explainer="hf:any", neurons=2, evidence=("anthropic",),
        name="bins", quiet=True,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"has no explanation made from the strongest excerpts"):
        run_on(path, explanations="bins")
