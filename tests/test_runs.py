"""The run directory: what is finished, what changed, what a kill leaves behind."""

import contextlib
import dataclasses
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from cratelm.errors import InputError
from cratelm.runs import RECORD, Run, at_least, known_fields, names, not_in_identity
from cratelm.runs.identity import commit_of
from cratelm.runs.stage import FORMAT, OLDEST_READ, RENAMED
from cratelm.steer.store import LayerEffects, read_effects_summary


@dataclass(frozen=True)
class Config:
    size: int = 3
    where: str = not_in_identity("here")


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


# ---- records of other versions --------------------------------------------------------------------


def edit(stage, **changes):
    """Changes the record in place; a value of None removes the key."""
    path = stage.path / RECORD
    record = json.loads(path.read_text(encoding="utf-8")) | {"checksum": None} | changes
    path.write_text(
        json.dumps({k: v for k, v in record.items() if v is not None}), encoding="utf-8"
    )


@dataclass(frozen=True)
class Inner:
    depth: int = 2
    later: str = "x"


@dataclass(frozen=True)
class Later:
    """`Config` of a later version, with three options more."""

    size: int = 3
    beam: int = 1
    words: tuple[str, ...] = ()
    inner: Inner = Inner()


def test_a_later_option_with_its_default_makes_no_stage_stale(tmp_path):
    stage = Run(tmp_path).stage("model", "m")
    write(stage)
    assert stage.is_finished(Later(), {"tokens": "abc"})
    for changed in (Later(beam=2), Later(words=("a",)), Later(inner=Inner(depth=3)), Later(size=4)):
        with pytest.raises(InputError, match=r"was finished with .*--force"):
            stage.is_finished(changed, {"tokens": "abc"})
    edit(stage, config={"size": 3, "inner": {"depth": 2}})  # an inner option is later, too
    assert stage.is_finished(Later(), {"tokens": "abc"})


def test_an_option_that_was_given_and_is_not_any_more_is_a_difference(tmp_path):
    stage = Run(tmp_path).stage("model", "m")
    write(stage, Later(beam=5))
    with pytest.raises(InputError, match="beam=5, now 1"):
        stage.is_finished(Later(), {"tokens": "abc"})
    with pytest.raises(InputError, match="beam=5, now None"):
        stage.is_finished(Config(), {"tokens": "abc"})


def test_an_option_that_was_renamed_is_read_under_its_name_of_today(tmp_path, monkeypatch):
    stage = Run(tmp_path).stage("model", "m")
    write(stage, {"width": 5})
    monkeypatch.setitem(RENAMED, "model", {"width": "size"})
    assert stage.is_finished(Config(size=5), {"tokens": "abc"})


def test_unknown_keys_of_a_record_are_kept(tmp_path):
    run = Run(tmp_path)
    write(run.stage("model", "m"))
    edit(run.stage("model", "m"), colour="blue")
    assert run.stage("model", "m").require("train").results == {"figure": 7}
    write(run.stage("model", "other"))
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert [s.get("colour") for s in manifest["stages"]] == ["blue", None]
    assert manifest["format"] == FORMAT


@dataclass(frozen=True)
class Figures:
    path: Path
    figure: int
    added_later: str = "default"


def test_figures_of_other_versions_are_read(tmp_path):
    """One that is unknown is left out, one that was added later has its default, one that is needed is told."""
    stage = Run(tmp_path).stage("model", "m")
    write(stage)
    edit(stage, results={"figure": 7, "of_a_later_version": 1})
    assert stage.result(Figures, path=stage.path) == Figures(stage.path, 7)
    edit(stage, results={"of_a_later_version": 1})
    with pytest.raises(InputError, match=r"lacks figures \(.*'figure'.*cratelm train .* --force"):
        stage.result(Figures, path=stage.path)


