"""Fixtures that several test files share."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_server import HARVEST, RankServer
from tiny_run import copied


@pytest.fixture(scope="session", autouse=True)
def quick_fonts():
    """Figures hold their fonts as matplotlib's own outlines: subsets of TrueType take a quarter of a report's time.

    Demos in processes of their own keep them.
    """
    from cratelm.report import drawing

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(drawing._STYLE, "pdf.fonttype", 3)
        yield


@pytest.fixture(scope="session")
def quick_maps():
    """Maps of neurons take as few iterations as t-SNE allows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cratelm.viewer.index._MAP_STEPS", 250)
        yield


@pytest.fixture
def undrawn(monkeypatch):
    """Reports and pages without their figures."""
    from undrawn import leave_out_drawing

    leave_out_drawing(monkeypatch)


@pytest.fixture(scope="session")
def viewer_run(tmp_path_factory) -> Path:
    """A small run for the browser, called `run`; tests that change it take a copy.

    It takes 20 s: the first worker makes it, the others copy it.
    """
    from filelock import FileLock
    from viewer_runs import small_run

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with FileLock(folder / "made.lock"):
        if not (folder / "made").exists():
            (folder / "making").mkdir()
            small_run(folder / "making")
            (folder / "making").rename(folder / "made")
    return Path(shutil.copytree(folder / "made" / "run", tmp_path_factory.mktemp("view") / "run"))


@pytest.fixture(scope="session")
def library(viewer_run, quick_maps):
    """The run as the browser reads it, with its index."""
    pytest.importorskip("sklearn", reason="the extra `viewer` is not installed")
    from cratelm.viewer.run_reader import Library

    library = Library([viewer_run])
    library.index_of("run").build()
    assert library.index_state("run").ready, library.index_state("run").problem
    return library


@pytest.fixture(scope="session")
def live(library):
    """Its models, for the live page."""
    pytest.importorskip("fastapi", reason="the extra `viewer` is not installed")
    from cratelm.viewer.live import Live

    live = Live(library)
    yield live
    live.close()


@pytest.fixture(scope="session")
def client(library, live):
    """A client of the server, which does not limit its rate."""
    from fastapi.testclient import TestClient

    from cratelm.viewer import server
    from cratelm.viewer.live_endpoints import router
    from cratelm.viewer.security import Rate

    app = server.application(library, live=router(live), rate=Rate(1e9, 1e9))
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="session")
def rank_server() -> Iterator[RankServer]:
    """A process that starts the ranks of a command: with torch imported once for all tests."""
    server = RankServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def harvested_alone(rank_server: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with the harvest `HARVEST` of one process."""
    folder = tmp_path_factory.mktemp("alone")
    copied(folder)
    outcome = rank_server.run(f"{HARVEST} --quiet", folder)
    assert outcome.statuses == [0], outcome.outputs
    return folder / "run"
