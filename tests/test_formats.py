"""Files of others: OpenAI's NeuronRecord JSON in and out, Neuronpedia's exports."""

import gzip
import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace
from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import planted
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_llm import FakeModel
from shared import SHARED, needs_shared

import cratelm
from cratelm.activations.store import read_records, read_summaries, write_records
from cratelm.corpus.documents import Document
from cratelm.errors import InputError
from cratelm.explain.store import write_explanations, write_selected, write_unexplained
from cratelm.interop.export_records import openai_record, pooled_moments
from cratelm.interop.imported_texts import ImportedTexts
from cratelm.interop.openai_records import (
    ActivationRecord,
    OpenAIRecord,
    encode_record,
    parse_record,
    read_record,
)
from cratelm.records import (
    METRICS,
    SIMULATION_METRICS,
    Explanation,
    NeuronId,
    NeuronRecord,
    NeuronScore,
    Score,
    Status,
)
from cratelm.runs import Run
from cratelm.score.store import read_scores, write_scores
from cratelm.steer.store import LOGIT_EFFECTS
from cratelm.tokens.shards import TokenStore

ORACLE = SHARED / "oracle" / "neuron-record.json"
NEURONS = range(4, 10)
SPLITS = ("fit", "held_out")
HOSTILE = [
    "<script>alert(1)</script>",
    "\0",
    "\ud83d",
    " ",
    "▁x",
    "<0x0A>",
    "Ġ",
    "é",
    "",
    "\\x80",
    "😀",
]


# --- OpenAI's format ----------------------------------------------------------------------------


@needs_shared
def test_what_openai_s_library_wrote_is_read_and_written_again_byte_for_byte():
    record = read_record(ORACLE)
    assert encode_record(record) == ORACLE.read_bytes()
    assert (record.layer, record.index, record.mean, record.kurtosis) == (1, 42, 0.1, 0.4)
    assert (len(record.top), len(record.random)) == (10, 10)
    assert [len(b) for b in record.by_quantile or ()] == [3] * 5
    assert record.top[0].tokens == (" the", " cat", "\n", "\t", "<b>", " é")


def minimal(**more) -> dict:
    text = {"tokens": ["a", " b"], "activations": [0.5, 1]}
    neuron = {"layer_index": 0, "neuron_index": 3}
    return {"neuron_id": neuron, "most_positive_activation_records": [text], **more}


@pytest.mark.parametrize(
    "value",
    [
        minimal(),
        minimal(dataclass_name="NeuronRecord", later=[{"x": None}], mean=None, skewness=1),
        minimal(random_sample_by_quantile=[[], []], quantile_boundaries=[None, 1e-7, 2]),
        minimal(neuron_id={"layer_index": 1, "neuron_index": 0, "model": "\ud83d\0"}),
        minimal(random_sample=[{"dfa_values": [1], "activations": [], "tokens": []}]),
    ],
)
def test_every_field_and_their_order_survive(value):
    data = json.dumps(value).encode()
    written = encode_record(parse_record(data, "x"))
    assert json.loads(written) == value
    assert list(json.loads(written)) == list(value)


def test_numbers_that_do_not_exist_stay_as_they_were():
    data = b'{"neuron_id":{"layer_index":0,"neuron_index":3},"mean":NaN,"variance":null,"most_positive_activation_records":[]}'
    assert encode_record(parse_record(data, "x")) == data


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "not JSON"),
        (b'{"neuron_id"', "not JSON"),
        (b"\xff{}", "not JSON in UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "not JSON"),
        (b"[]", "the file is [], but must be an object of class NeuronRecord"),
        (b'{"dataclass_name":"ScoredExplanation"}', "dataclass_name is ScoredExplanation"),
        (b'{"layer":1}', "the file has no 'neuron_id', only 'layer'"),
        (b'{"neuron_id":{"layer_index":1}}', "neuron_id has no 'neuron_index'"),
        (b'{"neuron_id":{"layer_index":1,"neuron_index":-2}}', "neuron_index is -2"),
        (b'{"neuron_id":{"layer_index":true,"neuron_index":2}}', "layer_index is true"),
        (b'{"neuron_id":{"layer_index":1,"neuron_index":2}}', "no 'most_positive"),
    ],
)
def test_damaged_files_are_told_by_name_and_place(data, told, tmp_path):
    path = tmp_path / "7.json"
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        read_record(path)
    assert str(path) in str(error.value)
    assert told in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (3, "records[0] is 3, but must be an object of class ActivationRecord"),
        ({"tokens": ["a"]}, "records[0] has no 'activations', only 'tokens'"),
        ({"tokens": "ab", "activations": [1, 2]}, "records[0].tokens is ab, but must be a list"),
        ({"tokens": ["a", 5], "activations": [1, 2]}, "records[0].tokens is 5"),
        (
            {"tokens": ["a"], "activations": ["1"]},
            "records[0].activations is 1, but must be a number",
        ),
        ({"tokens": ["a"], "activations": [None]}, "records[0].activations is null"),
        ({"tokens": ["a"], "activations": [True]}, "records[0].activations is true"),
        ({"tokens": ["a"], "activations": [1, 2]}, "1 tokens, 2 activations, but must be as many"),
    ],
)
def test_damaged_activation_records(row, told):
    data = json.dumps(minimal(most_positive_activation_records=[row])).encode()
    with pytest.raises(InputError) as error:
        parse_record(data, "7.json")
    assert told in str(error.value)


