"""Model folders for transformers: weights, the code of CRATE, and parts of the model card."""

import shutil
from pathlib import Path
from typing import Any

from cratelm.models.crate import CrateConfig
from cratelm.runs import versions, write_json
from cratelm.runs.pretrained import json_object

CODE = "modeling_crate.py"
"""name of `crate.py` in a model folder"""


def save_model(model: Any, folder: Path) -> None:
    """Write the model and, for CRATE, its code, so that transformers can load it without cratelm."""
    from transformers import logging as transformers_logging

    from cratelm.models import crate

    needs_code = isinstance(model, crate.CratePreTrainedModel)
    if needs_code:
        module = CODE.removesuffix(".py")
        model.config.auto_map = {
            "AutoConfig": f"{module}.{crate.CrateConfig.__name__}",
            "AutoModel": f"{module}.{crate.CrateModel.__name__}",
            "AutoModelForCausalLM": f"{module}.{crate.CrateForCausalLM.__name__}",
        }
    bar_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # not useful for one file
    try:
        model.save_pretrained(folder)
    finally:
        if bar_enabled:
            transformers_logging.enable_progress_bar()
    if needs_code:
        shutil.copyfile(crate.__file__, folder / CODE)
    path = folder / "config.json"
    write_json(path, with_names_of_version_4(json_object(path, "the configuration of a model")))


def with_names_of_version_4(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration that also has the names under which transformers 4 looks for rotary embeddings.

    Version 5 writes `rope_parameters`, which version 4 ignores: it would compute with its default base, and nothing
    would say so.
    """
    ours = {k: with_names_of_version_4(v) if isinstance(v, dict) else v for k, v in config.items()}
    rope = ours.get("rope_parameters")
    if not isinstance(rope, dict):
        return ours
    by_kind = [v for v in rope.values() if isinstance(v, dict)]
    if by_kind:  # Gemma 3: one for each kind of attention
        whole, local = rope.get("full_attention") or {}, rope.get("sliding_attention") or {}
        old = _rope(whole)
        if "rope_theta" in local:
            old["rope_local_base_freq"] = local["rope_theta"]
    else:
        old = _rope(rope)
    if ours.get("model_type") == "gpt_neox":
        names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        old = {names.get(k, k): v for k, v in old.items()}
    return {**ours, **{k: v for k, v in old.items() if ours.get(k) is None}}


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of one rotary embedding by the names of version 4."""
    old = {k: parameters[k] for k in ("rope_theta", "partial_rotary_factor") if k in parameters}
    if parameters.get("rope_type", "default") != "default":
        old["rope_scaling"] = {k: v for k, v in parameters.items() if k not in old}
    return old


def architecture(config: Any) -> str:
    """Return the architecture of a model in words."""
    if isinstance(config, CrateConfig):
        return (
            f"CRATE, {config.num_hidden_layers} layers, width {config.hidden_size},"
            f" {config.num_attention_heads} heads, {config.num_neurons:,} neurons per layer,"
            f" {config.ista_steps} steps of sparse coding (step size {config.step_size}, threshold"
            f" {config.threshold})"
        )
    if config.model_type == "gpt2":
        biases = "no biases" if getattr(config, "zero_biases", False) else "with biases"
        return (
            f"GPT-2, {config.n_layer} layers, width {config.n_embd}, {config.n_head} heads,"
            f" {config.n_inner or 4 * config.n_embd:,} neurons per layer,"
            f" {config.activation_function} in the MLP, {biases}"
        )
    return config.model_type


def usage(config: Any, *, tokenizer: bool) -> str:
    """Return a section of a model card that shows how transformers loads the folder."""
    trust = ", trust_remote_code=True" if isinstance(config, CrateConfig) else ""
    names = "AutoModelForCausalLM, AutoTokenizer" if tokenizer else "AutoModelForCausalLM"
    lines = [
        f"from transformers import {names}",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER OR HUB ID"{trust})',
    ]
    if tokenizer:
        lines += [
            f'tokenizer = AutoTokenizer.from_pretrained("FOLDER OR HUB ID"{trust})',
            'ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]',
            "print(tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]))",
        ]
    code = "\n".join(lines)
    needs = f"Written with transformers {versions()['transformers']}."
    if not trust:
        return f"```python\n{code}\n```\n\n{needs} The model class is part of transformers."
    return (
        f"```python\n{code}\n```\n\n{needs} The model's code is `modeling_crate.py` in this folder,"
        " which imports only torch and transformers; `trust_remote_code=True` runs it (the tokenizer"
        " also needs the option, because its loader reads config.json first). With cratelm installed,"
        ' `cratelm.load("FOLDER")` runs the code in cratelm instead.'
    )