def test_a_damaged_record_does_not_stop_other_stages(tmp_path):
    run = Run(tmp_path)
    write(run.stage("model", "bad"))
    for text in ("{", "[]", '{"stage": "model"}', '{"format": 99}', "\udcff"):
        bad = run.stage("model", "bad").path / RECORD
        bad.write_bytes(text.encode("utf-8", "surrogateescape"))
        write(run.stage("model", "good"))
        manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
        assert [s["name"] for s in manifest["stages"]] == ["good"]
        assert list(manifest["unreadable"]) == ["model/bad"]
        with pytest.raises(InputError, match=r"move the folder|upgrade cratelm"):
            run.stage("model", "bad").completion()
    write(run.stage("model", "bad"))  # written again, it is whole
    assert run.stage("model", "bad").require("train")


def test_a_record_of_a_later_format_is_refused_in_one_line(tmp_path):
    stage = Run(tmp_path).stage("model", "m")
    write(stage)
    assert stage.require("train").format == FORMAT
    edit(stage, format=FORMAT + 1, outputs="changed")
    with pytest.raises(InputError, match=rf"later version of cratelm \(format {FORMAT + 1},.*upgrade cratelm") as caught:  # fmt: skip
        stage.require("train")
    assert "\n" not in str(caught.value)


def test_a_stage_of_an_older_format_than_is_read_is_made_again(tmp_path, monkeypatch, capsys):
    stage = Run(tmp_path).stage("scores", "m")
    write(stage)
    edit(stage, format=None, versions={"cratelm": "0.1.0"})
    assert stage.is_finished(Config(), {"tokens": "abc"})
    monkeypatch.setitem(OLDEST_READ, "scores", 2)
    capsys.readouterr()
    assert not stage.is_finished(Config(), {"tokens": "abc"})
    told = capsys.readouterr().out
    assert "scores/m was written by cratelm 0.1.0 in an older format" in told
    assert "it will be redone" in told
    with pytest.raises(InputError, match=r"older format.*cratelm score"):
        stage.require("score")


def test_the_command_of_a_record_gives_its_options(tmp_path):
    run = Run(tmp_path)
    with run.stage("explanations", "m@x").write(Later(beam=2, words=("a", "b c")), {}):
        pass
    stage = run.stage("explanations", "m@x")
    assert stage.command() == f"cratelm explain --run {tmp_path} --beam 2 --words a 'b c' --force"
    edit(stage, format=None, options=None)
    assert "--size 3 --words a 'b c' --force" in stage.command()


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_the_lowest_value_of_an_option_is_named(value):
    with pytest.raises(
        InputError, match=rf"^--batch-size must be at least 1, not {value}: try 16$"
    ):
        at_least(SimpleNamespace(batch_size=value), {"batch_size": 1}, "try 16")
    at_least(SimpleNamespace(batch_size=None, seed=0), {"batch_size": 1, "seed": 0})


# ---- names ----------------------------------------------------------------------------------------


def test_names_are_formatted_and_parsed_back():
    for model in ("crate-2l", "crate-2l+s", "m-init"):
        for of_set in ("", "smol", "free-by-smol"):
            assert names.split_set(names.set_name(model, of_set)) == (model, of_set)
    assert names.sets_of(["m", "m@a", "mm@b", "m@a", "m+s@c"], "m") == ["a"]
    assert names.untrained_name("m") == "m-init"
    assert names.untrained_name("m+s") == "m-init+s"
    assert [names.trained_name(n) for n in ("m-init", "m-init+s", "m", "m+s-init", "-init")] == ["m", "m+s", "", "", ""]  # fmt: skip
    assert names.twin_name("crate-2l-init+s") == "gpt2-2l-init+s"
    assert [names.twin_name(n) for n in ("gpt2-6l", "cratelike", "phi")] == ["crate-6l", "", ""]
    variants = ("crate-tssa-2l-init+s", "gpt2-solu-12l-seed1", "sparse-gpt-2l", "crate-mine")
    twins = ["gpt2-2l-init+s", "crate-12l-seed1", "", "gpt2-mine"]
    assert [names.twin_name(name) for name in variants] == twins


