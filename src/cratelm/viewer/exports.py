"""Export one neuron as an SVG card, or as a LaTeX figure with tokens in coloured boxes."""

from markupsafe import escape

from cratelm.results.views import ExcerptView, NeuronView
from cratelm.text.display import printable, visible
from cratelm.text.table import latex
from cratelm.viewer.drawings import shortened

_EXCERPTS, _BEFORE, _AFTER = 5, 12, 8
"""LaTeX figure: number of excerpts, and of tokens before the peak and from the peak on"""


def svg_card(view: NeuronView) -> str:
    """Return a self-contained SVG picture: explanation, scores and the strongest excerpts."""
    strongest = [e for e in view.excerpts if e.kind == "top"][:5]
    lines = [
        f'<text x="24" y="38" class="t">{escape(f"{view.model} · layer {view.layer} · neuron {view.name}")}</text>'
    ]
    first = view.explanations[0] if view.explanations else None
    text = shortened(first.text, 104) if first and first.text else "not explained"
    lines.append(f'<text x="24" y="62" class="e">{escape(text)}</text>')
    scores = ", ".join(
        f"{s.metric.replace('_', '-')} {'–' if s.value is None else f'{s.value:.1f}'}"
        for s in (first.scores if first else ())
    )
    lines.append(f'<text x="24" y="84" class="s">{escape(scores or "no scores")}</text>')
    for number, excerpt in enumerate(strongest):
        lines.append(_card_line(excerpt, 112 + 30 * number))
    height = 112 + 30 * len(strongest) + 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="860" height="{height}" viewBox="0 0 860 {height}">'
        "<style>text{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:14px;fill:#1b1f24}"
        ".t{font-family:system-ui,sans-serif;font-weight:600;font-size:18px}"
        ".e{font-family:system-ui,sans-serif}.s{font-family:system-ui,sans-serif;fill:#57606a;font-size:13px}</style>"
        f'<rect width="860" height="{height}" fill="#ffffff"/>{"".join(lines)}</svg>'
    )


def _card_line(excerpt: ExcerptView, y: int) -> str:
    """Return the tokens around the peak as SVG, with the baseline at `y`.

    A character of a monospaced font of size 14 is 8.43 wide.
    """
    width, x, parts = 8.43, 24.0, []
    for token in excerpt.true[max(0, excerpt.peak - 14) : excerpt.peak + 12]:
        text = visible(token.text)
        length = width * len(text)
        if x + length > 840:
            break
        if token.level:
            opacity = 0.08 + 0.07 * token.level
            parts.append(
                f'<rect x="{x:.1f}" y="{y - 15}" width="{length:.1f}" height="21" fill="#e8590c" fill-opacity="{opacity:.2f}"/>'
            )
        parts.append(
            f'<text x="{x:.1f}" y="{y}" textLength="{length:.1f}" xml:space="preserve">{escape(text)}</text>'
        )
        x += length
    return "".join(parts)


def latex_figure(view: NeuronView) -> str:
    """Return a LaTeX figure in ASCII, for a document that loads the packages xcolor and booktabs."""
    lines = [
        r"% \usepackage{xcolor}",
        r"\begin{figure}",
        r"  \setlength{\fboxsep}{1pt}\ttfamily\footnotesize\raggedright",
    ]
    for excerpt in [e for e in view.excerpts if e.kind == "top"][:_EXCERPTS]:
        window = excerpt.true[max(0, excerpt.peak - _BEFORE) : excerpt.peak + _AFTER]
        tokens = [_latex_token(t.text, t.level) for t in window]
        lines.append("  " + r"\allowbreak{}".join(tokens) + r" \\[2pt]")
    first = view.explanations[0] if view.explanations else None
    text = latex(printable(first.text)) if first else "not explained"
    lines += [
        rf"  \caption{{Neuron {view.name} of layer {view.layer}, {latex(view.model)}: {text}}}",
        r"\end{figure}",
    ]
    return "\n".join(lines) + "\n"


def _latex_token(text: str, level: int) -> str:
    token = latex(visible(text)).replace(r"\texttt{U+2423}", r"\textvisiblespace{}")
    token = token.replace(r"\texttt{U+23CE}", r"$\hookleftarrow$").replace(
        r"\texttt{U+21E5}", r"$\mapsto$"
    )
    return rf"\colorbox{{orange!{6 * level}}}{{\strut {token}}}" if level else token
