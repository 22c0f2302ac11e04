"""`cratelm import authors`: a checkpoint of the paper's authors as a Hugging Face folder."""

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
from cratelm.tokens.tokenizer import fetch_gpt2, hf_tokenizer, load_tokenizer, vocabulary_size

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GPT2_VOCABULARY = 50257


@dataclass(frozen=True)
class ImportAuthorsResult:
    """What was imported."""

    path: Path
    """folder that `cratelm.load` and transformers read"""
    architecture: str
    parameters: int
    """trainable, tied ones once, position embedding left out"""
    steps: int | str
    """optimizer steps taken; empty where the file does not give them"""
    best_validation_loss: float | str
    """as in the file, nats per token; empty where it has none"""
    tokenizer: str
    """tokens of the tokenizer and of the model's vocabulary"""
    sha256: str
    """of the checkpoint"""


def import_authors(config: ImportAuthorsConfig) -> ImportAuthorsResult:
    """Read the checkpoint and write the folder; on an error nothing is left behind.

    Raises `InputError` for a file that is absent, damaged, hostile or no such checkpoint, for a
    tokenizer that does not fit it, and for a folder that cannot be written.
    """
    source = locate(config.checkpoint)
    check_out(config.out, (source.path,), force=config.force)
    read = read_authors_checkpoint(source.path)
    tokenizer = _tokenizer(config.tokenizer, read.model.config.vocab_size, source.path)
    end = _set_end(read.model, tokenizer)
    result = _result(config.out, read, tokenizer, hash_file(source.path))
    provenance = _provenance(source, read, result)
    with out_folder(config.out, provenance) as folder:
        save_model(read.model, folder)
        if end is not None:
            end.save_pretrained(folder)
        _write_card(folder, source, read, result)
    return result


def _tokenizer(name: str, vocabulary: int, checkpoint: Path) -> "Tokenizer | None":
    """The tokenizer to write. A model may have more tokens than it (padding), not fewer."""
    if name == "none":
        return None
    asked = "name its tokenizer.json with --tokenizer PATH, or leave it out with --tokenizer none"
    if name == "gpt2" and vocabulary >= GPT2_VOCABULARY:
        try:
            return fetch_gpt2()
        except InputError:
            raise InputError(
                f"GPT-2's tokenizer can be fetched neither through tiktoken nor from the Hub: {asked}"
            ) from None
    tokenizer = None if name == "gpt2" else load_tokenizer(Path(name).expanduser())
    has = GPT2_VOCABULARY if tokenizer is None else vocabulary_size(tokenizer)
    if tokenizer is None or has > vocabulary:
        raise InputError(
            f"{checkpoint} has a vocabulary of {vocabulary:,} tokens, the tokenizer {name} has"
            f" {has:,}: {asked}"
        )
    return tokenizer


def _set_end(model: Any, tokenizer: "Tokenizer | None") -> Any:
    """The tokenizer for transformers; `generate` learns from it where a text ends."""
    if tokenizer is None:
        return None
    made = hf_tokenizer(tokenizer)
    made.model_max_length = model.config.max_position_embeddings
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = made.eos_token_id
    return made


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
        "best validation loss, nats a token (`best_val_loss`)": read.best_validation_loss,
    }
    sections = {
        "How to load it": usage(read.model.config, tokenizer=(folder / "tokenizer.json").is_file()),
        "What was changed": items(read.changes),
        "The file's model_args": code_block(read.arguments),
        "Licence": "The weights are their authors': their terms hold for them, and the file names"
        " none. The code of cratelm, `modeling_crate.py` where it is here, is under the MIT licence.",
    }
    summary = (
        f"A {family} language model trained by the authors of {PAPER}, or in the format of their"
        " code, imported by cratelm. The figures below are what the file says of itself."
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