# --- import -------------------------------------------------------------------------------------


def planted_file(folder: Path, index: int, layer: int = 0, **fields) -> OpenAIRecord:
    """A neuron that fires on token `index` of the made-up corpus, as a file: 20 top, 20 random texts."""
    tokens, _ = planted.corpus("fit")
    values = np.float32(planted.on_token(tokens, index))
    rows = tokens.reshape(-1, planted.LENGTH), values.reshape(-1, planted.LENGTH)
    made = [
        ActivationRecord(tuple(planted.STRINGS[t] for t in text), tuple(map(float, row)))
        for text, row in zip(*rows, strict=True)
    ]
    best = sorted(made, key=lambda r: -max(r.activations))
    draw = np.random.default_rng(index).permutation(len(made))
    record = OpenAIRecord.of(
        layer, index, top=tuple(best[:20]), random=tuple(made[i] for i in draw[:20]), **fields
    )
    folder.mkdir(exist_ok=True)
    (folder / f"{layer}-{index}.json").write_bytes(encode_record(record))
    return record


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A run of imported neurons, and its files."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for index in NEURONS:
        planted_file(folder / "files", index, mean=0.02)
    result = cratelm.api.import_records(
        run=folder / "run", files=(folder / "files",), model="m", quiet=True
    )
    return Run(folder / "run"), folder / "files", result


@pytest.mark.usefixtures("undrawn")
def test_imported_neurons_are_explained_and_scored_by_the_usual_verbs(elsewhere):
    run, _, result = elsewhere
    assert (result.neurons, result.left_out) == (len(NEURONS), 0)
    cratelm.api.explain(run=run.path, model="m", quiet=True)
    cratelm.api.score(run=run.path, model="m", resamples=100, quiet=True)
    scores = read_scores(run.stage("scores", "m").path)
    own = [s for s in scores if (s.explainer, s.control) == ("lookup", "none")]
    assert len(own) == 3 * len(NEURONS)
    assert all(s.score.value > 0.9 for s in own), [s.score.value for s in own]
    assert all(s.score.value < 0.5 for s in scores if s.control == "shuffled")
    cratelm.api.report(run=run.path, neurons=2, excerpts=1, resamples=100)


def test_imported_neurons_are_read_by_language_models(elsewhere, monkeypatch, tmp_path):
    run, _, _ = elsewhere
    fake = FakeModel()
    monkeypatch.setattr("cratelm.llm.session._backend", lambda config, spec: fake)
    common = {"run": run.path, "model": "m", "quiet": True}
    cratelm.api.explain(explainer="hf:any", contrast=2, **common)
    with pytest.raises(InputError, match="number of tokens in each quantile bin"):
        cratelm.api.score(simulator="hf:any", metrics=METRICS, **common)
    metrics = tuple(m for m in METRICS if m != "all_tokens_estimate")
    result = cratelm.api.score(simulator="hf:any", metrics=metrics, resamples=100, **common)
    own = [s for s in read_scores(result.path) if s.control == "none"]
    assert {s.metric for s in own} == set(metrics)
    assert all(s.score.value > 0.9 for s in own if s.metric in SIMULATION_METRICS)
    assert {s.score.n_records for s in own if s.metric == "top_and_random"} == {10}
    out = cratelm.api.export_neuronpedia(out=tmp_path / "o", model_id="Tiny_1", **common)
    assert out.explanations >= 2 * len(NEURONS)
    rows = rows_of(tmp_path / "o", "explanation-scores", "0-mlp")
    read = [r for r in rows if r["explanationScoreModelName"] == "any"]
    assert len(read) == sum(s.score.value is not None for s in own) > 0


def test_a_text_is_never_explained_from_and_scored_on(elsewhere):
    run, _, result = elsewhere
    texts: dict[str, set[str]] = {split: set() for split in SPLITS}
    documents: dict[str, set[int]] = {split: set() for split in SPLITS}
    store = TokenStore(run.path / "tokens")
    for split in SPLITS:
        for record in read_records(run.stage("activations", "m").path, split):
            for excerpt in record.excerpts:
                texts[split].add("".join(store.decode_tokens(excerpt.token_ids)))
                documents[split].add(excerpt.document)
    assert not texts["fit"] & texts["held_out"]
    assert not documents["fit"] & documents["held_out"]
    assert result.moved > 0, "neurons share texts here, so some had to move"
    assert result.documents == {split: len(texts[split]) for split in SPLITS}


