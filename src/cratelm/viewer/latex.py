"""A neuron's excerpts as LaTeX: tokens on coloured boxes, as the paper prints them."""

from cratelm.results.views import NeuronView
from cratelm.text.display import printable, visible
from cratelm.text.table import latex

_EXCERPTS, _BEFORE, _AFTER = 5, 12, 8


def figure(view: NeuronView) -> str:
    """A figure for a document with the packages xcolor and booktabs; ASCII alone."""
    lines = [
        r"% \usepackage{xcolor}",
        r"\begin{figure}",
        r"  \setlength{\fboxsep}{1pt}\ttfamily\footnotesize\raggedright",
    ]
    for excerpt in [e for e in view.excerpts if e.kind == "top"][:_EXCERPTS]:
        shown = excerpt.true[max(0, excerpt.peak - _BEFORE) : excerpt.peak + _AFTER]
        tokens = [_token(t.text, t.level) for t in shown]
        lines.append("  " + r"\allowbreak{}".join(tokens) + r" \\[2pt]")
    told = view.explanations[0] if view.explanations else None
    said = latex(printable(told.text)) if told else "not explained"
    lines += [
        rf"  \caption{{Neuron {view.index} of layer {view.layer}, {latex(view.model)}: {said}}}",
        r"\end{figure}",
    ]
    return "\n".join(lines) + "\n"


def _token(text: str, level: int) -> str:
    shown = latex(visible(text)).replace(r"\texttt{U+2423}", r"\textvisiblespace{}")
    shown = shown.replace(r"\texttt{U+23CE}", r"$\hookleftarrow$").replace(
        r"\texttt{U+21E5}", r"$\mapsto$"
    )
    return rf"\colorbox{{orange!{6 * level}}}{{\strut {shown}}}" if level else shown
