"""Damage to a file of a run is noticed by every verb that reads it, in one line with the command that mends it."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fake_llm import FakeModel
from test_runs_stale import use
from tiny_run import MODEL, copied, reseal

import cratelm
import cratelm.runs.verified as verified_files
from cratelm.activations.store import ExcerptFile, read_records
from cratelm.cli import main
from cratelm.errors import InputError
from cratelm.runs import RECORD, Completion, Run
from cratelm.runs.reading import read_json, read_json_lines, read_parquet, verified
from cratelm.tokens.shards import TokenStore

HARVEST, EXPLAINED, SCORES = (f"{s}/{MODEL}" for s in ("activations", "explanations", "scores"))
WEIGHTS = f"model/{MODEL}/model.safetensors"
READ = {
    "evaluate": (WEIGHTS, f"model/{MODEL}/config.json", "tokens/held_out-00000.bin"),
    "predict": (WEIGHTS, f"model/{MODEL}/tokenizer.json"),
    "steer": (WEIGHTS,),
    "export model": (WEIGHTS,),
    "harvest": (WEIGHTS, "tokens/fit-00000.bin", "tokens/held_out.starts.npy", "tokens/meta.json"),
    "sae train": (WEIGHTS, "tokens/train-00000.bin"),
    "explain": (f"{HARVEST}/excerpts-fit.parquet", f"{HARVEST}/summaries-fit.parquet"),
    "score": (
        f"{HARVEST}/excerpts-held_out.parquet",
        f"{EXPLAINED}/explanations.parquet",
        f"{EXPLAINED}/neurons.parquet",
    ),
    "analyze": (WEIGHTS, f"{EXPLAINED}/explanations.parquet"),
    "effects": (WEIGHTS, f"{HARVEST}/summaries-fit.parquet", "tokens/held_out-00000.bin"),
    "export records": (f"{HARVEST}/excerpts-held_out.parquet", "tokens/tokenizer.json"),
    "export neuronpedia": (f"{SCORES}/scores.parquet", f"{EXPLAINED}/explanations.parquet"),
    "live": (WEIGHTS,),
}
"""verbs, with files that each reads"""
WRITTEN = {"harvest": HARVEST, "explain": EXPLAINED, "score": SCORES, "effects": f"steer/{MODEL}"}
"""stages that verbs write, removed so that they are made and not skipped"""


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    path.write_bytes(b"\xff\x00garbage" * 20)


DAMAGES = {
    "a bit": flip,
    "half of it": cut,
    "all of it": lambda path: path.write_bytes(b""),
    "its content": garble,
    "the file": lambda path: path.unlink(),
}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """The run of version 0.1.0, whose records have hashes, too."""
    monkeypatch.setattr("cratelm.llm.session._backend", lambda config, spec: FakeModel())
    return copied(tmp_path)


@pytest.mark.parametrize(
    ("verb", "name"), [(verb, name) for verb, names in READ.items() for name in names]
)
@pytest.mark.fault(
    "one bit of a model, shard, excerpts or explanations file changes",
    "every verb that opens the file refuses it, names it and the command that makes it again",
)
def test_a_verb_notices_a_changed_bit(verb, name, run, tmp_path):
    if verb in WRITTEN:
        shutil.rmtree(run / WRITTEN[verb])
    flip(run / name)
    with pytest.raises(InputError) as caught:
        use(verb, run, tmp_path)
    told = str(caught.value)
    assert told.startswith(f"{run / name} is damaged (its content is not what its stage wrote)")
    label = "/".join(name.split("/")[:-1])
    assert f"type `{Run(run).labelled(label).command()}` to make it again" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    [WEIGHTS, "tokens/held_out-00000.bin", f"{SCORES}/scores.parquet", f"{SCORES}/summary.json"],
)
@pytest.mark.fault(
    "a file of a finished stage is changed, cut, emptied, replaced or deleted",
    "the verb does not count the stage as finished",
)
def test_a_finished_stage_is_not_skipped_if_a_file_is_damaged(name, damage, run):
    stage = Run(run).labelled("/".join(name.split("/")[:-1]))
    done = stage.completion()
    assert stage.is_finished(done.config, done.inputs)
    DAMAGES[damage](run / name)
    with pytest.raises(InputError, match=rf"{name} is damaged \(.*type `cratelm .*--force`"):
        stage.is_finished(done.config, done.inputs)
    assert not stage.is_finished(done.config, done.inputs, force=True)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    [f"{EXPLAINED}/explanations.parquet", f"{SCORES}/scores.parquet", f"{SCORES}/summary.json"],
)
@pytest.mark.fault(
    "explanations, scores or their summary are damaged before a report",
    "no report is written; the file is named",
)
def test_a_report_is_not_made_of_damaged_files(name, damage, run, undrawn):
    DAMAGES[damage](run / name)
    with pytest.raises(InputError, match=rf"{name} is damaged") as caught:
        cratelm.api.report(run=run, resamples=100)
    assert "\n" not in str(caught.value)
    assert not (run / "report").exists()


@pytest.mark.fault("`completed.json` is edited by hand", "the stage is refused")
def test_a_record_edited_by_hand_is_noticed(run):
    cratelm.api.score(run=run, model=MODEL, resamples=100, quiet=True, force=True)
    path = run / SCORES / RECORD
    record = json.loads(path.read_text())
    record["results"]["neurons"] = 7
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=rf"{RECORD} .*not what its stage wrote"):
        Run(run).labelled(SCORES).require()


@pytest.mark.fault(
    "the record of one stage lies in the folder of another", "the stage is refused; both are named"
)
def test_the_record_of_another_stage_is_noticed(run):
    shutil.copy(run / SCORES / RECORD, run / EXPLAINED / RECORD)
    with pytest.raises(InputError, match=rf"the record of {SCORES}, not of {EXPLAINED}"):
        Run(run).labelled(EXPLAINED).completion()
    assert "cannot be read" in Run(run).labelled(SCORES).freshness().reason
    assert main(["check", str(run)]) == 5


@pytest.mark.timeout(60)
@pytest.mark.fault(
    "records name one another as inputs", "the stages are refused at once; the circle is named"
)
def test_records_that_name_one_another_are_noticed(run):
    """Every stage names every other: to follow each way through them would never end."""
    labels = [label for label in Run(run).labels() if label != "report"]
    assert len(labels) > 9
    for label in labels:
        path = run / label / RECORD
        record = json.loads(path.read_text())
        record |= {"inputs": dict.fromkeys(labels, ""), "checksum": "", "format": 2}
        path.write_text(json.dumps(record | {"input_stages": {name: name for name in labels}}))
    for label in labels:
        assert (
            f"name one another as inputs ({label} <- "
            in Run(run).labelled(label).freshness().reason
        )


# ---- large files ----------------------------------------------------------------------------------


@pytest.mark.fault(
    "a file of 256 MiB or more changes", "it is hashed again if its size or time changed"
)
def test_a_large_file_is_hashed_when_size_or_time_change(run, monkeypatch):
    monkeypatch.setattr(verified_files, "LARGE", 100)
    hashed = []
    monkeypatch.setattr(verified_files, "hash_file", lambda path: hashed.append(path) or real(path))
    path = run / "tokens" / "held_out-00000.bin"
    verified(path)
    verified(path)
    assert hashed == [path]
    verified_files.forget()  # as in another process
    verified(path)
    assert hashed == [path]
    os.utime(path)
    verified(path)
    assert hashed == [path, path]
    flip(path)
    with pytest.raises(InputError, match="is damaged"):
        verified(path)


real = verified_files.hash_file


def test_a_stage_notes_its_large_files_when_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(verified_files, "LARGE", 100)
    stage = Run(tmp_path).stage("tokens")
    with stage.write({"a": 1}, {}) as draft:
        (draft.path / "large").write_bytes(b"x" * 100)
        (draft.path / "small").write_bytes(b"x" * 99)
    found = (tmp_path / "tokens" / "large").stat()
    assert json.loads((tmp_path / "tokens" / ".verified").read_text()) == {
        "large": [100, found.st_mtime_ns]
    }
    assert set(stage.completion().outputs) == {"large", "small"}
    monkeypatch.setattr(verified_files, "hash_file", lambda path: pytest.fail(f"hashed {path}"))
    verified(tmp_path / "tokens" / "large")


def test_a_small_file_is_hashed_once_in_a_process(run, monkeypatch):
    path = run / "tokens" / "tokenizer.json"
    verified(path)
    monkeypatch.setattr(verified_files, "hash_file", lambda path: pytest.fail(f"hashed {path}"))
    verified(path)


# ---- files without a recorded hash ----------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[1]", b"{", b"\xff\xfe", b'{"a": 1', b"[" * 100_000]
)
@pytest.mark.fault(
    "a JSON file is empty, cut, `null`, an array or not UTF-8", "one line names the file"
)
def test_json_that_is_no_object_is_told(content, tmp_path):
    path = tmp_path / "summary.json"
    path.write_bytes(content)
    with pytest.raises(
        InputError, match=r"summary\.json is damaged \(expected a JSON object; .+\): "
    ):
        read_json(path)


@pytest.mark.parametrize("line", ["null", "{", "[1]", "1"])
@pytest.mark.fault("a line of a curve is not a JSON object", "one line names the file and the line")
def test_the_line_of_a_damaged_curve_is_told(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged \(.*line 2 is"):
        read_json_lines(path)
    path.write_text('{"step": 1}\n{"st')  # a line that is being written
    assert read_json_lines(path) == [{"step": 1}]


@pytest.mark.parametrize("damage", ["half of it", "all of it", "its content"])
@pytest.mark.fault(
    "a Parquet file without a record is cut, emptied or garbage", "one line names the file"
)
def test_damaged_parquet_is_told(damage, run):
    path = run / HARVEST / "excerpts-fit.parquet"
    (run / HARVEST / RECORD).unlink()
    DAMAGES[damage](path)
    with pytest.raises(InputError, match=r"excerpts-fit\.parquet is damaged \(expected a Parquet"):
        ExcerptFile(run / HARVEST, "fit")
    with pytest.raises(InputError, match=r"excerpts-fit\.parquet is damaged \(expected a Parquet"):
        read_parquet(path)


def test_a_fault_of_the_system_is_no_damage(tmp_path, monkeypatch):
    """A remedy that makes the file again would lose it for nothing."""
    path = tmp_path / "summary.json"
    path.write_text("{}")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(PermissionError):
        read_json(path)


@pytest.mark.fault("a Parquet file has other columns", "one line names the file and the column")
def test_another_table_is_told(run):
    shutil.copy(run / SCORES / "scores.parquet", run / EXPLAINED / "explanations.parquet")
    (run / EXPLAINED / RECORD).unlink()
    with pytest.raises(InputError, match=r"explanations\.parquet is damaged \(.*'text' is missing"):
        cratelm.explain.store.read_explanations(run / EXPLAINED)
    with pytest.raises(InputError, match=r"explanations\.parquet is damaged \(.*no column text"):
        read_parquet(run / EXPLAINED / "explanations.parquet", columns=["text"])


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Completion)])
def test_a_record_of_another_form_is_told(field, run):
    """Each field with each kind of JSON value that it does not have, also inside a list or an object."""
    path = run / SCORES / RECORD
    record = json.loads(path.read_text())
    kinds = {"text": "x", "number": 1.5, "list": [], "object": {}}
    values = [None, *(value for value in kinds.values() if type(value) is not type(good(field)))]
    if field in ("inputs", "outputs", "versions", "input_stages"):
        values.append({"x": []})
    if field == "options":
        values.append([3])
    for value in values:
        path.write_text(json.dumps(record | {field: value}))
        with pytest.raises(InputError, match=rf"{RECORD} cannot be read as a completion record"):
            Run(run).labelled(SCORES).require()


def good(field: str) -> object:
    """A value of the type of a field of a record."""
    texts = ("stage", "name", "identity", "finished_at", "git_commit", "checksum")
    return {"seconds": 1.5, "format": 1, "options": []}.get(field, "x" if field in texts else {})


@pytest.mark.fault(
    "a token id is beyond the vocabulary", "one line names the id and the vocabulary"
)
@pytest.mark.parametrize("ids", [[-1], [3, 10**6], [2**40]])
def test_ids_beyond_the_vocabulary_are_told(ids, run):
    store = TokenStore(run / "tokens")
    with pytest.raises(InputError, match=f"token id {ids[-1]} is not in the vocabulary of"):
        store.decode_tokens(ids)
    assert store.decode_tokens([]) == []


# ---- cratelm check --------------------------------------------------------------------------------


def found(run: Path, capsys) -> tuple[int, list[str]]:
    status = main(["check", str(run)])
    return status, capsys.readouterr().out.splitlines()


def current(run: Path) -> Path:
    """The run with scores of today's version."""
    return run


