"""`cratelm import sparse-gpt`: write a released checkpoint of a weight-sparse GPT as a Hugging Face folder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cratelm.errors import InputError
from cratelm.interop.config import ImportSparseGptConfig
from cratelm.interop.model_card import code_block, write_card
from cratelm.interop.model_folder import architecture, save_model, usage
from cratelm.interop.out_folder import check_out, out_folder
from cratelm.interop.sparse_gpt_checkpoint import (
    CONFIG,
    WEIGHTS,
    read_sparse_gpt,
    unread_fields,
)
from cratelm.models.sizes import count_parameters
from cratelm.runs import hash_file
from cratelm.tokens.tokenizer import hf_tokenizer, load_tokenizer, vocabulary_size

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAPER = "Gao et al. 2025, arXiv 2511.13653"


@dataclass(frozen=True)
class ImportSparseGptResult:
    """Result of `cratelm import sparse-gpt`."""

    path: Path
    """folder that `cratelm.load` and transformers read"""
    architecture: str
    parameters: int
    """number of entries of the weights, zeros included, without the position embedding"""
    nonzero: int
    """number of those that are not 0"""
    tokenizer: str
    """number of tokens of the tokenizer and of the model's vocabulary, in words"""
    not_read: str
    """fields of the configuration that cratelm does not know; empty if it knows all of them"""
    sha256: str
    """hash of the file of weights"""


def import_sparse_gpt(config: ImportSparseGptConfig) -> ImportSparseGptResult:
    """Read the folder and write another one. After an error, nothing is left behind.

    Raises `InputError` if the folder has no such checkpoint, if a file is damaged or could run code, if the tokenizer
    does not fit it, or if the folder cannot be written.
    """
    source = Path(os.path.expanduser(config.folder))
    if not os.path.isdir(source):  # os.path, because Path raises if a name is too long
        raise InputError(f"{config.folder} is not a folder: name one with {CONFIG} and {WEIGHTS}")
    check_out(config.out, (source,), force=config.force)
    model, content = read_sparse_gpt(source)
    tokenizer = _tokenizer(config.tokenizer, source, model.config.vocab_size)
    positions = model.transformer.wpe.weight
    result = ImportSparseGptResult(
        path=config.out,
        architecture=architecture(model.config),
        parameters=count_parameters(model),
        nonzero=sum(int(p.count_nonzero()) for p in model.parameters() if p is not positions),
        tokenizer=_tokens(tokenizer, model.config.vocab_size),
        not_read=", ".join(unread_fields(content)),
        sha256=hash_file(source / WEIGHTS),
    )
    provenance = {
        "written_by": "cratelm import sparse-gpt",
        "source": WEIGHTS,
        "sha256": result.sha256,
        "config": content,
    }
    with out_folder(config.out, provenance) as folder:
        if tokenizer is not None:
            hf = hf_tokenizer(tokenizer)
            hf.model_max_length = model.config.max_position_embeddings
            hf.save_pretrained(folder)
        save_model(model, folder)
        _write_card(folder, model, content, result)
    return result


def _tokenizer(name: str, source: Path, vocabulary: int) -> "Tokenizer | None":
    """Return the tokenizer named, or that of the folder. The model may have more tokens than it, but not fewer."""
    path = Path(os.path.expanduser(name)) if name else source / "tokenizer.json"
    if not name and not path.is_file():
        return None
    tokenizer = load_tokenizer(path)
    has = vocabulary_size(tokenizer)
    if has > vocabulary:
        raise InputError(
            f"the model has a vocabulary of {vocabulary:,} tokens, but the tokenizer {path} has {has:,}: name its"
            " own tokenizer.json with --tokenizer, or omit the tokenizer"
        )
    return tokenizer


def _tokens(tokenizer: "Tokenizer | None", vocabulary: int) -> str:
    has = "none" if tokenizer is None else f"{vocabulary_size(tokenizer):,} tokens"
    return f"{has}, {vocabulary:,} in the model"


def _write_card(
    folder: Path, model: Any, content: dict[str, Any], result: ImportSparseGptResult
) -> None:
    facts = {
        "architecture": result.architecture,
        "parameters (position embedding not counted)": result.parameters,
        "of which not 0": result.nonzero,
        "tokenizer": result.tokenizer,
        f"fields of {CONFIG} that were not read": result.not_read or None,
        "sha256 of the file": result.sha256,
    }
    sections = {
        "How to load it": usage(model.config, tokenizer=(folder / "tokenizer.json").is_file()),
        f"{CONFIG} of the checkpoint": code_block(content),
        "Licence": "The weights belong to their authors, whose terms apply. The code of cratelm, including"
        " `modeling_sparse_gpt.py` in this folder, is under the MIT licence.",
    }
    write_card(
        folder,
        "Weight-sparse GPT",
        f"A weight-sparse GPT in the format of its authors ({PAPER}), imported by cratelm.",
        facts,
        sections,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sparse_gpt", "interpretability"],
    )