@pytest.mark.parametrize(
    ("untrained", "expected"),
    [
        ({"X-init"}, {"X-init": "X"}),
        (set(), {}),  # trained, whatever it is called
        ({"X-init", "X-init-init"}, {"X-init": "X"}),  # the second is the null of no trained model
        ({"X-init-init"}, {"X-init-init": "X-init"}),
        ({"X", "X-init"}, {}),
    ],
)
def test_null_controls_are_known_by_their_records(untrained, expected):
    given = ["X", "X-init", "X-init-init"]
    assert names.null_controls(given, untrained.__contains__) == expected


def test_a_model_is_untrained_by_its_record(tmp_path):
    run = Run(tmp_path)
    for name, steps in (("a", 5), ("a-init", 0), ("b-init", 5)):
        with run.stage("model", name).write({}, {}) as draft:
            draft.results["steps"] = steps
    for name, model in (("a", "a"), ("a-init", "a-init"), ("b-init", "b-init"), ("c-init", "a")):
        with run.stage("activations", name).write({"model": model}, {}):
            pass
    known = {n for n in (*run.models("activations"), "d-init") if run.is_untrained(n)}
    assert known == {"a-init"}
    assert run.null_controls(run.models("activations")) == {"a-init": "a"}


# ---- the commit -----------------------------------------------------------------------------------


def git(folder, *arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", "-C", folder, *who, *arguments], env=environment, check=True, capture_output=True, text=True)  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A repository of its own, with the package in `src/cratelm`."""
    top = tmp_path / "repository"
    package = top / "src" / "cratelm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    (top / "README.md").write_text("", encoding="utf-8")
    git(tmp_path, "init", "-q", top)
    git(top, "add", ".")
    git(top, "commit", "-qm", "first")
    return top


def test_the_commit_is_that_of_the_package_and_marked_where_the_tree_is_dirty(repository):
    package, head = repository / "src" / "cratelm", git(repository, "rev-parse", "HEAD")
    assert commit_of(package) == head
    (repository / "notes.txt").write_text("not tracked, not code", encoding="utf-8")
    assert commit_of(package) == head
    (package / "new.py").write_text("", encoding="utf-8")
    assert commit_of(package) == f"{head}+dirty"
    (package / "new.py").unlink()
    (repository / "README.md").write_text("changed", encoding="utf-8")
    assert commit_of(package) == f"{head}+dirty"


def test_a_package_installed_inside_a_repository_has_no_commit(repository, monkeypatch):
    installed = repository / ".venv" / "lib" / "site-packages" / "cratelm"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("", encoding="utf-8")
    assert commit_of(installed) == ""
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))  # as in a hook of that repository
    assert commit_of(installed) == ""
    git(repository, "add", "--force", ".")
    git(repository, "commit", "-qm", "with the environment")
    assert commit_of(installed) == ""


def test_a_package_that_its_repository_does_not_track_has_no_commit(tmp_path):
    package = tmp_path / "src" / "cratelm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    assert commit_of(package) == ""  # no repository
    git(tmp_path, "init", "-q", ".")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    assert commit_of(package) == ""


def test_without_git_there_is_no_commit(repository, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(repository / "src" / "cratelm") == ""


def test_keys_that_a_later_version_wrote_are_ignored():
    """In every record that is rebuilt from a file; one that is missing stays missing."""
    assert known_fields(Figures, {"figure": 7, "of_a_later_version": 1}) == {"figure": 7}


def test_a_summary_of_effects_by_a_later_version_is_read(tmp_path):
    layer = dict.fromkeys((f.name for f in dataclasses.fields(LayerEffects)), None)
    layer |= {"layer": 0, "neurons": 2, "dead": 0, "silent": 0, "of_a_later_version": 1}
    content = {"model": "m", "ablation": "zero", "n_tokens": 9, "n_documents": 1}
    content |= {"loss": {"value": 3.0, "error": 0.1}, "layers": [layer], "of_a_later_version": 1}
    (tmp_path / "summary.json").write_text(json.dumps(content), encoding="utf-8")
    assert read_effects_summary(tmp_path).layers[0].neurons == 2
