"""Model cards: README.md of a folder that can go to the Hub."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cratelm.models.crate import CrateConfig
from cratelm.runs import versions

PAPER = (
    "Bai & Ma, *Improving Neuron-level Interpretability with White-box Language Models*,"
    " [arXiv 2410.16443](https://arxiv.org/abs/2410.16443)"
)


def write_card(
    folder: Path,
    title: str,
    summary: str,
    facts: Mapping[str, Any],
    sections: Mapping[str, str],
    **metadata: Any,
) -> None:
    """README.md: the Hub's metadata, what it is, a table of facts (None left out), and sections."""
    from huggingface_hub import ModelCardData

    # an empty line separates parts; the table of facts has a head without words
    rows = "\n".join(f"| {k} | {_cell(v)} |" for k, v in facts.items() if v is not None)
    parts = [f"---\n{ModelCardData(**metadata).to_yaml()}\n---", f"# {_line(title)}", summary]
    parts.append(f"| | |\n|---|---|\n{rows}")
    parts += [f"## {head}\n\n{text}" for head, text in sections.items()]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def architecture(config: Any) -> str:
    """What a model is, in words."""
    if isinstance(config, CrateConfig):
        return (
            f"CRATE, {config.num_hidden_layers} layers, width {config.hidden_size},"
            f" {config.num_attention_heads} heads, {config.num_neurons:,} neurons a layer,"
            f" {config.ista_steps} steps of sparse coding (step {config.step_size}, threshold"
            f" {config.threshold})"
        )
    if config.model_type == "gpt2":
        biases = "no biases" if getattr(config, "zero_biases", False) else "with biases"
        return (
            f"GPT-2, {config.n_layer} layers, width {config.n_embd}, {config.n_head} heads,"
            f" {config.n_inner or 4 * config.n_embd:,} neurons a layer,"
            f" {config.activation_function} in the MLP, {biases}"
        )
    return config.model_type


def usage(config: Any, *, tokenizer: bool) -> str:
    """How transformers loads the folder, as a section."""
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
        return f"```python\n{code}\n```\n\n{needs} The class is transformers' own."
    return (
        f"```python\n{code}\n```\n\n{needs} The model's code is `modeling_crate.py` in this folder,"
        " which imports torch and transformers alone; `trust_remote_code=True` runs it (the tokenizer"
        " needs the word too, because its loader reads config.json first). With cratelm installed,"
        ' `cratelm.load("FOLDER")` runs cratelm\'s own instead.'
    )


def items(lines: Sequence[str]) -> str:
    """A list, an item a line."""
    return "\n".join(f"- {line}" for line in lines)


def code_block(value: Any) -> str:
    """JSON values, set as code."""
    return f"```json\n{json.dumps(value, indent=1, ensure_ascii=True)}\n```"


def _cell(value: Any) -> str:
    """A value in a table: what a foreign file says must not end the row."""
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return _line(str(value)).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")
