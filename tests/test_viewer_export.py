"""The browser's pages as a folder, and the command `cratelm view`."""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
from viewer_runs import LAYERS, Parsed

from cratelm.cli import main
from cratelm.errors import InputError
from cratelm.results.views import LayerQuery
from cratelm.viewer.config import ViewConfig
from cratelm.viewer.pages import Pages
from cratelm.viewer.static_site import export
from cratelm.viewer.view import view

pytest.importorskip("fastapi", reason="the extra `viewer` is not installed")
pytest.importorskip("sklearn", reason="the extra `viewer` is not installed")


@pytest.fixture
def run(viewer_run) -> Path:
    return viewer_run


@pytest.fixture
def copy(viewer_run, tmp_path) -> Path:
    shutil.copytree(viewer_run, tmp_path / "copy")
    return tmp_path / "copy"


def test_every_link_of_an_export_is_a_file(run, tmp_path, capsys):
    assert main(["view", str(run), "--static", str(tmp_path / "out"), "--neurons", "5"]) == 0
    told = capsys.readouterr().out
    assert "open" in told
    assert "30 neurons with a page (354 have none" in told
    files = sorted((tmp_path / "out").rglob("*.html"))
    assert len(files) == 2 + 3 * LAYERS * (1 + 5)
    for file in files:
        parsed = Parsed(file.read_text(encoding="utf-8"))
        for tag, attributes in parsed.tags:
            assert tag != "form" or attributes.get("method") == "dialog"
            link = attributes.get("href") or attributes.get("src")
            if link and not link.startswith(("#", "data:")):
                assert "?" not in link
                target = (file.parent / link.partition("#")[0]).resolve()
                assert target.is_file(), (file, link)
                assert (tmp_path / "out") in target.parents
    data = [
        json.loads(m)
        for m in re.findall(
            r'id="json">(.*?)</script>', next(f for f in files if "neuron" in f.parts).read_text()
        )
    ]
    assert data[0]["excerpts"]


def test_an_export_replaces_only_its_own(run, library, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(InputError, match="contains other files"):
        export(library, out, 1, True)
    assert (out / "precious").read_text() == "mine"
    (out / "precious").unlink()
    export(library, out, 1, False)
    with pytest.raises(InputError, match="already contains pages: add --force"):
        export(library, out, 1, False)
    export(library, out, 2, True)
    assert len(list((out / "r/run/neuron/crate-2l/0").iterdir())) == 2
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        export(library, tmp_path / "file", 1, True)


def test_pages_are_written_into_any_folder_that_is_empty(library, tmp_path, monkeypatch, capfd):
    def written(named: str) -> None:
        result = export(library, Path(named), 1, force=False)
        assert result.path == Path(named) or named.startswith("made")
        assert (result.path / "index.html").is_file()

    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    written(".")
    assert (Path.cwd() / "index.html").is_file()  # the shell's folder is still this one
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "empty").mkdir()
    for named in ("link/", "new/", "made/../other", "empty/../empty2/"):
        written(named)
    assert (tmp_path / "link").is_symlink()
    first = (tmp_path / "new" / "index.html").read_bytes()
    (tmp_path / "new" / "stale.html").write_text("of before")
    capfd.readouterr()
    export(library, Path("new"), 1, force=True, quiet=True)
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "new" / "index.html").read_bytes() == first
    assert not (tmp_path / "new" / "stale.html").exists()
    assert not list(tmp_path.glob(".*"))


def test_pages_are_written_into_no_other_folder(library, tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path / "below")
    for named, told in (
        ("..", "contains other files"),
        ("/", "contains other files"),
        ("../file", "is a file"),
        ("../file/pages", "is a file, not a folder"),
    ):
        with pytest.raises(InputError, match=told) as error:
            export(library, Path(named), 1, force=True)
        assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_without_the_extra_it_says_so_and_pages_can_be_written(copy, tmp_path, monkeypatch, capsys):
    shutil.rmtree(copy / "viewer", ignore_errors=True)  # maps that are there need nothing
    for name in ("fastapi", "uvicorn", "sklearn", "sklearn.manifold"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("server", "live"):
        monkeypatch.delitem(sys.modules, f"cratelm.viewer.{name}", raising=False)
    assert main(["view", str(copy)]) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told
    assert "pip install '.[viewer]'" in told
    assert main(["view", str(copy), "--static", str(tmp_path / "out"), "--neurons", "2"]) == 0
    page = (tmp_path / "out/r/copy/layer/crate-2l/0.html").read_text()
    assert (
        "The map cannot be drawn (it needs the package scikit-learn, which is not installed: type `pip install"
        in page
    )
    neuron = next((tmp_path / "out/r/copy/neuron/crate-2l/0").iterdir()).read_text()
    assert "on the same tokens, by cosine similarity" in neuron


def test_an_export_that_fails_leaves_nothing(library, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("disk")

    monkeypatch.setattr(Pages, "neuron", broken)
    with pytest.raises(RuntimeError):
        export(library, tmp_path / "out", 1, False)
    assert list(tmp_path.iterdir()) == []


def test_the_best_explained_get_pages(library, tmp_path):
    export(library, tmp_path / "out", 4, False)
    best = library.layer("run", "gpt2-2l", 1, LayerQuery(per_page=4))
    made = {int(p.stem) for p in (tmp_path / "out/r/run/neuron/gpt2-2l/1").iterdir()}
    assert made == {r.index for r in best.rows}


def test_the_command_serves_until_it_is_interrupted(run):
    import signal
    import subprocess
    import sys
    import urllib.request

    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "cratelm", "view", str(run), "--port", "0", "--no-live"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)  # fmt: skip
    assert process.stdout is not None
    address = process.stdout.readline().split()[0]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    for _ in range(100):
        try:
            page = urllib.request.urlopen(address, timeout=5).read().decode()
            break
        except OSError:
            time.sleep(0.1)
    assert "crate-2l" in page
    taken = subprocess.run([sys.executable, "-m", "cratelm", "view", str(run), "--port", address.split(":")[-1].strip("/")], capture_output=True, text=True, env=environment)  # fmt: skip
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0, rest
    assert "Traceback" not in rest
    assert taken.returncode == 2
    assert "is in use: type --port" in taken.stderr
    assert taken.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing/here"], "nothing/here does not exist: name a run directory"),
        (["--port", "99999"], "--port is 99999"),
        (["--neurons", "-1"], "--neurons must be at least 0, not -1"),
    ],
)
def test_bad_commands_are_told(run, words, told, capsys):
    given = words if words[0] == "nothing/here" else [str(run), *words]
    assert main(["view", *given]) == 2
    assert told in capsys.readouterr().err


def test_an_address_that_is_not_of_this_machine(run):
    with pytest.raises(InputError, match=r"cannot listen on 203\.0\.113\.1:0"):
        view(ViewConfig(runs=(run,), host="203.0.113.1", port=0))
