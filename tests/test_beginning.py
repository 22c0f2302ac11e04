"""Begin tokens and first positions: set in every verb alike, and left out of statistics and excerpts."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from begin_runs import BEGIN, CAT, END, T, model_folder, planted, read_by_models, tokens
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm
from transformers.models.llama.modeling_llama import LlamaMLP

import cratelm
import cratelm.activations.harvest as harvesting
from cratelm.activations.batches import SearchPlan
from cratelm.activations.config import HarvestConfig, MergeHarvestConfig
from cratelm.activations.harvest import harvest
from cratelm.activations.merge_harvest import merge_harvest
from cratelm.activations.open_harvest import open_harvested
from cratelm.activations.store import read_records, read_summaries
from cratelm.errors import InputError
from cratelm.evaluate.config import EvaluateConfig, PredictConfig
from cratelm.evaluate.evaluate import evaluate
from cratelm.evaluate.predict import predict
from cratelm.models.begin import choose_beginning
from cratelm.models.open import LoadedModel, encoder_of, open_model
from cratelm.models.partial_forward import PartialForward
from cratelm.models.sites import capture, hooked
from cratelm.replace.forward import ExplainedModel
from cratelm.report.config import ReportConfig
from cratelm.report.report import report
from cratelm.runs import Run
from cratelm.steer.ablation import HeldOutText, ablate
from cratelm.steer.config import EffectsConfig, SteerConfig
from cratelm.steer.edits import Edit
from cratelm.steer.effects import effects
from cratelm.steer.steer import steer
from cratelm.steer.steering import steering
from cratelm.tokens.beginning import PLAIN, Beginning
from cratelm.tokens.shards import TokenStore

OPTIONS: dict[str, Any] = {
    "polarity": "positive",
    "tokens": 2000, "sequence_length": T, "pilot_tokens": 256, "context": 8, "short_context": 2,
    "top": 8, "random": 4, "per_bin": 2, "batch_tokens": 4 * T, "device": "cpu", "quiet": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tokens(tmp_path_factory.mktemp("begin"))


@pytest.fixture(scope="module", params=[True, False], ids=["adds", "adds none"])
def harvested(run, request, tmp_path_factory) -> tuple[Path, str, bool]:
    """A run with the harvest of a model whose tokenizer adds a begin token, or does not."""
    name = "adds" if request.param else "plain"
    folder = model_folder(tmp_path_factory.mktemp("models") / name, run, adds_begin=request.param)
    harvest(HarvestConfig(run=run, model=str(folder), **OPTIONS))
    return run, str(folder), request.param


# ---- which begin token ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adds", "config", "options", "wanted"),
    [
        (True, {}, {}, Beginning(BEGIN, 0)),
        (False, {}, {}, Beginning(None, 4)),
        (False, {"add_bos_token": True}, {}, Beginning(BEGIN, 0)),
        (True, {}, {"begin_token": "none"}, Beginning(None, 4)),
        (False, {}, {"begin_token": "5"}, Beginning(5, 0)),
        (True, {}, {"begin_token": "5", "skip_first": 2}, Beginning(5, 2)),
        (False, {}, {"skip_first": 0}, Beginning(None, 0)),
        (True, {"cratelm.json": True}, {}, PLAIN),  # exported by cratelm
    ],
)
def test_the_begin_token_is_the_one_the_model_was_trained_with(
    run, tmp_path, adds, config, options, wanted
):
    folder = model_folder(tmp_path / "m", run, adds_begin=adds)
    loaded = open_model(Run(run), str(folder))
    for name, value in config.items():
        if name.endswith(".json"):
            (folder / name).write_text("{}")
        setattr(loaded.model.config, name, value)
    assert choose_beginning(loaded, Run(run), **options).beginning == wanted


@pytest.mark.parametrize(
    ("before", "settings", "wanted"),
    [
        ("<s>", {"bos_token": None}, Beginning(BEGIN, 0)),  # what is added counts, whatever it is called
        ("<s>", {"bos_token": None, "eos_token": None}, Beginning(BEGIN, 0)),
        ("<s>", {"bos_token": "<|endoftext|>"}, Beginning(BEGIN, 0)),
        ("<|endoftext|>", {"bos_token": "<|endoftext|>"}, Beginning(END, 0)),
        ("<|endoftext|>", {"bos_token": None}, Beginning(END, 0)),
        ("", {"add_bos_token": True}, Beginning(BEGIN, 0)),  # transformers 4 adds it, version 5 does not
        ("", {"add_bos_token": True, "bos_token": {"__type": "AddedToken", "content": "<s>"}}, Beginning(BEGIN, 0)),
        ("", {"add_bos_token": True, "bos_token": None}, Beginning(None, 4)),
        ("", {"add_bos_token": False}, Beginning(None, 4)),
        ("", {"bos_token": "<|endoftext|>"}, Beginning(None, 4)),
        ("after", {"bos_token": "<|endoftext|>"}, Beginning(None, 4)),  # at the end of a text
    ],
)  # fmt: skip
def test_the_begin_token_is_what_the_files_of_the_tokenizer_say(
    run, tmp_path, before, settings, wanted
):
    folder = model_folder(tmp_path / "m", run, adds_begin=False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if before:
        single = "$A <|endoftext|>" if before == "after" else f"{before} $A"
        special = [("<s>", BEGIN), ("<|endoftext|>", END)]
        tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)  # type: ignore[assignment]
        tokenizer.save(str(folder / "tokenizer.json"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    loaded = open_model(Run(run), str(folder))
    assert choose_beginning(loaded, Run(run)).beginning == wanted


def test_crate_has_none_wherever_it_lies(run, tmp_path):
    model = cratelm.build("crate-2l", vocab_size=300, hidden_size=16, num_attention_heads=2)
    assert choose_beginning(LoadedModel("m", tmp_path, model), Run(run)).beginning == PLAIN


@pytest.mark.parametrize("value", ["yes", "-1", "1.5", "NONE"])
def test_a_begin_token_that_is_none_is_an_error(value):
    with pytest.raises(InputError, match=r"--begin-token is .*auto, none, or the id"):
        HarvestConfig(begin_token=value)


def test_an_id_that_the_model_lacks_is_an_error(run, tmp_path):
    loaded = open_model(Run(run), str(model_folder(tmp_path / "m", run, adds_begin=True)))
    with pytest.raises(InputError, match=r"--begin-token is 70000, but .* tokens 0 to"):
        choose_beginning(loaded, Run(run), "70000")


def test_sequences_without_a_token_that_counts_are_an_error(run, tmp_path):
    folder = model_folder(tmp_path / "m", run, adds_begin=True)
    with pytest.raises(InputError, match="no token that counts after the first 31 and its begin"):
        harvest(HarvestConfig(run=run, model=str(folder), skip_first=31, **OPTIONS))


def test_the_choice_is_printed_and_recorded(harvested, capsys):
    run, folder, adds = harvested
    harvest(HarvestConfig(run=run, model=folder, force=True, **OPTIONS))
    told = capsys.readouterr().err
    results = Run(run).stage("activations", Path(folder).name).require("harvest").results
    if adds:
        assert "begin with <s> (id 1): its tokenizer adds it to every text (--begin-token); of their further tokens none are left out" in told  # fmt: skip
        assert (results["begin_token"], results["skip_first"]) == (1, 0)
    else:
        assert "have no begin token: its tokenizer adds none (--begin-token); of their tokens the first 4 are left out" in told  # fmt: skip
        assert (results["begin_token"], results["skip_first"]) == (None, 4)


# ---- the plan ---------------------------------------------------------------------------------------


class Documents:
    """A split of made-up documents, each of which ends with an end mark."""

    def __init__(self, documents: list[list[int]]):
        self.tokens = np.array([t for d in documents for t in [*d, END]], np.int64)
        lengths = [len(d) + 1 for d in documents]
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.ordinals = np.arange(len(documents)) * 3
        self.n_tokens, self.n_documents = len(self.tokens), len(documents)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop].copy()

    def read_at(self, positions: np.ndarray) -> np.ndarray:
        return self.tokens[positions]


def documents(seed: int, begin: int | None) -> Documents:
    """Documents of which some begin with the begin token themselves."""
    draw = np.random.default_rng(seed)
    return Documents(
        [
            [*([begin] if begin is not None and draw.random() < 0.5 else []), *draw.integers(2, 40, draw.integers(1, 30)).tolist()]
            for _ in range(40)
        ]
    )  # fmt: skip


@pytest.mark.parametrize("begin", [None, 1, END, 7])
@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_plan_by_brute_force(begin, skip, seed):
    """Every sequence begins with one begin token; what counts is what is left after all that does not."""
    split: Any = documents(seed, begin)
    length, beginning = 16, Beginning(begin, skip)
    plan = SearchPlan.of(split, "fit", END, length, split.n_tokens, 0, beginning)
    counted = []
    for batch in plan.batches(64, torch.device("cpu")):
        ids, position = batch.input_ids.numpy(), batch.position.numpy().reshape(batch.input_ids.shape)  # fmt: skip
        text = batch.is_text.numpy().reshape(ids.shape) > 0
        assert ids.shape[1] <= length
        assert (np.diff(batch.position.numpy()) >= 0).all()
        assert ((batch.segment_of.numpy() >= 0) == text.ravel()).all()
        for row, at, counts in zip(ids, position, text, strict=True):
            if begin is not None:
                assert row[0] == begin
                second = row[1:2].tolist() == [begin]
                assert not second or (split.tokens[at[0]] == begin and at[0] + 1 == at[1])
            assert (split.tokens[at[counts]] == row[counts]).all()
            wanted = list(at[counts])
            counted += wanted
            rows = batch.rows_of(torch.tensor(wanted, dtype=torch.int64))
            assert (batch.position[rows].numpy() == wanted).all()
            assert (batch.is_text[rows] > 0).all()
    room = length - (begin is not None)
    expected = []
    for start in range(0, split.n_tokens, room):
        own = begin is not None and split.tokens[start] == begin
        for at in range(start, min(start + room, split.n_tokens)):
            is_own = begin is not None and split.tokens[at] == begin and at in split.starts
            is_own |= begin is not None and at == start and own
            ends = at + 1 in split.starts
            if not (ends or is_own or at < start + skip + own):
                expected.append(at)
    assert counted == expected
    starts, stops = plan.text_spans()
    assert [at for a, b in zip(starts, stops, strict=True) for at in range(a, b)] == expected


@pytest.mark.parametrize("tokens", [1, 40, 100, 333])
def test_tokens_are_counted_without_begin_tokens(tokens):
    split: Any = documents(0, None)
    for beginning in (PLAIN, Beginning(1, 0), Beginning(1, 2)):
        plan = SearchPlan.of(split, "fit", END, 16, tokens, 0, beginning)
        room = beginning.room(16)
        n_short = -split.n_tokens % room  # by which the last sequence is shorter, if it is drawn
        assert max(0, tokens - room - n_short) < plan.n_tokens() <= max(tokens, room)


# ---- harvest ----------------------------------------------------------------------------------------


def by_hand(run: Path, folder: str, name: str, split: str, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Activations [n, H] of the tokens that count, their positions in the split [n], and in their sequences [n]."""
    held = open_harvested(Run(run), name)
    of_split = held.store.split(split)  # type: ignore[arg-type]
    begin, room = held.beginning, T - held.beginning.extra
    parts, positions, places = [], [], []
    for start in range(0, of_split.n_tokens, room):
        ids = of_split.read(start, min(start + room, of_split.n_tokens))
        read = [begin.token, *ids] if begin.extra else ids.tolist()
        values = capture(held.subject.model, held.site, torch.tensor([read]))[layer][0, begin.extra :]  # fmt: skip
        counts = (ids != END) & (np.arange(len(ids)) >= begin.skip)
        parts.append(values.numpy()[counts])
        positions.append(start + np.flatnonzero(counts))
        places.append(np.flatnonzero(counts))
    return np.concatenate(parts), np.concatenate(positions), np.concatenate(places)


