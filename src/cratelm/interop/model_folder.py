"""Model folders for transformers: weights, the code of CRATE, and parts of the model card."""

import shutil
from pathlib import Path
from typing import Any

from cratelm.models.crate import CrateConfig
from cratelm.runs import versions

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
