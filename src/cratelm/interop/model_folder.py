"""Model folders for transformers: weights, the code of a family, and parts of the model card."""

import ast
import re
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModel

from cratelm.models.crate import CrateConfig
from cratelm.models.families import FAMILIES
from cratelm.models.gpt2_activation import Gpt2ActivationConfig
from cratelm.models.sparse_gpt import SparseGptConfig
from cratelm.runs import versions, write_json
from cratelm.runs.pretrained import json_object

_OF_CRATELM = re.compile(r"^from cratelm\.models\.(\w+) import", re.MULTILINE)
"""an import of another file of `cratelm.models`, which a model folder contains as well"""

_REGISTER = "register_family"


def code_name(config: Any) -> str:
    """Return the name that a family's file has in a model folder, such as `modeling_crate.py`.

    Empty for a model of none of the families, and for one whose class is part of transformers.
    """
    module = type(config).__module__
    is_of_family = any(type(config) is family.config_class for family in FAMILIES.values())
    if not is_of_family or module.startswith("transformers."):
        return ""
    return f"modeling_{module.rpartition('.')[2]}.py"


def _code_files(config: Any) -> dict[str, str]:
    """Return the text of each file that a model folder needs, by its name.

    The family's file may import others of `cratelm.models`, which the folder then has beside it: an import that
    names cratelm becomes one of the same folder. A family from outside of cratelm is not registered there.
    """
    module = type(config).__module__
    texts: dict[str, str] = {}
    to_read = [(module, code_name(config))]
    while to_read:
        name, file = to_read.pop()
        text = _unregistered(Path(str(sys.modules[name].__file__)).read_text(encoding="utf-8"))
        to_read += [(f"cratelm.models.{m}", f"{m}.py") for m in _OF_CRATELM.findall(text)]
        texts[file] = _OF_CRATELM.sub(r"from .\1 import", text)
    return texts


def _unregistered(text: str) -> str:
    """Return the text of a module without its top-level import and calls of `register_family`."""
    lines = text.splitlines(keepends=True)
    for node in ast.parse(text).body:
        is_import = isinstance(node, ast.ImportFrom) and [a.name for a in node.names] == [_REGISTER]
        is_call = (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Name)
            and node.value.func.id == _REGISTER
        )
        if is_import or is_call:
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            lines[first:last] = [""] * (last - first)
    return "".join(lines)


def save_model(model: Any, folder: Path) -> None:
    """Write the model and its code, unless that is in transformers: transformers can load it without cratelm."""
    from transformers import logging as transformers_logging

    module = code_name(model.config).removesuffix(".py")
    if module:
        model.config.auto_map = {
            "AutoConfig": f"{module}.{type(model.config).__name__}",
            "AutoModelForCausalLM": f"{module}.{type(model).__name__}",
        }
        base: Any = AutoModel._model_mapping.get(type(model.config), None)
        if base is not None:
            model.config.auto_map["AutoModel"] = f"{module}.{base.__name__}"
    bar_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # not useful for one file
    try:
        model.save_pretrained(folder)
    finally:
        if bar_enabled:
            transformers_logging.enable_progress_bar()
    if module:
        for name, text in _code_files(model.config).items():
            (folder / name).write_text(text, encoding="utf-8")
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
            f"CRATE{_ATTENTION[config.attention]}, {config.num_hidden_layers} layers, width"
            f" {config.hidden_size}, {config.num_attention_heads} heads,"
            f" {config.num_neurons:,} neurons per layer, {_second_step(config)}"
        )
    if isinstance(config, SparseGptConfig):
        return (
            f"weight-sparse GPT, {config.num_hidden_layers} layers, width {config.hidden_size},"
            f" {config.num_attention_heads} heads of width {config.head_dim},"
            f" {config.intermediate_size:,} neurons per layer, of which"
            f" {config.activation_fraction:g} are kept, {config.hidden_act} in the MLP,"
            f" {config.weight_fraction:g} of the weights not 0 after training"
        )
    if config.model_type in ("gpt2", "gpt2_activation"):
        is_other = isinstance(config, Gpt2ActivationConfig)
        activation = config.activation if is_other else config.activation_function
        biases = "no biases" if getattr(config, "zero_biases", False) else "with biases"
        return (
            f"GPT-2, {config.n_layer} layers, width {config.n_embd}, {config.n_head} heads,"
            f" {config.n_inner or 4 * config.n_embd:,} neurons per layer,"
            f" {activation} in the MLP, {biases}"
        )
    return config.model_type


_ATTENTION = {
    "mssa": "",
    "query": " with a separate query",
    "standard": " with three projections in the attention",
    "tssa": " with token statistics self-attention",
}
"""how a CRATE differs in its first step, in words"""


def _second_step(config: CrateConfig) -> str:
    if config.feedforward != "ista":
        return "an MLP" if config.feedforward == "mlp" else "no second step"
    residual = ", residual" * config.ista_residual
    return (
        f"{config.ista_steps} steps of sparse coding (step size {config.step_size}, threshold"
        f" {config.threshold}{residual}{', separate decoder' * config.decoupled_dictionary})"
    )


def usage(config: Any, *, tokenizer: bool) -> str:
    """Return a section of a model card that shows how transformers loads the folder."""
    code_file = code_name(config)
    trust = ", trust_remote_code=True" if code_file else ""
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
        f"```python\n{code}\n```\n\n{needs} The model's code is `{code_file}` in this folder,"
        " which imports only torch, transformers and files beside it; `trust_remote_code=True` runs it (the tokenizer"
        " also needs the option, because its loader reads config.json first). With cratelm installed,"
        ' `cratelm.load("FOLDER")` runs the code in cratelm instead.'
    )
