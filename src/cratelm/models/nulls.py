"""Null controls made from a trained model: what do its scores owe to what the blocks have learned?

    permuted      each weight matrix and each vector of the blocks is permuted inside itself (GPT-2's query,
                  key and value are one matrix): the values of a tensor stay, their order is drawn.
                  Embeddings, head and the LayerNorm before the head stay as trained
    embeddings    all weights are drawn anew, except the embeddings of tokens and positions and the head,
                  which stay as trained. With the seed of the training, the others are the initial weights
                  from which it started

The third kind of null control, the untrained model, needs no trained one: `cratelm train --steps 0`.
"""

import torch
from transformers.modeling_utils import PreTrainedModel

from cratelm.models.parts import blocks_of, embeddings_of
from cratelm.models.sizes import build_of
from cratelm.runs.names import DerivedNull


def null_control(trained: PreTrainedModel, kind: DerivedNull, seed: int) -> PreTrainedModel:
    """Return a null control of a trained CRATE model or GPT-2 twin; `trained` may be changed in place.

    The same seed gives the same weights.
    """
    if kind == "embeddings":
        return with_other_weights(trained, seed)
    permute_blocks(trained, seed)
    return trained


@torch.no_grad()
def permute_blocks(model: PreTrainedModel, seed: int) -> None:
    """Permute the entries of each tensor of the blocks inside that tensor, in place.

    The permutations are uniform and independent of one another.
    """
    generator = torch.Generator().manual_seed(seed)
    for tensor in blocks_of(model).parameters():
        order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
        tensor.copy_(tensor.flatten()[order].view_as(tensor))


@torch.no_grad()
def with_other_weights(trained: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Return a model with fresh weights, and the embeddings and the head of `trained`."""
    fresh = build_of(trained.config, seed)
    learned = embeddings_of(trained)
    for name, weight in embeddings_of(fresh).items():
        weight.copy_(learned[name])
    return fresh