@pytest.mark.parametrize("split", ["fit", "held_out"])
@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "fused"])
@pytest.mark.parametrize("skip", [None, 0, 2])
def test_statistics_and_excerpts_by_brute_force(harvested, monkeypatch, split, compiled, skip):
    run, folder, adds = harvested
    if compiled:
        pytest.importorskip("numba")
        monkeypatch.setattr(harvesting, "_WORTH_COMPILING", 0)
    name = f"{Path(folder).name}-{compiled}-{skip}"
    options = {**OPTIONS, "tokens": 10**6, "top": 6}
    path = harvest(HarvestConfig(run=run, model=folder, name=name, skip_first=skip, **options)).path
    for layer in (0, 1):
        values, positions, places = by_hand(run, folder, name, split, layer)
        assert places.min() == (skip if skip is not None else 0 if adds else 4)
        for s in read_summaries(path, split, [layer]):  # type: ignore[arg-type]
            of = values[:, s.neuron.index].astype(float)
            assert s.n_tokens == len(of) == s.histogram.sum()
            assert s.mean == pytest.approx(of.mean(), rel=1e-4, abs=1e-6)
            assert s.variance == pytest.approx(of.var(), rel=1e-3)
            fires = of > 0 if s.firing_threshold is None else of >= s.firing_threshold
            assert s.firing_rate == pytest.approx(fires.mean())
            assert s.maximum == pytest.approx(of.max(), rel=1e-4, abs=1e-6)
            assert s.openai_counts is not None
            assert s.openai_counts.sum() == len(of)
        column = {int(p): i for i, p in enumerate(positions)}
        for record in read_records(path, split, [layer]):  # type: ignore[arg-type]
            for e in record.excerpts:
                assert e.position in column
                if e.kind == "out_of_context":
                    continue
                rows = [column[e.position - e.peak + j] for j in range(len(e))]
                wanted = values[rows, record.neuron.index]
                np.testing.assert_allclose(e.activations, wanted, rtol=1e-3, atol=1e-4)
            top = [e.activations[e.peak] for e in record.of_kind("top")]
            best = {}
            documents = open_harvested(Run(run), name).store.split(split).documents_at(positions)  # type: ignore[arg-type]
            for d, v in zip(documents.tolist(), values[:, record.neuron.index].tolist(), strict=True):  # fmt: skip
                best[d] = max(v, best.get(d, 0.0))
            wanted = sorted((v for v in best.values() if v > 0), reverse=True)[: len(top)]
            np.testing.assert_allclose(top, wanted, rtol=1e-3, atol=1e-4)


