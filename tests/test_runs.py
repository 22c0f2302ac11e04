"""The run directory: what is finished, what changed, what a kill leaves behind."""

import contextlib
import dataclasses
import json
from dataclasses import dataclass

import pytest

from cratelm.errors import InputError
from cratelm.runs import RECORD, Run, aside


@dataclass(frozen=True)
class Config:
    size: int = 3
    where: str = aside("here")


class Killed(Exception):
    """Stands for whatever ends a stage before it is done."""


def write(stage, config=None, inputs=None, text="result", **options):
    with stage.write(config or Config(), inputs or {"tokens": "abc"}, **options) as draft:
        (draft.path / "file.txt").write_text(text)
        draft.results["figure"] = 7


def test_finished_stage_is_replayed_and_skipped(tmp_path):
    run = Run(tmp_path / "run")
    stage = run.stage("model", "crate-2l")
    assert not stage.is_finished(Config(), {"tokens": "abc"})
    write(stage)
    assert stage.is_finished(Config(where="elsewhere"), {"tokens": "abc"})
    done = stage.require("train")
    assert (done.config, done.inputs, done.results) == ({"size": 3}, {"tokens": "abc"}, {"figure": 7})  # fmt: skip
    assert list(done.outputs) == ["file.txt"]
    assert run.models() == ["crate-2l"]
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["stages"] == [json.loads(json.dumps(dataclasses.asdict(done)))]
    assert not stage.is_finished(Config(), {"tokens": "abc"}, force=True)


@pytest.mark.parametrize(
    ("config", "inputs", "told"),
    [
        (Config(size=4), {"tokens": "abc"}, "size=3, now 4"),
        (Config(), {"tokens": "abd"}, "input tokens that has changed"),
    ],
)
def test_what_changed_is_told(tmp_path, config, inputs, told):
    stage = Run(tmp_path).stage("model", "m")
    write(stage)
    with pytest.raises(InputError, match=rf"{told}.*--force"):
        stage.is_finished(config, inputs)


def test_identity_follows_configuration_inputs_and_outputs(tmp_path):
    stage, seen = Run(tmp_path).stage("model", "m"), set()
    for change in ({}, {"config": Config(size=4)}, {"inputs": {"tokens": "x"}}, {"text": "other"}):
        write(stage, **change)
        seen.add(stage.require("train").identity)
    write(stage)
    assert len(seen) == 4
    assert stage.require("train").identity in seen  # the same again is the same


def test_an_error_leaves_the_old_result_and_no_draft(tmp_path):
    stage = Run(tmp_path).stage("model", "m")
    write(stage)
    with contextlib.suppress(Killed), stage.write(Config(size=9), {}) as draft:
        (draft.path / "file.txt").write_text("half")
        raise Killed
    assert (stage.path / "file.txt").read_text() == "result"
    assert [p.name for p in stage.path.parent.iterdir()] == ["m"]


def test_an_unfinished_folder_is_not_taken_for_done(tmp_path):
    stage = Run(tmp_path).stage("model", "m")
    stage.path.mkdir(parents=True)
    (stage.path / "file.txt").write_text("copied by hand")
    assert not stage.is_finished(Config(), {})
    with pytest.raises(InputError, match=r"cratelm train --run .* --model m"):
        stage.require("train")


def test_a_draft_is_resumed_only_with_the_same_plan(tmp_path):
    stage = Run(tmp_path).stage("model", "m")
    with contextlib.suppress(Killed), stage.write(Config(), {}, resume=True) as draft:
        assert draft.fresh
        (draft.path / "checkpoint").write_text("10")
        raise Killed
    with contextlib.suppress(Killed), stage.write(Config(), {}, resume=True) as draft:
        assert not draft.fresh
        assert (draft.path / "checkpoint").read_text() == "10"
        raise Killed
    with stage.write(Config(size=5), {}, resume=True) as draft:
        assert draft.fresh
        assert not (draft.path / "checkpoint").exists()


def test_scratch_is_removed_and_unhashed_files_do_not_count(tmp_path):
    stage, seen = Run(tmp_path).stage("model", "m"), set()
    for time in ("1 s", "2 s"):
        with stage.write(Config(), {}) as draft:
            (draft.path / "weights").write_text("w")
            (draft.path / "checkpoints").mkdir()
            (draft.path / "timing").write_text(time)
            draft.scratch.add("checkpoints")
            draft.unhashed.add("timing")
        seen.add(stage.require("train").identity)
        assert sorted(p.name for p in stage.path.iterdir()) == [RECORD, "timing", "weights"]
    assert len(seen) == 1


def test_damaged_record_and_bad_names_are_told(tmp_path):
    stage = Run(tmp_path).stage("model", "m")
    write(stage)
    (stage.path / RECORD).write_text("{")
    with pytest.raises(InputError, match="completion record"):
        stage.completion()
    for name in ("../x", "a/b", ".hidden"):
        with pytest.raises(InputError, match="cannot name a folder"):
            Run(tmp_path).stage("model", name)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="is a file"):
        Run(file)