def test_a_sound_run(run, capsys):
    status, lines = found(run, capsys)
    assert status == 0, lines
    assert lines[-1].startswith(f"{run}: ")
    assert all(line.startswith("version: ") for line in lines[:-1])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.fault(
    "several files of a run are damaged", "`cratelm check` lists each; exit status 5"
)
def test_every_damaged_file_is_found(damage, run, capsys):
    names = [
        WEIGHTS,
        "tokens/documents.parquet",
        f"{SCORES}/summary.json",
        f"{HARVEST}/excerpts-fit.parquet",
    ]
    for name in names:
        DAMAGES[damage](run / name)
    status, lines = found(run, capsys)
    assert status == 5
    damaged = [line for line in lines if line.startswith("damaged: ")]
    assert sorted(line.split()[1] for line in damaged) == sorted(str(run / name) for name in names)
    assert all("type `cratelm " in line for line in damaged)


@pytest.mark.fault(
    "a bit changes and the file's time does not, as on a failing disk", "`cratelm check` finds it"
)
def test_a_file_that_changed_without_its_time_is_found(run, capsys, monkeypatch):
    """Such as by a failing disk: the reason why `check` trusts no note."""
    monkeypatch.setattr(verified_files, "LARGE", 100)
    path = run / "tokens" / "held_out-00000.bin"
    verified(path)
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    verified_files.forget()
    verified(path)  # size and time are as noted
    status, lines = found(run, capsys)
    assert status == 5
    assert any(line.startswith(f"damaged: {path} ") for line in lines)
    with pytest.raises(InputError, match="is damaged"):
        verified(path)