def test_out_of_context_texts_begin_as_sequences_do(harvested):
    run, folder, _ = harvested
    held = open_harvested(Run(run), Path(folder).name)
    prefix = held.beginning.prefix(END)
    assert len(prefix) == (1 if held.beginning.extra else 4)
    for record in read_records(held.folder, "held_out", [0], [3, 4]):
        for e in record.of_kind("out_of_context"):
            ids = torch.tensor([[*prefix, *e.token_ids.tolist()]])
            wanted = capture(held.subject.model, held.site, ids)[0][0, len(prefix) :, record.neuron.index]  # fmt: skip
            np.testing.assert_allclose(e.activations, wanted.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "fused"])
@pytest.mark.parametrize(
    ("adds", "skip", "first"),
    [(True, None, False), (False, None, False), (False, 1, False), (False, 0, True)],
)
def test_a_neuron_that_fires_at_the_first_position_and_on_cat(
    run, tmp_path, monkeypatch, compiled, adds, skip, first
):
    """Its top excerpts show ` cat`, but not if nothing is set and nothing is left out."""
    if compiled:
        pytest.importorskip("numba")
        monkeypatch.setattr(harvesting, "_WORTH_COMPILING", 0)
    store = TokenStore(run / "tokens")
    cat = store.tokenizer.token_to_id("Ġcat")
    folder = model_folder(tmp_path / "cats", run, adds_begin=adds)
    with planted(5, cat):
        result = harvest(HarvestConfig(run=run, model=str(folder), skip_first=skip, force=True, **OPTIONS))  # fmt: skip
    for split in ("fit", "held_out"):
        (record,) = read_records(result.path, split, [0], [5])
        shown = {store.token_strings[e.token_ids[e.peak]] for e in record.of_kind("top")}
        room = T - adds
        at_first = [e.position % room == 0 for e in record.of_kind("top")]
        assert len(at_first) == OPTIONS["top"]
        if first:
            assert all(at_first)
            assert record.summary.maximum == 3000
            assert result.crowded[split] >= 1
            assert result.top_at_first[split] > 1 / 48
        else:
            assert shown == {CAT}
            assert not any(at_first) or adds  # after a begin token the first token counts
            assert record.summary.maximum < 60
            assert record.summary.mean < 10
            assert result.crowded[split] <= 2


