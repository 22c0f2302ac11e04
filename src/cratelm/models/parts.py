"""Parts of a model by name, and how to keep them at their initial weights.

part          weights
dictionary    in CRATE the dictionary of ISTA, as encoder and decoder; a decoupled second one is not part of it
mlp           in other families the first matrix of the MLP, whose products with the stream are the neurons
attention     the matrices of the attention: projections and output map
embeddings    tokens, positions, and the head; in the weight-sparse GPT the bigram table, too

A CRATE without a second step has neither of the first two: its codes are written by the attention.
"""

from collections.abc import Sequence

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from cratelm.errors import InputError

_IN_BLOCK = (
    ("dictionary", "ista.dictionary"),
    ("mlp", "mlp.fc1.weight"),
    ("mlp", "mlp.c_fc.weight"),
    ("attention", "mssa"),
    ("attention", "attn"),
)
"""part, and the weight or module of each block that may have it"""


def is_matrix(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a matrix; [n, 1] and [n, m, 1] count as vectors."""
    return parameter.ndim == 2 and parameter.shape[-1] > 1


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the blocks, in order, of a model that has them in a list called `layers` or `h`.

    Raises `InputError` for another model.
    """
    for name in ("layers", "h"):
        blocks = getattr(model.base_model, name, None)
        if isinstance(blocks, nn.ModuleList):
            return blocks
    raise InputError(
        f"{type(model).__name__} has no list of blocks called layers or h: only models with one have parts"
    )


def embeddings_of(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return by name the embeddings of tokens and positions, and the head; tied weights once."""
    names = {name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    names |= {name for name, m in model.named_modules() if m is head}
    return {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] in names}


def parts_of(model: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """Return the weights of each part that a model has, by name of the part.

    Raises `InputError` for a model without a list of blocks.
    """
    parts: dict[str, list[nn.Parameter]] = {}
    for block in blocks_of(model):
        for part, path in _IN_BLOCK:
            weights = [
                parameter
                for name, parameter in block.named_parameters()
                if name == path or (name.startswith(f"{path}.") and is_matrix(parameter))
            ]
            if weights:
                parts.setdefault(part, []).extend(weights)
    return {**parts, "embeddings": list(embeddings_of(model).values())}


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