def test_imported_excerpts_are_those_of_the_file(elsewhere):
    run, files, _ = elsewhere
    store = TokenStore(run.path / "tokens")
    harvest = run.stage("activations", "m").path
    turns = Counter()
    for split in SPLITS:
        tokens = store.split(split)
        for record in read_records(harvest, split):
            given = read_record(files / f"0-{record.neuron.index}.json")
            lists = {"top": given.top, "random": given.random}
            assert record.summary.mean == 0.02
            assert record.summary.maximum == max(e.activations.max() for e in record.excerpts)
            tops = [e.rank for e in record.of_kind("top")]
            assert tops == list(range(SPLITS.index(split), 2 * len(tops), 2))
            places = iter(given.top)
            for e in record.excerpts:
                shown = tuple(store.decode_tokens(e.token_ids))
                same = [r for r in lists[e.kind] if r.tokens == shown]
                assert np.float32(same[0].activations).tolist() == e.activations.tolist()
                start = e.position - e.peak
                assert tokens.read(start, start + len(e)).tolist() == e.token_ids.tolist()
                assert tokens.documents_at(np.array([e.position])).tolist() == [e.document]
                if e.kind == "top":
                    assert any(r is same[0] for r in places), "in the order of the file"
                    assert e.peak == e.activations.argmax()
                    turns[split, given.top.index(same[0]) % 2] += 1
    wanted = [turns["fit", 0], turns["held_out", 1]]
    moved = [turns["fit", 1], turns["held_out", 0]]
    assert min(wanted) > max(moved) > 0
    firsts = [r.of_kind("random") for r in read_records(harvest, "held_out")]
    assert all([e.rank for e in row] == list(range(len(row))) for row in firsts)


def test_a_list_that_repeats_a_text_gives_it_once(tmp_path):
    a, b, c = (ActivationRecord((" x", f" {n}"), (0.0, n)) for n in (3, 2, 1))
    record = OpenAIRecord.of(0, 0, top=(a, b, a, a), random=(c, a, c), by_quantile=((b,), (b,)))
    (tmp_path / "0.json").write_bytes(encode_record(record))
    result = cratelm.api.import_records(
        run=tmp_path / "run", files=(tmp_path / "0.json",), model="m", quiet=True
    )
    found = [e for split in SPLITS for r in read_records(result.path, split) for e in r.excerpts]
    assert Counter(e.kind for e in found) == {"top": 2, "random": 2, "openai_bin": 1}
    assert result.repeated == 4


def test_statistics_that_the_files_lack_are_those_of_the_random_sample(tmp_path):
    given = planted_file(tmp_path / "files", 5, variance=float("nan"), skewness=0.25)
    config = {"run": tmp_path / "run", "files": (tmp_path / "files",), "model": "m", "quiet": True}
    result = cratelm.api.import_records(**config)
    assert (result.without_mean, result.without_random) == (1, 0)
    for split in SPLITS:
        (record,) = read_records(result.path, split)
        sample = np.concatenate([e.activations for e in record.of_kind("random")])
        summary = record.summary
        assert summary.mean == pytest.approx(sample.mean())
        assert summary.variance == pytest.approx(sample.var())
        assert summary.skew == 0.25
        assert summary.firing_rate == pytest.approx((sample > 0).mean())
        assert (summary.n_tokens, summary.histogram.sum()) == (len(sample), len(sample))
        assert np.isnan(summary.anthropic_edges).all()
    assert len(given.random) == 20


def test_hostile_tokens_survive(tmp_path):
    path = tmp_path / "0.json"
    texts = tuple(
        ActivationRecord((*HOSTILE, f"number {n}", "<|endoftext|>"), tuple(range(len(HOSTILE) + 2)))
        for n in range(4)
    )
    path.write_bytes(encode_record(OpenAIRecord.of(0, 0, top=texts, random=texts)))
    result = cratelm.api.import_records(run=tmp_path / "run", files=(path,), model="m", quiet=True)
    store = TokenStore(tmp_path / "run" / "tokens")
    for split in SPLITS:
        (record,) = read_records(result.path, split)
        for excerpt in record.excerpts:
            shown = store.decode_tokens(excerpt.token_ids)
            # what UTF-8 cannot hold is shown as its escape, all else as it was
            escaped = ["\\ud83d" if token == "\ud83d" else token for token in HOSTILE]
            assert shown[: len(HOSTILE)] == escaped
            assert shown[-1] == "<|endoftext|>"
    cratelm.api.explain(run=tmp_path / "run", model="m", quiet=True)
    cratelm.api.score(run=tmp_path / "run", model="m", resamples=100, quiet=True)
    page = cratelm.api.report(run=tmp_path / "run", resamples=100).page.read_text()
    assert "<script>alert" not in page


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "1" + "0" * 400, "3.5e38"])
def test_numbers_beyond_float32_are_an_error_and_nothing_is_written(number, tmp_path):
    planted_file(tmp_path / "files", 5)
    path = tmp_path / "files" / "0-5.json"
    path.write_text(path.read_text().replace('"activations":[0.0', f'"activations":[{number}', 1))
    with pytest.raises(
        InputError, match=r"0-5\.json: random \d+ has an activation that is not a finite"
    ):
        cratelm.api.import_records(run=tmp_path / "run", files=(path,), model="m", quiet=True)
    assert not (tmp_path / "run").exists()