def test_parts_merge_into_the_same_harvest(harvested):
    run, folder, _ = harvested
    whole = harvest(HarvestConfig(run=run, model=folder, name="whole", **OPTIONS)).path
    for part in ("1/2", "2/2"):
        harvest(
            HarvestConfig(run=run, model=folder, name="parted", force=True, part=part, **OPTIONS)
        )
    merged = merge_harvest(
        MergeHarvestConfig(run=run, model="parted", device="cpu", force=True)
    ).path
    records = [Run(run).stage("activations", n).require("harvest").results for n in ("whole", "parted")]  # fmt: skip
    names = ("begin_token", "skip_first", "crowded", "top_at_first", "tokens")
    assert [records[0][n] for n in names] == [records[1][n] for n in names]
    for split in ("fit", "held_out"):
        both = [read_summaries(path, split) for path in (whole, merged)]
        assert [replace(s.neuron, model="") for s in both[0]] == [replace(s.neuron, model="") for s in both[1]]  # fmt: skip
        assert [(s.mean, s.maximum) for s in both[0]] == [(s.mean, s.maximum) for s in both[1]]
    shutil.rmtree(whole)


# ---- every verb -------------------------------------------------------------------------------------


def _sae(run: Path, folder: str) -> str:
    from cratelm.sae.train import sae_train
    from cratelm.sae.train_config import SaeTrainConfig

    sae_train(SaeTrainConfig(run=run, model=folder, name="s", expansion=1, tokens=1024, batch_size=128, batch_tokens=4 * T, sequence_length=T, buffer_mib=1, device="cpu", quiet=True, force=True))  # fmt: skip
    return "s"


