"""`cratelm export model`: a folder that transformers loads without cratelm, ready for the Hub."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cratelm.errors import InputError
from cratelm.interop.config import ExportModelConfig
from cratelm.interop.model_card import PAPER, code_block, write_card
from cratelm.interop.model_folder import architecture, save_model, usage
from cratelm.interop.out_folder import PROVENANCE, check_out, out_folder
from cratelm.models.crate import CrateForCausalLM
from cratelm.models.sizes import count_parameters, load
from cratelm.runs import Completion, Run, hash_file

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
"""files of a tokenizer that a model folder may hold; copied as they are"""


@dataclass(frozen=True)
class ExportModelResult:
    """What was exported."""

    path: Path
    """the folder"""
    architecture: str
    parameters: int
    """trainable, tied ones once, position embedding left out"""
    dtype: str
    """of the weights"""
    files: tuple[str, ...]
    pushed: str
    """address on the Hub, empty where nothing was sent"""


@dataclass(frozen=True)
class _Origin:
    """Where the model comes from."""

    folder: Path
    name: str
    trained: Completion | None
    """record of its training, None for a folder without"""
    tokens: Completion | None
    """record of the corpus it was trained on"""
    before: dict[str, Any] = field(default_factory=dict)
    """what the folder says of its own origin, where an import or export wrote it"""


def export_model(config: ExportModelConfig) -> ExportModelResult:
    """Loads the model, writes the folder, sends it where asked; on an error no folder is left behind.

    Raises `InputError` for a model that is not there, a folder that cannot be written, and a Hub
    that takes nothing; in the last case the folder stays.
    """
    origin = _origin(config)
    check_out(config.out, _kept_apart(config, origin), force=config.force)
    _check_token(config.push)
    model = load(origin.folder)
    if config.dtype is not None:
        model.to(_DTYPES[config.dtype])  # pyright: ignore[reportCallIssue, reportArgumentType]
    with out_folder(config.out, _provenance(origin)) as folder:
        save_model(model, folder)
        for name in _TOKENIZER:
            if (origin.folder / name).is_file():
                shutil.copyfile(origin.folder / name, folder / name)
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
            raise InputError(f"--path {config.path} holds no config.json: name a model folder")
        told = config.path / PROVENANCE
        before = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
        return _Origin(config.path, config.path.resolve().name, None, None, before)
    run = Run(config.run)
    stage = run.stage("model", config.model)
    trained = stage.require("train")
    return _Origin(stage.path, config.model, trained, run.stage("tokens").completion())


def _kept_apart(config: ExportModelConfig, origin: _Origin) -> tuple[Path, ...]:
    """What `--out` must neither hold nor lie in: a run's folders are its stages'."""
    return (origin.folder,) if config.path is not None else (config.run, origin.folder)


def _provenance(origin: _Origin) -> dict[str, Any]:
    weights = sorted(origin.folder.glob("*.safetensors"))
    told: dict[str, Any] = {
        "written_by": "cratelm export model",
        "model": origin.name,
        "sha256": {path.name: hash_file(path) for path in weights},
    }
    if origin.before:
        told["before"] = origin.before
    for key, record in (("training", origin.trained), ("tokens", origin.tokens)):
        if record is not None:
            told[key] = {
                "config": _public(record.config),
                "results": record.results,
                "identity": record.identity,
                "versions": record.versions,
                "git_commit": record.git_commit,
                "finished_at": record.finished_at,
            }
    return told


def _write_card(folder: Path, origin: _Origin, model: Any) -> None:
    is_crate = isinstance(model, CrateForCausalLM)
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
        sections["How it was made"] = (
            f"By cratelm, with these settings:\n\n{code_block(settings)}\n\n"
            f"Versions: {', '.join(f'{k} {v}' for k, v in origin.trained.versions.items())}."
        )
    if origin.before:
        sections["Where it comes from"] = code_block(origin.before)
    sections["Licence"] = (
        "None is named for the weights: whoever trained them chooses it, before they are published."
        " The code of cratelm, `modeling_crate.py` where it is here, is under the MIT licence."
    )
    write_card(
        folder,
        origin.name,
        _summary(model, is_crate),
        facts,
        sections,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[model.config.model_type, "interpretability"],
    )


def _summary(model: Any, is_crate: bool) -> str:
    if is_crate:
        return f"A CRATE language model, whose neurons are a sparse code in a dictionary ({PAPER})."
    if getattr(model.config, "zero_biases", False):
        return f"The GPT-2 twin of a CRATE language model: ReLU in the MLP, biases 0 ({PAPER})."
    return f"A {model.config.model_type} language model."


def _training_facts(trained: Completion) -> dict[str, Any]:
    results = trained.results
    loss = results.get("validation_loss")
    error = results.get("validation_standard_error")
    if loss is not None:
        loss = f"{loss:.4f}" + (f" ± {error:.4f} (standard error)" if error is not None else "")
    return {
        "training tokens, repeats counted": results.get("tokens"),
        "optimizer steps": results.get("steps"),
        "loss on held-out documents, nats a token": loss,
        "trained": trained.finished_at,
        "commit of cratelm": trained.git_commit or None,
    }


def _corpus_facts(tokens: Completion) -> dict[str, Any]:
    told, split = _public(tokens.config), tokens.results.get("tokens", {})
    return {
        "corpus": told.get("corpus"),
        "tokens of the train split": split.get("train"),
        "tokenizer": told.get("tokenizer"),
        "sha256 of the corpus' identity": tokens.inputs.get("corpus"),
    }


def _public(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for others to read: of a path of this machine only the last name."""
    return {
        k: Path(v).name if isinstance(v, str) and "/" in v and not v.startswith("hub:") else v
        for k, v in settings.items()
    }


def _dtype(model: Any) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _check_token(push: str) -> None:
    """Before the work: the Hub takes nothing from the unknown."""
    if not push:
        return
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError(
            f"--push {push} needs a token of the Hub: type `hf auth login`, or set HF_TOKEN"
        )


def _push(folder: Path, repository: str) -> str:
    from huggingface_hub import HfApi

    try:
        address = HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Model exported by cratelm"
        )
    except Exception as error:  # network libraries raise what they like
        told = " ".join(str(error).split())[:160]
        raise InputError(
            f"{folder} is written, hub:{repository} did not take it ({type(error).__name__}:"
            f" {told}): type `hf upload {repository} {folder}` to try again"
        ) from None
    return str(address)
