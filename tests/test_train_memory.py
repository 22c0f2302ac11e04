"""Gradient checkpointing: the same gradients, and activations that are not kept."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import SMALL, make_run

from cratelm.models import build
from cratelm.train.config import TrainConfig
from cratelm.train.loop import checkpoint_blocks, train
from cratelm.train.losses import NextTokenLoss


def gradients_and_kept(name: str, *, checkpointing: bool) -> tuple[list[torch.Tensor], int]:
    """Return the gradients, and the bytes that the forward pass keeps for the backward pass."""
    model = build(name, vocab_size=64, max_position_embeddings=32, hidden_size=32, dropout=0.1)
    if checkpointing:
        checkpoint_blocks(model)
    rows = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(0))
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = NextTokenLoss(model.train())(rows[:, :-1], rows[:, 1:])
    bytes_kept = sum(kept.values())
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None], bytes_kept


@pytest.mark.parametrize("name", ["crate-3l", "gpt2-3l"])
def test_gradients_are_equal_and_blocks_keep_only_their_input(name: str) -> None:
    """Also with dropout, whose masks are drawn again as they were."""
    plain, everything = gradients_and_kept(name, checkpointing=False)
    recomputed, little = gradients_and_kept(name, checkpointing=True)
    assert len(plain) == len(recomputed)
    for expected, gradient in zip(plain, recomputed, strict=True):
        assert torch.equal(gradient, expected)
    assert little < 0.4 * everything


def test_the_option_changes_no_weight(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    options = {**SMALL, "steps": 3, "validate_every": 3}
    plain = train(TrainConfig(run=run, **options, name="plain"))
    other = train(TrainConfig(run=run, **options, name="less", gradient_checkpointing=True))
    weights = load_file(other.path / "model.safetensors")
    assert plain.loss == other.loss
    for name, weight in load_file(plain.path / "model.safetensors").items():
        assert torch.equal(weights[name], weight), name
