"""Other versions: said once where it matters; a later run is refused; nothing advises to lose trained weights."""

import contextlib
import json
import re
from pathlib import Path

import pytest

from cratelm.cli import main
from cratelm.errors import InputError
from cratelm.runs import RECORD, Run, skew
from cratelm.runs.stage import FORMAT, STAGES

NOW = {"cratelm": "0.2.1", "torch": "2.9.1+cpu", "transformers": "5.3.0", "numpy": "2.4.0"}


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(skew, "_said", set())


def finished(run: Run, stage: str = "tokens", name: str = "", inputs=None, **versions: str):
    """The record of a stage that other versions made."""
    with run.stage(stage, name).write({"a": 1}, inputs or {}):  # type: ignore[arg-type]
        pass
    record = run.stage(stage, name).path / RECORD  # type: ignore[arg-type]
    content = json.loads(record.read_text())
    content["versions"] |= versions
    content.pop("checksum", None)
    record.write_text(json.dumps(content))
    return run.stage(stage, name).completion()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "patch", "release"),
    [
        ({"torch": "2.9.0"}, ["torch 2.9.0 (now 2.9.1+cpu)"], []),
        ({"torch": "2.8.1"}, ["torch 2.8.1 (now 2.9.1+cpu)"], ["torch 2.8.1 (now 2.9.1+cpu)"]),
        ({"numpy": "1.0"}, [], []),
        ({"cratelm": "0.1.0", "transformers": "5.3.0"}, ["cratelm 0.1.0 (now 0.2.1)"], ["cratelm 0.1.0 (now 0.2.1)"]),
        ({}, [], []),
        (NOW, [], []),
    ],
)  # fmt: skip
def test_differences(before, patch, release):
    assert skew.differences(before, NOW, exact=True) == patch
    assert skew.differences(before, NOW, exact=False) == release


@pytest.mark.fault(
    "a stage is made from results of another release of cratelm, torch or transformers",
    "one note, once",
)
def test_a_stage_from_results_of_another_release_says_so_once(tmp_path, capsys):
    run = Run(tmp_path)
    tokens = finished(run, torch="1.13.0", cratelm="0.0.9")
    for _ in range(2):
        with run.stage("model", "m").write({}, {"tokens": tokens}):
            pass
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert re.search(r"note: model/m is made from results of other versions: tokens with cratelm 0.0.9 \(now [\d.]+\), torch 1.13.0 \(now", said.err)  # fmt: skip
    assert not said.out


def test_the_same_versions_and_patch_releases_say_nothing(tmp_path, capsys):
    run = Run(tmp_path)
    tokens = finished(run, numpy="1.0.0", python="3.1")
    with run.stage("model", "m").write({}, {"tokens": tokens}):
        pass
    run.stage("model", "m").is_finished({}, {"tokens": tokens})
    assert capsys.readouterr().err == ""


def resumed(run: Run, **began_with: str) -> None:
    """Resumes a draft that other versions began."""
    stage = run.stage("model", "m")

    class Killed(Exception):
        pass

    with contextlib.suppress(Killed), stage.write({}, {}, resume=True) as draft:
        plan = draft.path / ".plan.json"
        raise Killed
    content = json.loads(plan.read_text())
    content["versions"] |= began_with
    plan.write_text(json.dumps(content))
    with stage.write({}, {}, resume=True) as draft:
        assert not draft.fresh


@pytest.mark.fault(
    "an interrupted stage is resumed with other versions or another commit",
    "one note names every difference",
)
def test_a_resumed_draft_says_every_difference(tmp_path, capsys):
    resumed(Run(tmp_path), torch="2.0.0", commit="a" * 40)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(r"model/m was begun with torch 2.0.0 \(now .*\)(, commit aaaaaaaaaaaa \(now .*\))? and is resumed", said)  # fmt: skip
    resumed(Run(tmp_path / "other"))
    assert capsys.readouterr().err == ""


def test_a_draft_of_an_earlier_version_resumes_silently(tmp_path, capsys):
    stage = Run(tmp_path).stage("model", "m")
    with contextlib.suppress(ZeroDivisionError), stage.write({}, {}, resume=True) as draft:
        plan = draft.path / ".plan.json"
        raise ZeroDivisionError
    content = json.loads(plan.read_text())
    del content["versions"]
    plan.write_text(json.dumps(content))
    with stage.write({}, {}, resume=True) as draft:
        assert not draft.fresh
    assert capsys.readouterr().err == ""


def test_versions_are_no_part_of_an_identity(tmp_path):
    identities = set()
    for number in range(2):
        run = Run(tmp_path / str(number))
        resumed(run, torch=f"{number}")
        done = run.stage("model", "m").completion()
        assert done is not None
        identities.add(done.identity)
    assert len(identities) == 1


@pytest.mark.parametrize(
    "verb", ["report", "harvest", "explain", "tokenize", "view", "sae compare"]
)
@pytest.mark.fault("a later version wrote the run", "refused in one line")
def test_a_manifest_of_a_later_version_is_refused(verb, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": FORMAT + 1, "stages": []}))
    before = sorted(tmp_path.rglob("*"))
    words = [str(tmp_path)] if verb == "view" else ["--run", str(tmp_path)]
    assert main([*verb.split(), *words]) == 2
    error = capsys.readouterr().err
    assert f"format {FORMAT + 1}, this one reads up to {FORMAT}" in error
    assert "upgrade cratelm" in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", ["", "null", "[]", "{", '{"format": "x"}', '{"format": null}', "\x00"])  # fmt: skip
def test_a_damaged_manifest_is_written_again(content, tmp_path):
    (tmp_path / "manifest.json").write_text(content)
    finished(Run(tmp_path))
    assert json.loads((tmp_path / "manifest.json").read_text())["format"] == FORMAT


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("damage", ["{", '{"format": 99}', "null", '{"stage": "x"}', ""])
@pytest.mark.fault("a record is damaged", "no message advises to delete the stage")
def test_nothing_advises_to_lose_the_files_of_a_stage(stage, damage, tmp_path):
    name = "" if stage in ("tokens", "report") else "m"
    run = Run(tmp_path)
    finished(run, stage, name)
    of = run.stage(stage, name)
    (of.path / RECORD).write_text(damage)
    messages = []
    for ask in (of.completion, of.require, lambda: of.is_finished({}, {})):
        with pytest.raises(InputError) as refused:
            ask()
        messages.append(str(refused.value))
    messages.append(str(of.freshness()))
    for message in messages:
        assert str(of.path) in message
        assert "delete" not in message
        assert "--force" not in message
        assert ("move the folder" in message and "away" in message) or "upgrade cratelm" in message
    assert (of.path / RECORD).read_text() == damage


def test_no_message_of_the_source_advises_to_delete():
    source = Path(__file__).parents[1] / "src" / "cratelm"
    for path in source.rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.search(r"\b(delete(?! from)|rm -r|erase)\b", line.lower()) and '"' in line:
                raise AssertionError(f"{path.name}: {line.strip()}")
