"""Parts of CRATE and of its GPT-2 twin by name, and how to keep them at their initial weights.

part          CRATE                                    GPT-2
dictionary    the dictionary of ISTA, as encoder and   -
              decoder; a decoupled second one is not
              part of it
mlp           -                                        the first matrix of the MLP, whose products with
                                                       the stream are the neurons
attention     projection and output map                the two matrices of the attention
embeddings    tokens, positions, and the head          the same
"""

from collections.abc import Sequence

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from cratelm.errors import InputError
from cratelm.models.crate import CrateModel


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the blocks of a CRATE model or of its GPT-2 twin, in order."""
    base = model.base_model
    blocks = base.layers if isinstance(base, CrateModel) else base.h
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def embeddings_of(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return by name the embeddings of tokens and positions, and the head; tied weights once."""
    names = {name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    names |= {name for name, m in model.named_modules() if m is head}
    return {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] in names}


def parts_of(model: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """Return the weights of each part of a CRATE model or of its GPT-2 twin, by name of the part."""
    blocks: list[nn.Module] = list(blocks_of(model))
    if isinstance(model.base_model, CrateModel):
        first, neurons, attention = "dictionary", "ista.dictionary", "mssa"
    else:
        first, neurons, attention = "mlp", "mlp.c_fc.weight", "attn"
    matrices = [p for b in blocks for p in b.get_submodule(attention).parameters() if p.ndim == 2]
    return {
        first: [block.get_parameter(neurons) for block in blocks],
        "attention": matrices,
        "embeddings": list(embeddings_of(model).values()),
    }


def freeze(model: PreTrainedModel, parts: Sequence[str]) -> None:
    """Exclude the named parts of a model from training, in place.

    Raises `InputError` for a part that the model lacks.
    """
    own = parts_of(model)
    for part in parts:
        if part not in own:
            raise InputError(
                f"--freeze is {part}, which {model.config.model_type} lacks: choose from {', '.join(own)}"
            )
        for parameter in own[part]:
            parameter.requires_grad_(False)