MANY = [{"tokens": [f"{n}"], "activations": [n]} for n in range(2**14 + 1)]
TOO_MANY = {
    "tokens": {"random_sample": [{"tokens": ["a"] * 2**15, "activations": [1] * 2**15}]},
    "activation records in its list": {"most_positive_activation_records": MANY},
    "quantiles": {"random_sample_by_quantile": [MANY[:1]] * 129},
}


@pytest.mark.parametrize("what", TOO_MANY)
def test_more_than_the_tables_hold_is_an_error_and_nothing_is_written(what, tmp_path):
    path = tmp_path / "0.json"
    path.write_text(json.dumps(minimal(**TOO_MANY[what])))
    with pytest.raises(InputError, match=rf"0\.json: .*[0-9] {what}, but at most"):
        cratelm.api.import_records(run=tmp_path / "run", files=(path,), model="m", quiet=True)
    assert not (tmp_path / "run").exists()


def test_as_much_as_the_tables_hold_is_imported(tmp_path):
    bins = [[one] for one in MANY[:128]]
    value = minimal(most_positive_activation_records=MANY[:-1], random_sample_by_quantile=bins)
    path = tmp_path / "0.json"
    path.write_text(json.dumps(value))
    result = cratelm.api.import_records(run=tmp_path / "run", files=(path,), model="m", quiet=True)
    records = [r for split in SPLITS for r in read_records(result.path, split)]
    assert max(e.rank for r in records for e in r.of_kind("top")) == 2**14 - 1
    assert max(e.bin for r in records for e in r.excerpts) == 127


def test_neurons_that_cannot_be_split_are_left_out_and_counted(tmp_path):
    planted_file(tmp_path, 5)
    text = ActivationRecord((" a", " b"), (0.0, 1.0))
    alone = OpenAIRecord.of(0, 6, top=(text, text), random=(text,))
    (tmp_path / "alone.json").write_bytes(encode_record(alone))
    common = {"run": tmp_path / "run", "model": "m", "quiet": True}
    with pytest.raises(InputError, match="none of the 1 neurons has two texts"):
        cratelm.api.import_records(files=(tmp_path / "alone.json",), **common)
    result = cratelm.api.import_records(files=(tmp_path,), **common)
    assert (result.neurons, result.left_out) == (1, 1)
    assert [s.neuron.index for s in read_summaries(result.path, "fit")] == [5]


def test_what_was_imported_is_kept_unless_forced(tmp_path, capsys):
    planted_file(tmp_path / "files", 5)
    config = {"run": tmp_path / "run", "files": (tmp_path / "files",), "model": "m", "quiet": True}
    first = cratelm.api.import_records(**config)
    assert cratelm.api.import_records(**config) == first
    assert "activations/m is finished, skipped" in capsys.readouterr().out
    planted_file(tmp_path / "files", 6)
    with pytest.raises(InputError, match="--force to redo it"):
        cratelm.api.import_records(**config)
    assert cratelm.api.import_records(**config, force=True).neurons == 2


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ((), "--files is empty"),
        (("absent.json",), "absent.json does not exist"),
        (("empty",), "has no .json file"),
        (("one.json", "two.json"), r"two.json and .*one.json are both of layer 0, neuron 5"),
    ],
)
def test_files_that_cannot_be_meant(files, told, tmp_path):
    planted_file(tmp_path, 5)
    (tmp_path / "empty").mkdir()
    for name in ("one.json", "two.json"):
        (tmp_path / name).write_bytes((tmp_path / "0-5.json").read_bytes())
    with pytest.raises(InputError, match=told):
        cratelm.api.import_records(
            run=tmp_path / "run", files=tuple(tmp_path / f for f in files), model="m", quiet=True
        )
    assert not (tmp_path / "run").exists()


# --- a harvest, explained and scored, to export -------------------------------------------------


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    """A run with tokens, a harvest with OpenAI's bins, and explanations and scores with and without a model."""
    run = Run(tmp_path_factory.mktemp("harvested"))
    with run.stage("tokens").write({}, {}) as draft:
        texts = ImportedTexts(
            {token: n for n, token in enumerate([*planted.STRINGS, "<|endoftext|>"])}
        )
        writer = texts.writer(draft.path)
        for split in SPLITS:
            for row in planted.corpus(split)[0].reshape(-1, planted.LENGTH):
                writer.append(split, row.tolist(), Document("text", "made up", "", 0, ""))
        writer.close()
    tokens = {"tokens": run.stage("tokens").require("tokenize")}
    with run.stage("activations", "m").write({}, tokens) as draft:
        for split in SPLITS:
            write_records(draft.path, split, [_record(i, split) for i in NEURONS])
    cratelm.api.explain(run=run.path, model="m", quiet=True)
    cratelm.api.score(run=run.path, model="m", resamples=100, quiet=True)
    _ask_a_model(run)
    return run


