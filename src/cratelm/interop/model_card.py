"""Model cards: the README.md of a folder that can be uploaded to the Hub."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    """Write README.md with the Hub's `metadata`, a title, a summary, a table of facts, and sections by heading.

    Facts that are None are omitted.
    """
    from huggingface_hub import ModelCard, ModelCardData

    rows = "\n".join(f"| {k} | {_cell(v)} |" for k, v in facts.items() if v is not None)
    parts = [f"# {_line(title)}", summary, f"| | |\n|---|---|\n{rows}"]
    parts += [f"## {head}\n\n{text}" for head, text in sections.items()]
    # not from a template: text from an untrusted file could contain template syntax
    text = "\n\n".join(parts)
    ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{text}\n").save(
        folder / "README.md"
    )


def items(lines: Sequence[str]) -> str:
    """Return a Markdown list, one item per line."""
    return "\n".join(f"- {line}" for line in lines)


def code_block(value: Any) -> str:
    """Return JSON values as a Markdown code block."""
    return f"```json\n{json.dumps(value, indent=1, ensure_ascii=True)}\n```"


def _cell(value: Any) -> str:
    """Return a value for a table cell, escaped so that text from an untrusted file cannot end the row."""
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return _line(str(value)).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")