@pytest.mark.fault(
    "stages are stale, drafts and folders are left over",
    "`cratelm check` lists them; exit status 4",
)
def test_stale_left_over_and_unfinished(run, capsys):
    cratelm.api.train(
        run=run, model=MODEL, steps=1, sequence_length=32, batch_size=4, validation_sequences=4,
        force=True, quiet=True, device="cpu",
        model_overrides=("hidden_size=8", "num_attention_heads=2"),
    )  # fmt: skip
    (run / "scores" / ".0123abcd.x.tmp").mkdir()
    (run / "scores" / ".y.partial").mkdir()
    (run / "scores" / "z").mkdir()
    (run / ".tokens.lock").write_text("")
    status, lines = found(run, capsys)
    assert status == 4
    assert (
        f"stale: {HARVEST} is stale, because {HARVEST} was made from an earlier model/{MODEL}"
        in "\n".join(lines)
    )
    assert any(f"left over: {run / 'scores' / '.0123abcd.x.tmp'}" in line for line in lines)
    assert any(f"left over: {run / 'scores' / 'z'}" in line for line in lines)
    assert any(f"unfinished: {run / 'scores' / '.y.partial'}" in line for line in lines)


@pytest.mark.fault("the ledger or a curve is damaged", "`cratelm check` names it; exit status 5")
def test_a_ledger_and_curves_are_read(run, capsys):
    (run / "ledger.sqlite").write_bytes(b"SQLite format 3\x00" + b"garbage" * 100)
    curve = run / "model" / MODEL / "metrics.jsonl"
    curve.write_text(curve.read_text() + "null\n")
    status, lines = found(run, capsys)
    assert status == 5
    assert any(line.startswith(f"damaged: {run / 'ledger.sqlite'}") for line in lines)
    assert any(line.startswith(f"damaged: {curve}") for line in lines)