def _record(index: int, split) -> NeuronRecord:
    """A planted neuron with true statistics and some excerpts as if drawn from OpenAI's bins."""
    tokens, _ = planted.corpus(split)
    values = np.float32(planted.on_token(tokens, index))
    record = planted.harvested(values, split, index)
    bins = [
        replace(e, kind="openai_bin", bin=place % 5, rank=place // 5)
        for place, e in enumerate(record.of_kind("random")[: 15 if split == "fit" else 20])
    ]
    centred = (values - values.mean(dtype=np.float64)) / values.std(dtype=np.float64)
    summary = replace(
        record.summary,
        mean=float(values.mean(dtype=np.float64)),
        variance=float(values.var(dtype=np.float64)),
        skew=float((centred**3).mean()),
        kurtosis=float((centred**4).mean()),
        histogram=np.histogram(values, 64, (0, 1.2))[0],
        histogram_high=1.2,
        openai_edges=np.float32([0, 0, 0, 0.95, 1.05, 1.1]),
    )
    return NeuronRecord(summary, (*record.excerpts, *bins))


def _ask_a_model(run: Run) -> None:
    """Explanations and scores such as a language model called `tiny` would give."""
    neuron = NeuronId("m", "ista", 0, 4)
    made = [
        Explanation(neuron, "tiny", f"of {evidence} </script>", {"evidence": evidence}, (0,))
        for evidence in ("top", "anthropic")
    ]
    harvest = {"activations": run.stage("activations", "m").require("harvest")}
    with run.stage("explanations", "m@tiny").write({}, harvest) as draft:
        write_explanations(draft.path, made)
        write_selected(draft.path, [])
        write_unexplained(draft.path, [])
    done = run.stage("explanations", "m@tiny").completion()
    assert done is not None
    rows = [
        ("tiny", "detection", "none", Score(0.75, accuracy=0.5)),
        ("tiny", "anthropic", "none", Score(0.25)),
        ("tiny+paper-compat", "top_and_random", "none", Score(0.125)),
        ("tiny", "top_and_random", "none", Score(None, Status.UNDEFINED, "constant")),
        ("tiny", "detection", "shuffled", Score(0.5)),
    ]
    scores = [NeuronScore(neuron, e, m, c, s, (1,)) for e, m, c, s in rows]  # type: ignore[arg-type]
    with run.stage("scores", "m@tiny").write(
        {"simulator": "hf:/home/me/models/tiny/"}, {"explanations": done}
    ) as draft:
        write_scores(draft.path, scores)


def both(run: Run, index: int) -> tuple[NeuronRecord, NeuronRecord]:
    folder = run.stage("activations", "m").path
    (fit,), (held_out,) = (list(read_records(folder, s, [0], [index])) for s in SPLITS)
    return fit, held_out


# --- export of records --------------------------------------------------------------------------


def test_exported_excerpts_take_turns_and_are_those_of_the_harvest(harvested, tmp_path):
    result = cratelm.api.export_records(
        run=harvested.path, model="m", out=tmp_path / "out", only=("0:5",), quiet=True
    )
    assert [p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.json")] == [
        Path("0/5.json")
    ]
    record = read_record(tmp_path / "out" / "0" / "5.json")
    assert (record.layer, record.index, result.neurons) == (0, 5, 1)
    lists = {("top", -1): record.top, ("random", -1): record.random}
    lists |= {("openai_bin", b): row for b, row in enumerate(record.by_quantile or ())}
    assert len(lists) == 7
    n_there = 0
    for turn, split in enumerate(both(harvested, 5)):
        for e in split.excerpts:
            if (e.kind, e.bin) not in lists:
                continue
            n_there += 1
            row = lists[e.kind, e.bin]
            place = 2 * e.rank + turn
            if place < len(row):
                assert row[place].tokens == tuple(planted.STRINGS[t] for t in e.token_ids)
                assert np.float32(row[place].activations).tolist() == e.activations.tolist()
    assert all(len(row) % 2 == 0 for row in lists.values())
    assert len(record.top) > 60
    assert result.left_out == n_there - sum(map(len, lists.values())) >= 5
    assert record.boundaries == (0, 0, 0, 0.95, 1.05, 1.1)


def test_activations_are_written_short(harvested):
    store = TokenStore(harvested.path / "tokens")
    record, _ = openai_record(*both(harvested, 5), store)
    highest = max(record.top[0].activations)
    assert 9 <= len(repr(highest)) <= 12
    assert float(np.float32(highest)) != highest, "no double of many digits"


def test_moments_are_those_of_both_splits_together(harvested):
    fit, held_out = both(harvested, 5)
    values = np.concatenate(
        [np.float32(planted.on_token(planted.corpus(s)[0], 5)) for s in SPLITS]
    ).astype(np.float64)
    scaled = (values - values.mean()) / values.std()
    told = pooled_moments([fit.summary, held_out.summary])
    assert told["mean"] == pytest.approx(values.mean())
    assert told["variance"] == pytest.approx(values.var(), rel=1e-5)
    assert told["skewness"] == pytest.approx((scaled**3).mean(), rel=1e-5)
    assert told["kurtosis"] == pytest.approx((scaled**4).mean(), rel=1e-5)
    dead = replace(fit.summary, mean=0.0, variance=0.0, skew=np.nan, kurtosis=np.nan)
    assert pooled_moments([dead, dead])["skewness"] is None
    mixed = pooled_moments([dead, held_out.summary])
    assert mixed["kurtosis"] > held_out.summary.kurtosis


def test_what_is_exported_imported_and_exported_again_is_the_same(harvested, tmp_path):
    common = {"model": "m", "quiet": True}
    cratelm.api.export_records(run=harvested.path, out=tmp_path / "first", **common)
    imported = cratelm.api.import_records(
        run=tmp_path / "run", files=(tmp_path / "first",), site="ista", **common
    )
    cratelm.api.export_records(run=tmp_path / "run", out=tmp_path / "second", **common)
    files = sorted(p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*.json"))
    assert len(files) == len(NEURONS) == imported.neurons
    for name in files:
        first, second = ((tmp_path / run / name).read_bytes() for run in ("first", "second"))
        assert first == second
    # and the tables made of them hold what the first harvest held, in the same splits
    for split in SPLITS:
        before = {
            r.neuron: r for r in read_records(harvested.stage("activations", "m").path, split)
        }
        for record in read_records(imported.path, split):
            known = {
                (e.kind, e.token_ids.tobytes(), e.activations.tobytes())
                for e in before[record.neuron].excerpts
            }
            store = TokenStore(tmp_path / "run" / "tokens")
            there = [
                (
                    e.kind,
                    np.int32(
                        [planted.STRINGS.index(t) for t in store.decode_tokens(e.token_ids)]
                    ).tobytes(),
                    e.activations.tobytes(),
                )
                for e in record.excerpts
            ]
            assert len(there) > 40
            assert set(there) <= known


# --- Neuronpedia --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def neuronpedia(harvested, tmp_path_factory):
    out = tmp_path_factory.mktemp("neuronpedia") / "out"
    result = cratelm.api.export_neuronpedia(
        run=harvested.path, model="m", out=out, excerpts=3, model_id="Tiny_1", quiet=True
    )
    return out, result


FOLDERS = {
    "features": "feature",
    "activations": "activation",
    "explanations": "explanation",
    "explanation-scores": "explanation_score",
}


def rows_of(out: Path, name: str, source: str = "0-ista") -> list[dict]:
    lines = gzip.decompress((out / "Tiny_1" / source / name / "batch-0.jsonl.gz").read_bytes())
    return [json.loads(line) for line in lines.splitlines()]


def validator(name: str) -> jsonschema.Draft202012Validator:
    text = (resources.files("cratelm.interop") / "neuronpedia.schema.json").read_text()
    schema = json.loads(text)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator({**schema, "$ref": f"#/$defs/{name}"})


def test_every_row_is_valid_against_neuronpedia_s_tables(neuronpedia):
    out, result = neuronpedia
    folder = out / "Tiny_1" / "0-ista"
    counts = {}
    for name, table in FOLDERS.items():
        rows = rows_of(out, name)
        counts[name] = len(rows)
        check = validator(table)
        for row in rows:
            check.validate(row)
        assert len({json.dumps(r) if "id" not in r else r["id"] for r in rows}) == len(rows)
    told = (result.features, result.activations, result.explanations, result.scores)
    assert tuple(counts.values()) == told
    files = [*folder.glob("*.jsonl"), *(out / "config").glob("*.jsonl")]
    assert len(files) == 8
    for path in files:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows, path
        for row in rows:
            validator(path.stem).validate(row)


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("feature", {"pos_str": None}),
        ("feature", {"unheard_of": 1}),
        ("feature", {"frac_nonzero": 1.5}),
        ("activation", {"values": ["1"]}),
        ("activation", {"index": 3}),
        ("explanation", {"description": None}),
        ("explanation_score", {"value": None}),
    ],
)
def test_the_schema_refuses_other_rows(table, change, neuronpedia):
    folder = next(name for name, of in FOLDERS.items() if of == table)
    row = rows_of(neuronpedia[0], folder)[0]
    with pytest.raises(jsonschema.ValidationError):
        validator(table).validate({**row, **change})


