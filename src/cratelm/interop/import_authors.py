"""`cratelm import authors`: write a checkpoint of the paper's authors as a Hugging Face folder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cratelm.errors import InputError
from cratelm.interop.authors_checkpoint import AuthorsCheckpoint, read_authors_checkpoint
from cratelm.interop.config import ImportAuthorsConfig
from cratelm.interop.model_card import PAPER, code_block, items, write_card
from cratelm.interop.model_folder import architecture, save_model, usage
from cratelm.interop.out_folder import check_out, out_folder
from cratelm.interop.source_file import SourceFile, locate
from cratelm.models.crate import CrateForCausalLM
from cratelm.models.sizes import count_parameters
from cratelm.runs import hash_file
from cratelm.tokens.tokenizer import (
    fetch_gpt2,
    hf_tokenizer,
    load_tokenizer,
    save_hf_tokenizer,
    vocabulary_size,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GPT2_VOCABULARY = 50257


@dataclass(frozen=True)
class ImportAuthorsResult:
    """Result of `cratelm import authors`."""

    path: Path
    """folder that `cratelm.load` and transformers read"""
    architecture: str
    parameters: int
    """number of trainable parameters, without the position embedding; tied ones count once"""
    steps: int | str
    """number of optimizer steps; empty if the file does not state it"""
    best_validation_loss: float | str
    """as in the file, nats per token; empty if the file does not state it"""
    tokenizer: str
    """number of tokens of the tokenizer and of the model's vocabulary, in words"""
    sha256: str
    """hash of the checkpoint"""


def import_authors(config: ImportAuthorsConfig) -> ImportAuthorsResult:
    """Read the checkpoint and write the folder. After an error, nothing is left behind.

    Raises `InputError` if the file does not exist, is damaged, could run code or is not such a checkpoint, if the
    tokenizer does not fit it, or if the folder cannot be written.
    """
    source = locate(config.checkpoint)
    check_out(config.out, (source.path,), force=config.force)
    checkpoint = read_authors_checkpoint(source.path)
    tokenizer = _tokenizer(config.tokenizer, checkpoint.model.config.vocab_size, source.path)
    hf = _set_end(checkpoint.model, tokenizer)
    result = _result(config.out, checkpoint, tokenizer, hash_file(source.path))
    provenance = _provenance(source, checkpoint, result)
    with out_folder(config.out, provenance) as folder:
        save_model(checkpoint.model, folder)
        if hf is not None:
            save_hf_tokenizer(hf, folder)
        _write_card(folder, source, checkpoint, result)
    return result


def _tokenizer(name: str, vocabulary: int, checkpoint: Path) -> "Tokenizer | None":
    """Return the tokenizer to write. The model may have more tokens than the tokenizer (padding), but not fewer."""
    if name == "none":
        return None
    advice = "name its tokenizer.json with --tokenizer PATH, or omit it with --tokenizer none"
    if name == "gpt2" and vocabulary >= GPT2_VOCABULARY:
        try:
            return fetch_gpt2()
        except InputError:
            raise InputError(
                f"GPT-2's tokenizer can be fetched neither through tiktoken nor from the Hub: {advice}"
            ) from None
    tokenizer = None if name == "gpt2" else load_tokenizer(os.path.expanduser(name))
    has = GPT2_VOCABULARY if tokenizer is None else vocabulary_size(tokenizer)
    if tokenizer is None or has > vocabulary:
        raise InputError(
            f"{checkpoint} has a vocabulary of {vocabulary:,} tokens, but the tokenizer {name} has"
            f" {has:,}: {advice}"
        )
    return tokenizer


def _set_end(model: Any, tokenizer: "Tokenizer | None") -> Any:
    """Set the model's end-of-text token, and return the tokenizer for transformers; None without a tokenizer."""
    if tokenizer is None:
        return None
    hf = hf_tokenizer(tokenizer)
    hf.model_max_length = model.config.max_position_embeddings
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = hf.eos_token_id
    return hf


def _result(
    out: Path, read: AuthorsCheckpoint, tokenizer: "Tokenizer | None", sha256: str
) -> ImportAuthorsResult:
    vocabulary = f"{read.model.config.vocab_size:,} in the model"
    has = "none" if tokenizer is None else f"{vocabulary_size(tokenizer):,} tokens"
    loss = read.best_validation_loss
    return ImportAuthorsResult(
        path=out,
        architecture=architecture(read.model.config),
        parameters=count_parameters(read.model),
        steps="" if read.steps is None else read.steps,
        best_validation_loss="" if loss is None else loss,
        tokenizer=f"{has}, {vocabulary}",
        sha256=sha256,
    )


def _provenance(
    source: SourceFile, read: AuthorsCheckpoint, result: ImportAuthorsResult
) -> dict[str, Any]:
    return {
        "written_by": "cratelm import authors",
        "source": source.name,
        "revision": source.revision,
        "sha256": result.sha256,
        "model_args": read.arguments,
        "iter_num": read.steps,
        "best_val_loss": read.best_validation_loss,
        "config": read.training,
        "changes": list(read.changes),
    }


def _write_card(
    folder: Path, source: SourceFile, read: AuthorsCheckpoint, result: ImportAuthorsResult
) -> None:
    is_crate = isinstance(read.model, CrateForCausalLM)
    family = "CRATE" if is_crate else "GPT-2"
    facts = {
        "architecture": result.architecture,
        "parameters (position embedding not counted)": result.parameters,
        "tokenizer": result.tokenizer,
        "file": source.name,
        "revision": source.revision or None,
        "sha256 of the file": result.sha256,
        "optimizer steps (`iter_num`)": read.steps,
        "best validation loss, nats per token (`best_val_loss`)": read.best_validation_loss,
    }
    sections = {
        "How to load it": usage(read.model.config, tokenizer=(folder / "tokenizer.json").is_file()),
        "Changes": items(read.changes),
        "model_args of the file": code_block(read.arguments),
        "Licence": "The weights belong to their authors, whose terms apply. The file states no licence. The code"
        " of cratelm, including `modeling_crate.py` if it is in this folder, is under the MIT licence.",
    }
    summary = (
        f"A {family} language model trained by the authors of {PAPER}, or in the format of their"
        " code, imported by cratelm. The values below are those stated in the file."
    )
    write_card(
        folder,
        f"{family} imported from {source.path.name}",
        summary,
        facts,
        sections,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["crate" if is_crate else "gpt2", "interpretability"],
    )