def _intervene(run: Path, folder: str) -> None:
    from cratelm.steer.continuations import continue_prompts, draw_prompts

    held = open_harvested(Run(run), Path(folder).name)
    prompts = draw_prompts(held.store.split("held_out"), END, 3, 4, 0, 0, 2, held.beginning)
    assert BEGIN not in prompts
    continue_prompts(held, 0, 2, 1.0, 3, prompts, count=3, temperature=0.0, seed=0)


def _replace(run: Path, folder: str) -> None:
    from cratelm.replace.config import ReplaceConfig
    from cratelm.replace.replace import replace as run_on_explanations

    run_on_explanations(ReplaceConfig(run=run, model=Path(folder).name, explainers=("lookup", "trie", "concepts"), tokens=600, fit_tokens=600, neuron_tokens=2 * T, curve_tokens=200, resamples=100, quiet=True, force=True))  # fmt: skip


def _explained(run: Path, folder: str) -> None:
    from cratelm.explain.config import ExplainConfig
    from cratelm.explain.explain import explain

    explain(ExplainConfig(run=run, model=Path(folder).name, neurons=6, quiet=True, force=True))


def _score(run: Path, folder: str) -> None:
    from cratelm.score.config import ScoreConfig
    from cratelm.score.score import score

    _explained(run, folder)
    score(ScoreConfig(run=run, model=Path(folder).name, resamples=100, quiet=True, force=True))


def _analyze(run: Path, folder: str) -> None:
    from cratelm.analysis.analyze import analyze
    from cratelm.analysis.config import AnalyzeConfig

    analyze(AnalyzeConfig(run=run, model=Path(folder).name, tokens=600, quiet=True, force=True))


def _sae_evaluate(run: Path, folder: str) -> None:
    from cratelm.sae.evaluate import sae_evaluate
    from cratelm.sae.evaluate_config import SaeEvaluateConfig

    sae_evaluate(SaeEvaluateConfig(run=run, model=folder, sae=_sae(run, folder), tokens=600, sequence_length=T, batch_tokens=4 * T, steered=1, steered_tokens=100, device="cpu", quiet=True))  # fmt: skip


def _live(run: Path, folder: str) -> None:
    pytest.importorskip("fastapi", reason="the extra `viewer` is not installed")
    from cratelm.steer.edits import Edit
    from cratelm.viewer.live import Live
    from cratelm.viewer.live_explanations import LiveExplanations
    from cratelm.viewer.run_reader import Library

    live = Live(Library([run]))
    name = Path(folder).name
    live.activations("run", name, TEXT, 0, 2)
    live.strongest("run", name, TEXT, 1)
    live.steer("run", name, TEXT, Edit(0, 2, add=3.0), 3)
    _replace(run, folder)
    explanations = LiveExplanations(live)
    explanations.read("run", name, TEXT)
    explanations.predict("run", name, TEXT, 2)
    live.close()