def test_features_have_the_values_of_the_harvest(harvested, neuronpedia):
    rows = {row["index"]: row for row in rows_of(neuronpedia[0], "features")}
    assert list(rows) == [str(i) for i in NEURONS]
    for index, row in rows.items():
        fit, held_out = (r.summary for r in both(harvested, int(index)))
        n_fired = sum(
            int((np.float32(planted.on_token(planted.corpus(s)[0], int(index))) > 0).sum())
            for s in SPLITS
        )
        assert row["maxActApprox"] == max(fit.maximum, held_out.maximum)
        assert row["frac_nonzero"] == pytest.approx(n_fired / (fit.n_tokens + held_out.n_tokens))
        assert sum(row["freq_hist_data_bar_heights"]) == n_fired
        assert row["freq_hist_data_bar_heights"][0] == 0, "zeros are not drawn"
        assert row["pos_str"] == row["neg_values"] == row["vector"] == []


def test_features_have_the_tokens_that_neurons_promote(harvested, tmp_path):
    """Where they were measured on this very harvest."""
    path = tmp_path / "run"
    shutil.copytree(harvested.path, path)
    run = Run(path)
    row = {"model": "m", "site": "ista", "layer": 0, "index": 5, "kind": "exact", "activation": 1.0}
    row |= {"n_positions": 3, "promoted_ids": [4, 2], "promoted": ["e", "c"]}
    row |= {"promoted_values": [2.5, 1.0], "suppressed_ids": [1], "suppressed": ["b"]}
    row |= {"suppressed_values": [-1.5], "agreement": None, "overlap": None}
    for number, harvest in enumerate((run.stage("activations", "m").require("").identity, "other")):
        with run.stage("steer", "m").write({}, {"activations": harvest}) as draft:
            table = pa.Table.from_pylist([row], schema=LOGIT_EFFECTS.schema)
            pq.write_table(table, draft.path / "logit_effects.parquet")
        out = tmp_path / f"out-{number}"
        cratelm.api.export_neuronpedia(
            run=path, model="m", out=out, only=("0:5", "0:6"), model_id="Tiny_1", quiet=True
        )
        rows = {row["index"]: row for row in rows_of(out, "features")}
        assert rows["6"]["pos_str"] == []
        found = [rows["5"][name] for name in ("pos_str", "pos_values", "neg_str", "neg_values")]
        assert found == ([["e", "c"], [2.5, 1.0], ["b"], [-1.5]] if not number else [[]] * 4)
        validator("feature").validate(rows["5"])


