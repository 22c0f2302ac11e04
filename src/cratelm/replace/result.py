"""The result of `cratelm replace`, and how it is printed."""

from dataclasses import dataclass
from pathlib import Path

from cratelm.replace.store import ReplacementSummary, read_replacement_summary
from cratelm.text.table import align


@dataclass(frozen=True, kw_only=True)
class ReplaceResult(ReplacementSummary):
    """Result of `cratelm replace`."""

    path: Path
    """folder of `documents.parquet`, `neurons.parquet`, `curve.parquet` and `summary.json`"""
    calls: str = ""
    """number and cost of this command's calls to a language model, in words; empty without one"""

    def __str__(self) -> str:
        calls = [self.calls] if self.calls else []
        lines = [_headline(self), "", *_table(self), "", *_notes(self), *calls, f"{self.path}"]
        return "\n".join(lines)


def result_of(folder: Path) -> ReplaceResult:
    """Return the result of a finished stage. Raises `InputError` if its summary is missing or damaged."""
    return ReplaceResult(path=folder, **vars(read_replacement_summary(folder)))


def _headline(summary: ReplacementSummary) -> str:
    row = summary.rows[0] if summary.simulator else summary.headline
    if row is None:
        return f"{summary.model}: layers were replaced one at a time only"
    which, fine = "", ".2f"
    if summary.simulator:
        fine = ".5f"
        which = f"with {summary.n_replaced:,} of {summary.n_neurons:,} neurons "
    recovered = "" if row.recovered_mean is None else f" ({row.recovered_mean.show('.1%')})"
    return (
        f"{summary.model}: {which}on its explanations ({row.explainer}) a loss of {row.loss_replaced.show('.3f')}"
        f" nats per token, {row.loss_true.show('.3f')} without; the codes carry"
        f" {row.carried.show(fine)} nats, the explanations give back {row.given_back.show(fine)}"
        f"{recovered}"
    )


_COLUMNS = (
    ("replaced", "loss_replaced", ".3f"),
    ("nats lost", "nats_lost", ".3f"),
    ("codes carry", "carried", ".3f"),
    ("at 0", "carried_zero", ".3f"),
    ("given back", "given_back", ".3f"),
    ("recovered, of means", "recovered_mean", ".1%"),
    ("of unigram", "recovered_unigram", ".1%"),
)


def _table(summary: ReplacementSummary) -> list[str]:
    header = ["layers", "explainer", *(label for label, _, _ in _COLUMNS)]
    lines = [header]
    fine = ".5f" if summary.simulator else ".3f"  # some neurons of many: the differences are small
    for row in summary.rows:
        name = row.explainer + (", shuffled" if row.control == "shuffled" else "")
        cells = [getattr(row, field) for _, field, _ in _COLUMNS]
        shown = [
            "-" if cell is None else cell.show(fine if form == ".3f" else form)
            for cell, (_, _, form) in zip(cells, _COLUMNS, strict=True)
        ]
        lines.append([row.layers, name, *shown])
    return align(lines)


def _notes(summary: ReplacementSummary) -> list[str]:
    ngrams = ", ".join(f"{n.depth} {n.loss.show('.3f')}" for n in summary.ngrams)
    lines = [
        *_simulation(summary),
        f"n-gram models of the same {summary.n_fit_tokens:,} fit tokens, by tokens of context: {ngrams}",
        "entries per explanation: "
        + ", ".join(f"{name} {size:,.0f}" for name, size in summary.sizes.items()),
    ]
    if summary.reconstructed is not None:
        lines.append(
            "with true latents, without the error of the autoencoders:"
            f" {summary.reconstructed.show('.3f')}"
        )
    for explainer in summary.explainers:
        of = [r for r in summary.runnable if r.explainer == explainer]
        if of:
            shares = ", ".join(f"{r.fraction:.0%} at {r.nats:g} nats" for r in of)
            lines.append(f"neurons that can run on {explainer}, best-explained first: {shares}")
    lines.append(
        f"{summary.n_tokens:,} held-out tokens of {summary.n_documents} documents; 95% intervals over documents"
    )
    return lines


def _simulation(summary: ReplacementSummary) -> list[str]:
    """Return which language models explained and simulated; no line if none did."""
    if not summary.simulator:
        return []
    line = (
        f"explanations by {summary.explanations}, simulated by {summary.simulator}, calibrated on"
        f" {summary.n_calibration_tokens:,} fit tokens"
    )
    if not summary.n_failed:
        return [line]
    return [
        line,
        f"{summary.n_failed:,} calls failed: neurons have their means there (--retry-failed repeats the calls)",
    ]
