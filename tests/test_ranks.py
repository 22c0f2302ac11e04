"""Effects, analyses and replacements under `torchrun`: the files of several processes are those of one; shares of work."""

from pathlib import Path

import pytest
from tiny_run import MODEL, copied

from cratelm.runs import RECORD, Run, StageName
from cratelm.runs.ranks import Ranks, Share, joined, n_ranks, n_ranks_here, rank

VERBS: dict[str, tuple[StageName, str]] = {
    "effects": ("steer", f"effects --run run --model {MODEL} --neurons 70 --tokens 96 --batch-tokens 32 --positions 2"),
    "analyze": ("analysis", f"analyze --run run --model {MODEL} --tokens 300 --resamples 100 --batch-tokens 64 --memory-mib 1"),
    "replace": ("replacement", f"replace --run run --model {MODEL} --fit-tokens 1500 --tokens 800 --neuron-tokens 48 --curve-tokens 300 --resamples 100 --batch-tokens 48 --explainers lookup trie:5 trie@excerpts trie:5+lookup"),
}  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != RECORD}


@pytest.mark.parametrize("verb", VERBS)
def test_several_ranks_write_the_files_of_one(rank_server, tmp_path, verb, monkeypatch):
    stage, command = VERBS[verb]
    written = []
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        copied(folder)
        outcome = rank_server.run(f"{command} --device cpu --force", folder, ranks)
        assert outcome.statuses == [0] * ranks, outcome.outputs
        assert outcome.outputs[1:] == [""] * (ranks - 1)
        done = Run(folder / "run").stage(stage, MODEL).completion()
        assert done is not None
        written.append((files_of(folder / "run" / stage / MODEL), done.identity, done.results))
    assert len(written[0][0]) >= 3
    assert written[0] == written[1] == written[2]


def test_shares_take_every_unit_once():
    for of in (1, 2, 3, 7):
        shares = [Share(number, of) for number in range(of)]
        for units in (0, 1, 5, 240):
            assert [sum(s.takes(unit) for s in shares) for unit in range(units)] == [1] * units
            assert [u for s in shares for u in s.between(units)] == list(range(units))


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "4", "RANK": "2"},  # as other launchers set them, without an address
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        {"WORLD_SIZE": "many", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
    ],
)
def test_a_command_without_torchrun_is_one_process(monkeypatch, variables):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (rank(), n_ranks(), n_ranks_here()) == (0, 1, 1)
    with joined() as ranks:
        assert ranks.is_first
        assert ranks.by_first(lambda: 3) == 3
        assert list(ranks.collected(4)) == [4]
        assert isinstance(ranks, Ranks)
