"""Harvest under `torchrun`: the files of several processes are those of one, and a failed rank leaves nothing behind."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_server import HARVEST
from test_activations import EOT, MemorySplit, cases
from tiny_run import MODEL, copied

from cratelm.activations.batches import BLOCKS, SearchPlan, random_positions
from cratelm.activations.calibration import Calibration
from cratelm.activations.layer_harvest import ExcerptSizes, LayerHarvest
from cratelm.activations.tables import excerpt_rows, excerpt_table, summary_table
from cratelm.runs import RECORD, Completion, Run
from cratelm.runs.ranks import Share


def made(run: Path) -> Completion:
    done = Run(run).stage("activations", "made").completion()
    assert done is not None
    return done


def check_equal(run: Path, harvested_alone: Path) -> None:
    """Every file is the same, bit for bit, and so is what the record says about them."""
    here, there = (path / "activations" / "made" for path in (run, harvested_alone))
    names = sorted(path.name for path in there.iterdir() if path.name != RECORD)
    assert len(names) == 5
    assert sorted(path.name for path in here.iterdir() if path.name != RECORD) == names
    for name in names:
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
    assert made(run).identity == made(harvested_alone).identity
    assert made(run).results == made(harvested_alone).results


def left_over(run: Path) -> list[str]:
    """What a harvest left besides its folder."""
    return sorted(p.name for p in (run / "activations").iterdir() if not p.name.startswith(MODEL))


# ---- merging --------------------------------------------------------------------------------------


def harvested(case, pilot: Calibration, share: Share) -> LayerHarvest:
    """The harvest of a share of the batches."""
    split, activations, length, sizes, batch_tokens, seed = case
    plan = SearchPlan.of(split, "fit", EOT, length, split.n_tokens + length, seed)
    places = random_positions(plan.text_spans(), 1, activations.shape[1], sizes.random, seed)
    kept = LayerHarvest(pilot, places, sizes, 1, is_first=share.is_first)
    blocks = plan.blocks(batch_tokens)
    for block in (blocks[i] for i in share.between(len(blocks))):
        for batch in plan.batches(batch_tokens, torch.device("cpu"), block):
            kept.add(activations[batch.position].view(*batch.input_ids.shape, -1), batch)
        kept.end_block()
    return kept


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), n_shares=st.integers(2, 5))
def test_merged_shares_are_the_whole(case, n_shares):
    split, activations = case[0], case[1]
    pilot = Calibration.of(activations[split.tokens != EOT][: max(1, split.n_tokens // 3)])
    whole = harvested(case, pilot, Share())
    first, *others = (harvested(case, pilot, Share(i, n_shares)) for i in range(n_shares))
    for other in others:
        first.merge(other.state())
    tables = [
        (
            excerpt_table(excerpt_rows(h, 0, h.n_neurons), split, "m", "s", 1),
            summary_table(h, "m", "s", 1).drop_columns(["skew", "kurtosis"]),
        )
        for h in (whole, first)
    ]
    assert tables[0][0].equals(tables[1][0])
    assert tables[0][1].equals(tables[1][1])
    assert torch.equal(
        whole.powers, first.powers
    )  # skew and kurtosis are made of these, and may be NaN


def test_sums_do_not_depend_on_the_shares(monkeypatch):
    """With batches of such different sizes of activations that the order of a sum shows."""
    monkeypatch.setattr("cratelm.activations.batches.BLOCKS", 13)
    split = MemorySplit([30] * 40)
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** (torch.rand(-(-split.n_tokens // 32), 1, generator=generator) * 12 - 8)
    sizes = sizes.repeat_interleave(32, 0)[: split.n_tokens]  # one for each batch
    activations = sizes * torch.randn(split.n_tokens, 3, generator=generator)
    case = (split, activations, 16, ExcerptSizes(2, 2, 1, 4, 2), 32, 0)
    pilot = Calibration.of(activations[:50])
    whole = harvested(case, pilot, Share())
    equal = []
    for n_shares in (2, 3, 4, 5):
        first, *others = (harvested(case, pilot, Share(i, n_shares)) for i in range(n_shares))
        totals = [harvest.state()["powers"].sum(0) for harvest in (first, *others)]
        equal.append(torch.equal(sum(totals, torch.zeros_like(totals[0])), whole.powers))
        for other in others:
            first.merge(other.state())
        assert torch.equal(first.powers, whole.powers)
    assert not all(equal)  # added share by share, the sums differ


@pytest.mark.parametrize("n_batches", [1, 5, 239, 240, 241, 1000])
def test_blocks_cover_all_batches_once(n_batches):
    split = MemorySplit(
        [n_batches * 4 - 2]
    )  # with its end mark, one token less than the batches hold
    plan = SearchPlan.of(split, "fit", EOT, 4, split.n_tokens, 0)  # type: ignore[arg-type]
    blocks = plan.blocks(4)
    assert len(blocks) == min(BLOCKS, n_batches)
    assert [number for block in blocks for number in block] == list(range(n_batches))
    for n_shares in (1, 3, 7, 300):
        shares = [Share(i, n_shares).between(len(blocks)) for i in range(n_shares)]
        assert [block for share in shares for block in share] == list(range(len(blocks)))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


# ---- ranks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_write_the_files_of_one(rank_server, harvested_alone, tmp_path, ranks):
    copied(tmp_path)
    outcome = rank_server.run(HARVEST, tmp_path, ranks)
    assert outcome.statuses == [0] * ranks, outcome.outputs
    check_equal(tmp_path / "run", harvested_alone)
    assert left_over(tmp_path / "run") == ["made"]
    first, *others = outcome.outputs
    assert re.search(r"neurons +32, 32\n", first)
    assert others == [""] * (ranks - 1)  # neither results nor progress bars
    again = rank_server.run(HARVEST, tmp_path, ranks)
    assert again.statuses == [0] * ranks
    assert again.outputs[0].count("is finished, skipped") == 1
    assert again.outputs[1:] == others


@pytest.mark.fault(
    "a rank of a harvest under `torchrun` is killed", "one line; nothing is left; the same files"
)
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_harvest(rank_server, harvested_alone, tmp_path, killed):
    copied(tmp_path)
    fails = f"{killed}:cratelm.activations.layer_harvest:LayerHarvest.add:50:kill"
    outcome = rank_server.run(f"{HARVEST} --quiet", tmp_path, 2, fails=fails)
    assert outcome.statuses[killed] == -9
    assert outcome.statuses[1 - killed] != 0
    if killed == 1:
        (line,) = outcome.outputs[0].splitlines()
        assert line.startswith("cratelm harvest: ")
        assert "has ended" in line
        assert "the same command does the work again" in line
        assert left_over(tmp_path / "run") == []
    assert rank_server.run(f"{HARVEST} --quiet", tmp_path, 2).statuses == [0, 0]
    check_equal(tmp_path / "run", harvested_alone)
    assert left_over(tmp_path / "run") == ["made"]


def test_an_error_of_one_rank_names_it_and_leaves_nothing(rank_server, tmp_path):
    copied(tmp_path)
    fails = "1:cratelm.activations.layer_harvest:LayerHarvest.add:50:error"
    outcome = rank_server.run(f"{HARVEST} --quiet", tmp_path, 2, fails=fails)
    assert 0 not in outcome.statuses
    (line,) = outcome.outputs[1].splitlines()
    assert line == "cratelm harvest: rank 1: a fault of this rank alone"
    (line,) = outcome.outputs[0].splitlines()
    assert "another process of this command has ended" in line
    assert left_over(tmp_path / "run") == []


def test_an_error_of_all_ranks_is_printed_once(rank_server, tmp_path):
    copied(tmp_path)
    outcome = rank_server.run("harvest --run run --model none-such --quiet", tmp_path, 2)
    assert 0 not in outcome.statuses
    assert outcome.outputs[0].count("\n") == 1
    assert "none-such" in outcome.outputs[0]
    assert outcome.outputs[1] == ""


def test_other_verbs_refuse_several_processes(rank_server, tmp_path):
    copied(tmp_path)
    outcome = rank_server.run(f"explain --run run --model {MODEL}", tmp_path, 2)
    assert outcome.outputs[0].startswith("cratelm explain: it runs in one process")
    assert outcome.outputs[1] == ""
    assert 0 not in outcome.statuses
