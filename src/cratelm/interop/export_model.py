"""`cratelm export model`: write a folder that transformers loads without cratelm, ready for the Hub."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cratelm.errors import InputError, one_line
from cratelm.interop.config import ExportModelConfig
from cratelm.interop.model_card import PAPER, code_block, write_card
from cratelm.interop.model_folder import architecture, code_name, save_model, usage
from cratelm.interop.out_folder import PROVENANCE, check_out, out_folder
from cratelm.models.crate import CrateConfig
from cratelm.models.sizes import count_parameters, load
from cratelm.models.sparse_gpt import SparseGptConfig
from cratelm.runs import Completion, Run, hash_file
from cratelm.runs.pretrained import json_object
from cratelm.tokens.tokenizer import name_class_of_version_4

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""tokenizer files that a model folder may contain; they are copied, with a name of the class that transformers 4 has"""


@dataclass(frozen=True)
class ExportModelResult:
    """Result of `cratelm export model`."""

    path: Path
    """the folder"""
    architecture: str
    parameters: int
    """number of trainable parameters, without the position embedding; tied ones count once"""
    dtype: str
    """data type of the weights"""
    files: tuple[str, ...]
    pushed: str
    """address on the Hub; empty without an upload"""


@dataclass(frozen=True)
class _Origin:
    """Origin of the exported model."""

    folder: Path
    name: str
    trained: Completion | None
    """completion record of its training; None for a folder outside a run"""
    tokens: Completion | None
    """completion record of the corpus on which it was trained"""
    before: dict[str, Any] = field(default_factory=dict)
    """provenance recorded in the folder, if an import or export wrote it"""


def export_model(config: ExportModelConfig) -> ExportModelResult:
    """Load the model, write the folder, and upload it if requested. After an error, no folder is left behind.

    Raises `InputError` if the model does not exist, if the folder cannot be written, or if the upload fails;
    after a failed upload the folder stays.
    """
    origin = _origin(config)
    check_out(config.out, _sources(config, origin), force=config.force)
    _check_token(config.push)
    model = load(origin.folder, trust_remote_code=config.trust_remote_code)
    if config.dtype is not None:
        model.to(_DTYPES[config.dtype])  # pyright: ignore[reportCallIssue, reportArgumentType]
    with out_folder(config.out, _provenance(origin)) as folder:
        save_model(model, folder)
        for name in _TOKENIZER:
            if (origin.folder / name).is_file():
                shutil.copyfile(origin.folder / name, folder / name)
        name_class_of_version_4(folder)
        _write_card(folder, origin, model)
    return ExportModelResult(
        path=config.out,
        architecture=architecture(model.config),
        parameters=count_parameters(model),
        dtype=_dtype(model),
        files=tuple(sorted(p.name for p in config.out.iterdir())),
        pushed=_push(config.out, config.push) if config.push else "",
    )


def _origin(config: ExportModelConfig) -> _Origin:
    if config.path is not None:
        if not (config.path / "config.json").is_file():
            raise InputError(f"--path {config.path} has no config.json: name a model folder")
        record = config.path / PROVENANCE
        before = (
            json_object(record, "the record of an import or export") if record.is_file() else {}
        )
        return _Origin(config.path, config.path.resolve().name, None, None, before)
    run = Run(config.run)
    stage = run.stage("model", config.model)
    trained = stage.require("train")
    return _Origin(stage.path, config.model, trained, run.stage("tokens").completion())


def _sources(config: ExportModelConfig, origin: _Origin) -> tuple[Path, ...]:
    """Return the folders that `--out` must neither contain nor be inside of: only stages write into a run."""
    return (origin.folder,) if config.path is not None else (config.run, origin.folder)


def _provenance(origin: _Origin) -> dict[str, Any]:
    weights = sorted(origin.folder.glob("*.safetensors"))
    content: dict[str, Any] = {
        "written_by": "cratelm export model",
        "model": origin.name,
        "sha256": {path.name: hash_file(path) for path in weights},
    }
    if origin.before:
        content["before"] = origin.before
    for key, record in (("training", origin.trained), ("tokens", origin.tokens)):
        if record is not None:
            content[key] = {
                "config": _public(record.config),
                "results": record.results,
                "identity": record.identity,
                "versions": record.versions,
                "git_commit": record.git_commit,
                "finished_at": record.finished_at,
            }
    return content