@pytest.mark.fault("the manifest is damaged or lists other stages", "`cratelm check` says so")
def test_a_manifest_that_does_not_list_what_is_there(run, capsys):
    shutil.rmtree(run / SCORES)
    status, lines = found(run, capsys)
    assert status == 4
    assert any("manifest.json does not list" in line for line in lines)
    (run / "manifest.json").write_text("null")
    assert found(run, capsys)[0] == 5


def test_what_is_no_run(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    assert "has no stage of a run" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "nothing")]) == 2


@pytest.mark.fault(
    "an excerpts file has other columns, with a fitting hash", "one line names the file"
)
def test_excerpts_with_other_columns_are_told(run):
    path = run / HARVEST / "excerpts-fit.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["kind"]), path)
    reseal(run / HARVEST)
    with pytest.raises(InputError, match=r"excerpts-fit\.parquet is damaged .*kind"):
        list(read_records(run / HARVEST, "fit"))


@pytest.mark.fault(
    "the header of a NumPy file is damaged, with a fitting hash", "one line names the file"
)
def test_a_damaged_header_of_an_array_is_told(run):
    path = run / "tokens" / "fit.starts.npy"
    content = bytearray(path.read_bytes())
    content[content.index(b"(")] = ord("[")
    path.write_bytes(content.replace(b")", b" "))
    reseal(run / "tokens")
    with pytest.raises(InputError, match=r"fit\.starts\.npy is missing or damaged"):
        TokenStore(run / "tokens").split("fit")
