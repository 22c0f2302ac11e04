"""The head's loss in chunks: equal to the plain one, never in chunks that are too small, in bounded memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from cratelm.train import head_loss as module
from cratelm.train.head_loss import chunked_loss, head_loss, row_losses, rows_per_chunk

VOCABULARIES = [512, 1000, 4096, 4097, 8192, 16384, 32768, 50304, 100_000, 150_000]


def plain_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def inputs(rows: int, width: int, vocabulary: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) * 0.3).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=generator)


def gradients(loss: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(2 * loss, of))


# The rule


@pytest.mark.parametrize("width", [128, 768])
@pytest.mark.parametrize("rows", [2048, 4096, 16384])
def test_no_vocabulary_makes_chunks_of_few_rows(rows: int, width: int) -> None:
    """Work beyond the plain form's: 16 V D bytes per chunk. Torch's own choice is 4 rows at V = 50,304, D = 128."""
    for vocabulary in VOCABULARIES:
        size = rows_per_chunk(rows, width, vocabulary)
        fewest = 64 if 8 * vocabulary * width <= 4 * 2**20 else 256
        assert fewest <= size <= rows
        assert -(-rows // size) <= rows // fewest
        assert rows_per_chunk(rows, width, vocabulary, "cuda") >= 2048


@pytest.mark.parametrize("rows", [2048, 4096, 16384])
def test_the_logits_of_a_chunk_are_bounded(rows: int) -> None:
    for vocabulary in VOCABULARIES:
        logits = 4 * vocabulary * rows_per_chunk(rows, 768, vocabulary)
        assert logits <= 4 * max((rows + 1) * 768 + vocabulary, 256 * vocabulary)
    assert 4 * 50304 * rows_per_chunk(4096, 128, 50304) == pytest.approx(49 * 2**20, rel=0.01)
    assert 4 * 150_000 * rows_per_chunk(4096, 128, 150_000) == pytest.approx(147 * 2**20, rel=0.01)


def test_small_batches_and_sizes_of_the_demo() -> None:
    assert rows_per_chunk(4096, 128, 4096) == 64  # the demo's figures are those of this number
    assert rows_per_chunk(10, 128, 50304) == 10
    assert rows_per_chunk(1, 64, 300) == 1


# The loss


def without_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LinearCrossEntropyOptions", None)
    monkeypatch.delattr(F, "linear_cross_entropy")


@pytest.mark.parametrize("old_torch", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"), [(100, 16, 700), (300, 64, 9000), (65, 128, 60), (1, 8, 9)]
)
def test_loss_and_gradients_are_those_of_the_plain_form(
    rows: int, width: int, vocabulary: int, old_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old_torch:
        without_torchs_own(monkeypatch)
    hidden, weight, targets = inputs(rows, width, vocabulary)
    expected = gradients(plain_loss(hidden, weight, targets), hidden, weight)
    for actual, wanted in zip(
        gradients(head_loss(hidden, weight, targets), hidden, weight), expected, strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-7)
    each = head_loss(hidden, weight, targets, mean=False)
    assert each.shape == targets.shape
    wanted = F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")
    torch.testing.assert_close(each, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(each.mean(), weight)[0], expected[2] / 2, rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_any_number_of_rows_gives_the_same(size: int) -> None:
    hidden, weight, targets = inputs(100, 16, 500)
    expected = gradients(plain_loss(hidden, weight, targets), hidden, weight)
    actual = gradients(chunked_loss(hidden, weight, targets, size), hidden, weight)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-7)


def test_bf16_rounds_as_the_plain_form_does_and_keeps_the_loss_in_32_bits() -> None:
    hidden, weight, targets = inputs(100, 32, 1000)
    exact = gradients(plain_loss(hidden, weight, targets), hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        plain, ours = plain_loss(hidden, weight, targets), chunked_loss(hidden, weight, targets, 30)
        one_chunk = head_loss(hidden, weight, targets)
    assert ours.dtype == one_chunk.dtype == torch.float32
    assert torch.equal(one_chunk, plain)
    errors = []
    for loss in (plain, ours):
        found = gradients(loss, hidden, weight)
        errors.append([(f - e).norm() / e.norm() for f, e in zip(found, exact, strict=True)])
    for plain_error, our_error in zip(*errors, strict=True):
        assert float(our_error) <= 1.2 * float(plain_error) + 1e-5


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, targets = inputs(30, 8, 50)
    chunked_loss(hidden, weight.detach(), targets, 7).backward()
    with torch.no_grad():
        chunked_loss(hidden, weight, targets, 7)
    assert hidden.grad is not None
    assert weight.grad is None


# Memory


def peak_mib(work: Any) -> float:
    """What `work` adds to the process's largest resident set."""
    status = Path("/proc/self/status")

    def kib(name: str) -> int:
        return int(status.read_text().split(f"{name}:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    work()
    return (kib("VmHWM") - before) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
@pytest.mark.parametrize("form", ["torch", "loop", "bf16"])
def test_peak_memory_is_that_of_a_chunk(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,024 rows and V = 20,000: all logits take 78 MiB, those of a chunk 20."""
    if form == "loop":
        without_torchs_own(monkeypatch)
    hidden, weight, targets = inputs(1024, 32, 20_000)

    def step(loss: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "bf16"):
            value = loss(hidden, weight, targets)
        torch.autograd.grad(value, (hidden, weight))

    chunk = 4 * 20_000 * rows_per_chunk(*hidden.shape, len(weight)) / 2**20
    assert chunk < 20
    assert peak_mib(lambda: step(plain_loss)) > 150  # the peak is seen
    assert peak_mib(lambda: step(head_loss)) < 5 * chunk  # exponentials, bf16 copies, gradients


@pytest.mark.parametrize("scale", [0.1, 1, 40])
def test_losses_of_rows_are_those_of_all_logits(scale: float) -> None:
    """Logits are up to 20, 200 and 8,000: the last two would overflow an exponential."""
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(300, 64, generator=generator)
    weight, targets = torch.randn(500, 64, generator=generator), torch.arange(300)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    near = 1e-5 * max(1, scale**2)  # rounding of the logits
    found = row_losses(hidden, weight, targets)
    assert torch.allclose(found, expected, rtol=1e-5, atol=near)
    row_of = torch.arange(300) // 2
    found = row_losses(hidden, weight, targets, row_of)
    of_rows = torch.nn.functional.cross_entropy(
        (hidden @ weight.T)[row_of], targets, reduction="none"
    )
    assert torch.allclose(found, of_rows, rtol=1e-5, atol=near)


def test_a_row_that_is_not_a_number_has_no_loss_and_others_do() -> None:
    hidden = torch.ones(3, 4)
    hidden[1] = torch.nan
    losses = row_losses(hidden, torch.ones(5, 4), torch.zeros(3, dtype=torch.long))
    assert losses.isnan().tolist() == [False, True, False]