def _write_card(folder: Path, origin: _Origin, model: Any) -> None:
    facts = {
        "architecture": architecture(model.config),
        "parameters (position embedding not counted)": count_parameters(model),
        "weights": _dtype(model),
        **(_training_facts(origin.trained) if origin.trained else {}),
        **(_corpus_facts(origin.tokens) if origin.tokens else {}),
    }
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    sections = {"How to load it": usage(model.config, tokenizer=has_tokenizer)}
    if origin.trained is not None:
        settings = {"train": _public(origin.trained.config)}
        if origin.tokens is not None:
            settings["tokenize"] = _public(origin.tokens.config)
        sections["Training"] = (
            f"Trained by cratelm with these settings:\n\n{code_block(settings)}\n\n"
            f"Versions: {', '.join(f'{k} {v}' for k, v in origin.trained.versions.items())}."
        )
    if origin.before:
        sections["Origin"] = code_block(origin.before)
    sections["Licence"] = (
        "No licence is stated for the weights: whoever trained them must choose one before publishing them."
        f"{_code_licence(model)}"
    )
    write_card(
        folder,
        origin.name,
        _summary(model.config),
        facts,
        sections,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[model.config.model_type, "interpretability"],
    )


def _code_licence(model: Any) -> str:
    file = code_name(model.config)
    including = f", including `{file}` in this folder," if file else ""
    return f" The code of cratelm{including} is under the MIT licence."


def _summary(config: Any) -> str:
    if isinstance(config, CrateConfig) and config.feedforward == "ista":
        return f"A CRATE language model, whose neurons are a sparse code in a dictionary ({PAPER})."
    if isinstance(config, CrateConfig):
        return f"A CRATE language model without sparse coding, for comparison ({PAPER})."
    if isinstance(config, SparseGptConfig):
        return "A weight-sparse GPT (Gao et al. 2025, arXiv 2511.13653)."
    if getattr(config, "zero_biases", False):
        name = getattr(config, "activation", config.activation_function)
        name = {"relu": "ReLU", "gelu": "GELU", "solu": "SoLU", "topk": "TopK"}.get(name, name)
        return f"The GPT-2 twin of a CRATE language model: {name} in the MLP, biases 0 ({PAPER})."
    return f"A {config.model_type} language model."


def _training_facts(trained: Completion) -> dict[str, Any]:
    results = trained.results
    loss = results.get("validation_loss")
    error = results.get("validation_standard_error")
    if loss is not None:
        loss = f"{loss:.4f}" + (f" ± {error:.4f} (standard error)" if error is not None else "")
    return {
        "training tokens, including repetitions": results.get("tokens"),
        "optimizer steps": results.get("steps"),
        "loss on held-out documents, nats per token": loss,
        "trained": trained.finished_at,
        "commit of cratelm": trained.git_commit or None,
    }


def _corpus_facts(tokens: Completion) -> dict[str, Any]:
    settings, n_tokens = _public(tokens.config), tokens.results.get("tokens", {})
    return {
        "corpus": settings.get("corpus"),
        "tokens of the train split": n_tokens.get("train"),
        "tokenizer": settings.get("tokenizer"),
        "sha256 of the corpus's identity": tokens.inputs.get("corpus"),
    }


def _public(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with each path reduced to its last component, to hide the paths of this machine."""
    return {
        k: Path(v).name if isinstance(v, str) and "/" in v and not v.startswith("hub:") else v
        for k, v in settings.items()
    }


def _dtype(model: Any) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _check_token(push: str) -> None:
    """Raise `InputError` before any work if `--push` is given but no Hub token is set."""
    if not push:
        return
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError(f"--push {push} needs a Hub token: type `hf auth login`, or set HF_TOKEN")


def _push(folder: Path, repository: str) -> str:
    from huggingface_hub import HfApi

    try:
        address = HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Model exported by cratelm"
        )
    except Exception as error:  # network libraries share no base exception
        message = one_line(error, 160)
        raise InputError(
            f"{folder} was written, but the upload to hub:{repository} failed ({type(error).__name__}:"
            f" {message}): type `hf upload {repository} {folder}` to try again"
        ) from None
    return str(address)
