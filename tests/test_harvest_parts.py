"""Parts of a harvest, collected one by one and merged by a verb: the files are those of one process."""

import json
from pathlib import Path

import pytest
from rank_server import HARVEST, RankServer
from test_harvest_ranks import check_equal, left_over
from tiny_run import MODEL, copied, make_again

from cratelm.cli import main
from cratelm.runs import RECORD, Run

PART = f"{HARVEST} --quiet --part"
MERGE = "merge harvest --run run --model made --device cpu"


@pytest.fixture(scope="module")
def finished(rank_server: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three parts, made out of order; two processes share the last."""
    folder = tmp_path_factory.mktemp("parts")
    copied(folder)
    for part, ranks in (("3/3", 1), ("1/3", 1), ("2/3", 2)):
        outcome = rank_server.run(f"{PART} {part}", folder, ranks)
        assert outcome.statuses == [0] * ranks, outcome.outputs
    return folder


@pytest.fixture
def work(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which commands are run."""
    import shutil

    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def parts(run: Path) -> list[str]:
    folder = run / "parts"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def refused(capsys: pytest.CaptureFixture[str], command: str = MERGE) -> str:
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert main(command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_merged_parts_are_the_files_of_one_process(rank_server, harvested_alone, work):
    assert parts(work) == ["made@1-of-3", "made@2-of-3", "made@3-of-3"]
    assert left_over(work) == []
    outcome = rank_server.run(MERGE, work.parent)
    assert outcome.statuses == [0], outcome.outputs
    check_equal(work, harvested_alone)
    assert parts(work) == []
    listed = json.loads((work / "manifest.json").read_text())["stages"]
    assert [s["name"] for s in listed if s["stage"] in ("parts", "activations")] == [
        MODEL,
        f"{MODEL}-init",
        "made",
    ]
    again = rank_server.run(MERGE, work.parent)
    assert again.statuses == [0]
    assert "is finished, and no parts of it are left" in again.outputs[0]
    assert "is finished, skipped" in rank_server.run(HARVEST, work.parent).outputs[0]


@pytest.mark.fault(
    "a merge of parts is killed", "typed again, it ends with the same files, and the parts are gone"
)
@pytest.mark.parametrize(
    "function",
    [
        "cratelm.activations.merge_harvest:write_split:2",
        "cratelm.runs.atomic:put_in_place:1",
        "cratelm.runs.stage:Stage.remove:2",
    ],
)
def test_a_killed_merge_is_typed_again(rank_server, harvested_alone, work, function):
    killed = rank_server.run(MERGE, work.parent, fails=f"0:{function}:kill")
    assert killed.statuses == [-9], killed.outputs
    assert parts(work)
    assert rank_server.run(MERGE, work.parent).statuses == [0]
    check_equal(work, harvested_alone)
    assert parts(work) == []


def test_missing_parts_are_named(work, capsys):
    Run(work).stage("parts", "made@2-of-3").remove()
    line = refused(capsys)
    assert "of the 3 parts of made, 2/3 is missing" in line
    assert "--part 2/3 --tokens 2000" in line
    assert "--pilot-tokens 128 --batch-tokens 48` first" in line
    assert left_over(work) == []
    assert "there are no parts of other: type" in refused(capsys, MERGE.replace("made", "other"))


def test_parts_that_do_not_belong_together(rank_server, work, capsys):
    def changed(part: str, where: str, **values: object) -> None:
        path = work / "parts" / f"made@{part}" / RECORD
        record = json.loads(path.read_text())
        record[where] |= values
        path.write_text(json.dumps(record | {"checksum": ""}))

    changed("2-of-3", "config", seed=1)
    assert "parts 1/3 and 2/3 of made differ in --seed (0 and 1)" in refused(capsys)
    changed("2-of-3", "config", seed=0)
    changed("3-of-3", "results", batch_tokens=64)
    assert "differ in --batch-tokens (48 and 64)" in refused(capsys)
    changed("3-of-3", "results", batch_tokens=48)
    assert rank_server.run(f"{PART} 1/2", work.parent).statuses == [0]
    assert "parts 1/2 and 1/3 of made are of different divisions" in refused(capsys)
    assert parts(work) == ["made@1-of-2", "made@1-of-3", "made@2-of-3", "made@3-of-3"]


@pytest.mark.fault(
    "a file of a part of a harvest is damaged or missing", "the merge is refused in one line"
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_parts_are_refused(work, capsys, damage):
    path = work / "parts" / "made@2-of-3" / "held_out-1.safetensors"
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    line = refused(capsys)
    assert str(path.relative_to(work.parent)) in line
    assert "is damaged" in line
    assert "--part 2/3" in line
    assert left_over(work) == []


def test_parts_of_other_measurements_are_refused(work, capsys, monkeypatch):
    """A machine of another kind rounds differently, and gets other bins."""
    from cratelm.activations import merge_harvest

    real = merge_harvest.read_part

    def other(folder, split, place):
        state, calibration = real(folder, split, place)
        if folder.name == "made@3-of-3":
            calibration.mean[0] += 1e-6
        return state, calibration

    monkeypatch.setattr(merge_harvest, "read_part", other)
    assert "part 3/3 measured the model with other results than 1/3" in refused(capsys)
    assert left_over(work) == []


def test_parts_of_a_model_that_was_trained_again_are_refused(work, capsys):
    make_again(work, f"model/{MODEL}")
    line = refused(capsys)
    assert "parts/made@1-of-3 is out of date" in line
    assert f"model/{MODEL}" in line
    assert "--part 1/3" in line


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "1/", "a/b", "1/3/3", "-1/3", "1/241", "٣/٤"])
def test_part_is_checked(part, capsys):
    line = refused(capsys, f"harvest --run run --model m --part={part}")
    assert "--part" in line
    assert "1/4" in line