def test_activations_have_the_values_of_the_harvest(harvested, neuronpedia):
    rows = [r for r in rows_of(neuronpedia[0], "activations") if r["index"] == "5"]
    expected = []
    for split, record in zip(SPLITS, both(harvested, 5), strict=True):
        for e in record.excerpts:
            if e.kind in ("top", "random", "openai_bin") and e.rank < 3:
                tokens = [planted.STRINGS[t] for t in e.token_ids]
                expected.append((f"{split}, {e.kind}", tokens, e.activations.tolist(), e.peak))
    found = [
        (r["dataSource"], r["tokens"], np.float32(r["values"]).tolist(), r["qualifyingTokenIndex"])
        for r in rows
    ]
    assert found == expected
    assert Counter(r["binContains"] for r in rows) == {
        -1: 6,
        None: 6,
        0.5: 6,
        0.9: 6,
        0.99: 6,
        0.009: 6,
        0.001: 6,
    }
    for r in rows:
        assert r["values"][r["maxValueTokenIndex"]] == r["maxValue"] == max(r["values"])
        assert r["minValue"] == min(r["values"])


def test_scores_belong_to_the_explanation_that_was_read(harvested, neuronpedia):
    out, result = neuronpedia
    explanations = {r["id"]: r for r in rows_of(out, "explanations")}
    assert Counter(r["typeName"] for r in explanations.values()) == {
        "cratelm_lookup": len(NEURONS),
        "cratelm_trie": len(NEURONS),
        "cratelm_concepts": len(NEURONS),
        "cratelm_model_top": 1,
        "cratelm_model_anthropic": 1,
    }
    rows = rows_of(out, "explanation-scores")
    found = {
        (
            explanations[r["explanationId"]]["typeName"],
            r["explanationScoreTypeName"],
            json.loads(r["jsonDetails"])["explainer"],
            r["value"],
        )
        for r in rows
        if r["explanationScoreModelName"] == "tiny"
    }
    assert found == {
        ("cratelm_model_top", "cratelm_detection", "tiny", 0.75),
        ("cratelm_model_top", "cratelm_top_and_random", "tiny+paper-compat", 0.125),
        ("cratelm_model_anthropic", "cratelm_anthropic", "tiny", 0.25),
    }
    assert result.without_value == 1
    own = [s for s in read_scores(harvested.stage("scores", "m").path) if s.control == "none"]
    told = {
        (
            explanations[r["explanationId"]]["index"],
            r["explanationScoreModelName"],
            r["explanationScoreTypeName"],
        ): r["value"]
        for r in rows
    }
    for s in own:
        key = str(s.neuron.index), s.explainer, f"cratelm_{s.metric}"
        assert told[key] == s.score.value
    names = {
        json.loads(line)["name"]
        for line in (out / "config" / "explanation_score_type.jsonl").read_text().splitlines()
    }
    assert names == {r["explanationScoreTypeName"] for r in rows}