TEXT = "the cat sat on a mat and ran"
VERBS = {
    "harvest": lambda run, folder: harvest(HarvestConfig(run=run, model=folder, force=True, **OPTIONS)),
    "evaluate": lambda run, folder: evaluate(EvaluateConfig(run=run, models=(folder,), sequence_length=T, max_tokens=600, quiet=True)),
    "evaluate with overlap": lambda run, folder: evaluate(EvaluateConfig(run=run, models=(folder,), sequence_length=T, stride=7, max_tokens=300, quiet=True)),
    "evaluate texts": lambda run, folder: evaluate(EvaluateConfig(run=run, models=(folder,), on=(f"mine={run.parent / 'corpus.jsonl'}",), max_documents=9, sequence_length=12, quiet=True)),
    "predict": lambda run, folder: predict(PredictConfig(run=run, models=(folder,), text=TEXT, out=run.parent / "p.html")),
    "predict a document": lambda run, folder: predict(PredictConfig(run=run, models=(folder,), out=run.parent / "p.html")),
    "steer": lambda run, folder: steer(SteerConfig(run=run, path=folder, neurons=("0:2",), add=3.0, text=TEXT, generate=3)),
    "effects": lambda run, folder: effects(EffectsConfig(run=run, model=Path(folder).name, tokens=200, neurons=3, quiet=True, force=True)),
    "intervene": _intervene,
    "replace": _replace,
    "score": _score,
    "analyze": _analyze,
    "sae train": _sae,
    "sae evaluate": _sae_evaluate,
    "live": _live,
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_sequence_that_a_verb_reads_begins_with_one_begin_token(harvested, verb):
    if verb.startswith("sae"):
        pytest.importorskip("sae_lens", reason="the extra `sae` is not installed")
    run, folder, adds = harvested
    VERBS["harvest"](run, folder)
    with read_by_models() as passes:
        VERBS[verb](run, folder)
    assert passes
    for ids in passes:
        assert ids.shape[1] <= T if verb != "live" else True
        if adds:
            assert (ids[:, 0] == BEGIN).all(), verb
            assert not (ids[:, 1:] == BEGIN).any(), verb
        elif (
            verb != "evaluate texts"
        ):  # which begins as EleutherAI's harness does, with the tokenizer's token
            assert not (ids == BEGIN).any(), verb


# ---- the same activations in every verb -----------------------------------------------------------


@pytest.fixture
def window(harvested) -> tuple[Path, str, str, torch.Tensor]:
    """A short document as text, and what the model reads: the begin token, else end-of-text, and the document."""
    run, folder, adds = harvested
    VERBS["harvest"](run, folder)
    held = open_harvested(Run(run), Path(folder).name)
    encoder = encoder_of(held.subject, Run(run))
    ids = encoder.encode(TEXT).tolist()
    return run, folder, TEXT, torch.tensor([[BEGIN if adds else END, *ids]])


def _shown_live(run, folder, text, ids) -> np.ndarray:
    pytest.importorskip("fastapi", reason="the extra `viewer` is not installed")
    from cratelm.viewer.live import Live
    from cratelm.viewer.run_reader import Library

    live = Live(Library([run]))
    shown = live.activations("run", Path(folder).name, text, 1, 7)
    live.close()
    return np.array(shown.values)


def _read_by(act) -> np.ndarray:
    """The last activations of neuron 1:7 that a verb computes in one pass over the window, without the first token."""
    with read_by_models() as passes, _recorded() as activations:
        act()
    assert passes
    return activations[0]


@contextmanager
def _recorded():
    """Activations of neuron 1:7 in the first pass of more than 6 tokens, without those of the first."""
    found = []
    forward = LlamaMLP.forward

    def watched(self, x):
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if x.shape[1] > 6 and self is not None and getattr(self, "layer_number", 1) == 1:
            found.append(inner[0, 1:, 7].detach().numpy())
        return forward(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", watched)
        yield _OfSecondLayer(found)


class _OfSecondLayer:
    """The passes come layer by layer: every second one is of layer 1."""

    def __init__(self, found):
        self.found = found

    def __getitem__(self, number):
        return self.found[2 * number + 1]


SHOWN = {
    "live": _shown_live,
    "steer": lambda run, folder, text, ids: _read_by(lambda: steer(SteerConfig(run=run, path=folder, neurons=("1:7",), scale=1.0, text=text, generate=0))),
    "predict": lambda run, folder, text, ids: _read_by(lambda: predict(PredictConfig(run=run, models=(folder,), text=text, out=run.parent / "p.html"))),
}  # fmt: skip


@pytest.mark.parametrize("verb", SHOWN)
def test_what_a_verb_computes_at_a_token_is_what_capture_gives(window, verb):
    run, folder, text, ids = window
    held = open_harvested(Run(run), Path(folder).name)
    wanted = capture(held.subject.model, held.site, ids)[1][0, 1:, 7].numpy()
    np.testing.assert_allclose(SHOWN[verb](run, folder, text, ids), wanted, rtol=1e-4, atol=1e-6)


def test_live_and_effects_equal_the_harvest_on_its_first_window(harvested):
    """The first sequence of a split begins with a document: its text by itself is the same window."""
    run, folder, adds = harvested
    if not adds:
        pytest.skip("without a begin token, a text by itself follows the end of another document")
    name = Path(folder).name
    VERBS["harvest"](run, folder)
    held = open_harvested(Run(run), name)
    split = held.store.split("held_out")
    stop = int(split.starts[1]) - 1
    ids = split.read(0, min(stop, T - 1))
    shown = _shown_live(run, folder, held.store.tokenizer.decode(ids.tolist()), None)
    found = [
        e
        for record in read_records(held.folder, "held_out", [1], [7])
        for e in record.excerpts
        if e.document == split.ordinals[0] and e.kind != "out_of_context"
    ]
    everyone = [*found]
    for e in everyone:
        start = e.position - e.peak
        np.testing.assert_allclose(e.activations, shown[start : start + len(e)], rtol=1e-4, atol=1e-6)  # fmt: skip
    assert len(shown) == len(ids)


def test_steering_all_tokens_leaves_the_begin_token(harvested):
    run, folder, adds = harvested
    options: dict[str, Any] = {"run": run, "path": folder, "neurons": ("0:2",), "set": 9.0, "text": TEXT, "generate": 0}  # fmt: skip
    whole, from_one, every = (
        steer(SteerConfig(**options, positions=positions)).next_token.kl
        for positions in ("all", "1:", "0:")
    )
    assert from_one != every
    assert whole == (from_one if adds else every)


@pytest.mark.parametrize("verb", ["evaluate", "steer"])
def test_padding_on_either_side_gives_the_same_figures(harvested, verb):
    """Rows padded at the left, with a mask, or at the right have the activations and losses of rows by themselves."""
    run, folder, _ = harvested
    held = open_harvested(Run(run), Path(folder).name)
    model, encoder = held.subject.model, encoder_of(held.subject, Run(run))
    rows = [[BEGIN, *encoder.encode(t).tolist()] for t in (TEXT, "the river ran", "a blue stone and a cat")]  # fmt: skip
    width = max(map(len, rows))
    found = {}
    for side in ("left", "right"):
        ids = torch.full((len(rows), width), END)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[number, place], mask[number, place] = torch.tensor(row), 1
        edits = [Edit(0, 2, add=3.0, positions="2:")] if verb == "steer" else []
        with torch.no_grad(), steering(model, *edits, site=held.site):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found[side] = [
            logits[n, width - len(row) :] if side == "left" else logits[n, : len(row)]
            for n, row in enumerate(rows)
        ]
    for number, row in enumerate(rows):
        edits = [Edit(0, 2, add=3.0, positions="2:")] if verb == "steer" else []
        with torch.no_grad(), steering(model, *edits, site=held.site):
            alone = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
        for side in ("left", "right"):
            torch.testing.assert_close(found[side][number], alone, rtol=1e-4, atol=1e-4)


def test_evaluation_does_not_depend_on_how_windows_are_batched(harvested):
    """Windows of different lengths in one batch are padded; one at a time, none is."""
    run, folder, _ = harvested
    options: dict[str, Any] = {"run": run, "models": (folder,), "on": (f"mine={run.parent / 'corpus.jsonl'}",), "max_documents": 12, "sequence_length": 20, "quiet": True}  # fmt: skip
    losses = [evaluate(EvaluateConfig(**options, batch_size=n)).measurements[0].loss.value for n in (1, 8)]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_loss_after_a_begin_token_by_hand(harvested):
    run, folder, adds = harvested
    found = evaluate(EvaluateConfig(run=run, models=(folder,), sequence_length=T, max_tokens=100, quiet=True))  # fmt: skip
    held = open_harvested(Run(run), Path(folder).name)
    split, model = held.store.split("held_out"), held.subject.model
    room, total = T - adds, 0.0
    for start in range(0, 100, room):
        stop = min(start + room, 100)
        read = split.read(start, stop + 1).tolist()
        ids = torch.tensor([[BEGIN, *read] if adds else read])
        with torch.no_grad():
            logs = model(input_ids=ids[:, :-1]).logits[0].log_softmax(-1)
        targets = ids[0, 1:]
        losses = -logs.gather(1, targets[:, None])[:, 0]
        total += float(losses[adds:].sum())
    (measured,) = found.measurements
    assert measured.loss.value == pytest.approx(total / 100, rel=1e-5)
    assert measured.begin_token == (BEGIN if adds else None)
    assert measured.tokens == 100


def test_replacing_codes_keeps_those_of_the_begin_token(harvested):
    """With every code of every layer replaced, what the model does at the begin token stays as it is."""
    run, folder, adds = harvested
    held = open_harvested(Run(run), Path(folder).name)
    explained = ExplainedModel(held.subject.model, held.site, held.beginning)
    split = held.store.split("held_out")
    ids = torch.tensor([[BEGIN, *split.read(0, 20)] if adds else split.read(0, 21)])
    trace = explained.trace(ids)
    codes = {p: np.zeros((ids.numel(), n), np.float32) for p, n in enumerate(held.site.n_neurons)}
    n_kept = held.beginning.extra + held.beginning.skip

    def zeroed(place: int, activations: torch.Tensor) -> torch.Tensor:
        changed = torch.zeros_like(activations)
        changed[:, :n_kept] = activations[:, :n_kept]
        return changed

    with torch.no_grad(), hooked(held.subject.model, held.site, zeroed):
        logits = held.subject.model(input_ids=ids, use_cache=False).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(explained.losses(trace, codes)[0], wanted, rtol=1e-4, atol=1e-4)


def test_a_neuron_is_not_ablated_at_the_begin_token(harvested):
    run, folder, _ = harvested
    held = open_harvested(Run(run), Path(folder).name)
    split = held.store.split("held_out")
    text = HeldOutText.of(split, T, 3 * T, 0, held.beginning)
    partial = PartialForward(held.subject.model, held.site)
    neurons = [np.array([1, 2]), np.array([2])]
    with tqdm(disable=True) as bar:
        found = ablate(partial, text, neurons, None, 2 * T, bar)
    n_kept = held.beginning.extra + held.beginning.skip
    change, firing = 0.0, 0
    for read, _, positions in text.batches(2 * T):
        assert (positions[:, :n_kept] == -1).all()
        assert (positions[:, n_kept:] >= 0).all()
        assert (split.read_at(positions[:, n_kept:]) == read[:, n_kept:-1]).all()
        ids = torch.from_numpy(read)
        losses = []
        for is_edited in (False, True):

            def without(place: int, activations: torch.Tensor, is_edited: bool = is_edited):
                if place != 1 or not is_edited:
                    return None
                changed = activations.clone()
                changed[:, n_kept:, 2] = 0
                return changed

            with torch.no_grad(), hooked(held.subject.model, held.site, without):
                logits = held.subject.model(input_ids=ids[:, :-1], use_cache=False).logits
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))  # fmt: skip
        change += float(losses[1] - losses[0])
        values = capture(held.subject.model, held.site, ids[:, :-1])[1][:, n_kept:, 2]
        firing += int((values > 0).sum())
    ablation = found.neurons[1][0]
    assert ablation.change.value == pytest.approx(change / text.n_tokens, rel=1e-3, abs=1e-5)
    assert ablation.n_firing == firing
    assert ablation.n_tokens == text.n_tokens