@pytest.mark.usefixtures("undrawn")
def test_bins_of_files_of_others_are_not_said_to_be_our_quantiles(tmp_path):
    bins = [
        [{"tokens": [f"{b}", f"{n}"], "activations": [n, b]} for n in range(4)] for b in range(5)
    ]
    edges = [0, 0.5, 1.5, 2.5, 3.5, 4.5]
    for name, value in {
        "five": minimal(random_sample_by_quantile=bins, quantile_boundaries=edges),
        "four": minimal(random_sample_by_quantile=bins[:4], quantile_boundaries=edges),
        "six": minimal(random_sample_by_quantile=[*bins, []], quantile_boundaries=edges),
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
        common = {"run": tmp_path / name, "model": "m", "quiet": True}
        cratelm.api.import_records(files=(tmp_path / f"{name}.json",), **common)
        cratelm.api.export_neuronpedia(out=tmp_path / f"{name}.out", model_id="Tiny_1", **common)
        rows = rows_of(tmp_path / f"{name}.out", "activations", "0-mlp")
        of_bins = [r for r in rows if r["dataSource"].endswith("openai_bin")]
        assert len(of_bins) == 4 * min(len(value["random_sample_by_quantile"]), 5)
        assert {r["binContains"] for r in of_bins} == {None}
        known = dict(itertools.pairwise(edges)) if name == "five" else {None: None}
        assert {r["binMin"]: r["binMax"] for r in of_bins} == known
        for row in rows:
            validator("activation").validate(row)


def test_explanations_of_a_harvest_that_changed_are_an_error(harvested, tmp_path):
    shutil.copytree(harvested.path, tmp_path / "run")
    with Run(tmp_path / "run").stage("activations", "m").write({"again": 1}, {}) as draft:
        for split in SPLITS:
            write_records(draft.path, split, [_record(index, split) for index in NEURONS])
    with pytest.raises(InputError, match="explanations/m was made from an earlier activations/m"):
        cratelm.api.export_neuronpedia(
            run=tmp_path / "run", model="m", out=tmp_path / "o", quiet=True
        )
    assert not (tmp_path / "o").exists()


def test_scores_of_explanations_that_changed_are_an_error(harvested, tmp_path):
    shutil.copytree(harvested.path, tmp_path / "run")
    cratelm.api.explain(
        run=tmp_path / "run", model="m", explainers=("lookup",), force=True, quiet=True
    )
    with pytest.raises(InputError, match="scores/m was made from an earlier explanations/m"):
        cratelm.api.export_neuronpedia(
            run=tmp_path / "run", model="m", out=tmp_path / "o", quiet=True
        )
    assert not (tmp_path / "o").exists()


# --- folders ------------------------------------------------------------------------------------

EXPORTS = [cratelm.api.export_records, cratelm.api.export_neuronpedia]


@pytest.mark.parametrize("export", EXPORTS)
def test_the_same_export_has_the_same_bytes(export, harvested, tmp_path):
    for name in ("a", "b"):
        export(run=harvested.path, model="m", out=tmp_path / name, only=("0:4",), quiet=True)
    a, b = (
        {
            p.relative_to(tmp_path / n): p.read_bytes()
            for p in (tmp_path / n).rglob("*")
            if p.is_file()
        }
        for n in ("a", "b")
    )
    assert a == b
    assert a


@pytest.mark.parametrize("export", EXPORTS)
def test_a_harvest_of_other_tokens_is_an_error(export, harvested, tmp_path):
    shutil.copytree(harvested.path, tmp_path / "run")
    with Run(tmp_path / "run").stage("tokens").write({"again": 1}, {}) as draft:
        shutil.copytree(harvested.path / "tokens", draft.path, dirs_exist_ok=True)
    with pytest.raises(InputError, match="activations/m was made from an earlier tokens"):
        export(run=tmp_path / "run", model="m", out=tmp_path / "o", quiet=True)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("export", EXPORTS)
def test_nothing_of_others_is_replaced(export, harvested, tmp_path):
    config = {"run": harvested.path, "model": "m", "only": ("0:4",), "quiet": True}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="is not empty and was not written by an import or export"):
        export(out=tmp_path / "mine", force=True, **config)
    with pytest.raises(InputError, match="is a file"):
        export(out=tmp_path / "mine" / "thesis.txt", **config)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    (tmp_path / "out").mkdir()
    export(out=tmp_path / "out", **config)
    with pytest.raises(InputError, match="--force to replace it"):
        export(out=tmp_path / "out", **config)
    (tmp_path / "out" / "old.json").write_text("{}")
    export(out=tmp_path / "out", force=True, **config)
    assert not (tmp_path / "out" / "old.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"layers": (3,)}, "--layers: layer 3 is not in .* whose layers are 0"),
        ({"layers": (-1,)}, "--layers -1: layers are numbered from 0"),
        ({"only": ("3:4",)}, "--only: layer 3 is not in .* whose layers are 0"),
        ({"only": ("0:4", "0:99")}, "--only 0:99: layer 0 .* 4 to 9"),
        ({"only": ("4",)}, "--only 4: write a neuron as LAYER:INDEX"),
        ({"only": ("0:4",), "layers": (0,)}, "cannot be combined"),
        ({"model": "other"}, "cratelm harvest --run"),
    ],
)
def test_what_is_not_there_is_told_and_nothing_is_written(export, asked, told, harvested, tmp_path):
    with pytest.raises(InputError, match=told):
        export(
            **{"run": harvested.path, "model": "m", "out": tmp_path / "o", "quiet": True, **asked}
        )
    assert not list(tmp_path.iterdir())


def test_an_error_half_way_leaves_nothing(harvested, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("power cut")

    monkeypatch.setattr("cratelm.interop.export_records.encode_record", broken)
    with pytest.raises(RuntimeError):
        cratelm.api.export_records(run=harvested.path, model="m", out=tmp_path / "o", quiet=True)
    assert not list(tmp_path.iterdir())