# ---- reports and tokenizers -------------------------------------------------------------------------


def test_a_slow_tokenizer_is_one_line(run, tmp_path):
    folder = model_folder(tmp_path / "slow", run, adds_begin=False)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text(
        "\n".join(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "a"])
    )
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "basic", "subword_tokenizer_type": "wordpiece"}')  # fmt: skip
    loaded = open_model(Run(run), str(folder))
    with pytest.raises(InputError, match=r"slow.*tokenizer\.json is needed") as error:
        encoder_of(loaded, Run(run))
    assert "\n" not in str(error.value)
    chosen = choose_beginning(loaded, Run(run))
    assert chosen.beginning == Beginning(None, 4)
    assert "tokenizer.json is needed" in chosen.in_words()


def test_top_positions_by_hand(harvested):
    run, folder, adds = harvested
    VERBS["harvest"](run, folder)
    name = Path(folder).name
    results = Run(run).stage("activations", name).require("harvest").results
    room = T - adds
    for split in ("fit", "held_out"):
        at = {r.neuron: [e.position % room for e in r.of_kind("top")] for r in read_records(open_harvested(Run(run), name).folder, split)}  # fmt: skip
        everything = [p for of in at.values() for p in of]
        crowds = [max(of.count(p) for p in of) * 2 >= len(of) for of in at.values() if len(of) >= 5]
        top = results["top_positions"][split]
        assert (top["excerpts"], top["neurons"], top["crowded"]) == (len(everything), len(crowds), sum(crowds))  # fmt: skip
        assert top["first_shares"] == pytest.approx([everything.count(p) / len(everything) for p in range(8)])  # fmt: skip


def test_the_report_warns_where_top_excerpts_crowd(run, tmp_path):
    cat = TokenStore(run / "tokens").tokenizer.token_to_id("Ġcat")
    folder = model_folder(tmp_path / "crowds", run, adds_begin=False)
    found = {}
    for skip in (0, 4):
        with planted(5, cat):
            harvest(HarvestConfig(run=run, model=str(folder), skip_first=skip, force=True, **OPTIONS))  # fmt: skip
        _score(run, str(folder))
        written = report(ReportConfig(run=run, models=("crowds",), force=True))
        found[skip] = written.page.read_text(encoding="utf-8")
        rows = json.loads(written.tables.read_text())["top_positions"]["rows"]
        assert [(r["split"], r["skip_first"]) for r in rows] == [("fit", skip), ("held_out", skip)]
    assert 'id="crowded"' in found[0]
    assert "at one position, most at position 0" in found[0]
    assert "48 neurons have half or more of their top excerpts" in found[0]
