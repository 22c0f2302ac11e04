"""Pages as HTML, from records: the same for the server and for an exported folder.

Whatever a corpus holds is made visible (`cratelm.text.display`) and escaped: nothing in it acts.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import groupby
from typing import Any

import jinja2
from markupsafe import Markup, escape

from cratelm.report.cells import METRIC_NAMES
from cratelm.results.views import (
    ExcerptView,
    LayerQuery,
    ModelCard,
    NeuronView,
    NotFound,
    RunCard,
    SearchHit,
    ShadedToken,
    plain,
)
from cratelm.score.simulators import SIMULATORS
from cratelm.text.display import printable, runs_right_to_left, visible
from cratelm.text.shading import faint_marks
from cratelm.viewer import drawings, latex
from cratelm.viewer.compare import compared
from cratelm.viewer.links import Links
from cratelm.viewer.run_reader import RARELY, Library

SEARCH_LIMIT = 100
_KINDS = {
    "top": "Strongest",
    "openai_bin": "By quantile",
    "anthropic_bin": "By range",
    "random": "Around random tokens",
    "out_of_context": "Strongest tokens out of their context",
}
Crumbs = list[tuple[str, str]]


@dataclass(frozen=True)
class Pages:
    """Makes the pages of a library."""

    library: Library
    live: bool = False
    """links to the live page"""
    static: bool = False
    paged: Callable[[str, str, int, int], bool] = lambda *_: True
    """whether a neuron (run, model, layer, index) has a page"""

    def overview(self, key: str | None = None) -> str:
        """Of one run, or of all."""
        keys = (key,) if key else self.library.keys
        runs = [self.library.run(k) for k in keys]
        title = runs[0].key if len(runs) == 1 else "Runs"
        here = ("r", key) if key else ()
        crumbs: Crumbs = [(key, "")] if key else []
        only = runs[0].key if len(runs) == 1 else ""
        return self._page(
            "overview.html",
            here,
            crumbs,
            only,
            title=title,
            runs=runs,
            metrics_of=_metrics_of,
            scores_by_layer=drawings.scores_by_layer,
            pairs=_pairs,
            best=self._best,
            rarely=RARELY,
        )

    def layer(self, key: str, model: str, layer: int, query: LayerQuery) -> str:
        page = self.library.layer(key, model, layer, query)
        query = page.query
        card = self.library.run(key).model(model)
        links = self._links(("r", key, "layer", model, str(layer)))

        def has_page(index: int) -> bool:
            return self.paged(key, model, layer, index)

        stem = links.to("r", key, "neuron", model, layer, 0)  # numbers need no quoting

        def address(index: int) -> str:
            end = "0.html" if self.static else "0"
            return stem.removesuffix(end) + end.replace("0", str(index)) if has_page(index) else ""

        def asked(**changed: Any) -> str:
            told = {
                "q": query.text,
                "token": query.token,
                "only": "" if query.only == "all" else query.only,
            }
            order = {"sort": query.sort, "direction": "descending" if query.descending else ""}
            return links.to("r", key, "layer", model, layer, **{**told, **order, **changed})

        def sorted_by(name: str) -> str:
            down = name != "index" if query.sort != name else not query.descending
            return asked(sort=name, direction="descending" if down else "")

        twin = self.library.run(key).twin(model)
        return self._page(
            "layer.html",
            links.here,
            self._crumbs(links, key, (model, ""), (f"layer {layer}", "")),
            key,
            page=page,
            layers=sorted(card.neurons),
            twin=twin if twin and layer in self.library.run(key).model(twin).neurons else "",
            problems=self.library.columns(key, model).problems,
            has_page=has_page,
            sorted_by=sorted_by,
            paged=lambda number: asked(page=number),
            drawn=self.library.drawn_map(
                key, model, layer, lambda points: drawings.layer_map(points, address)
            ),
            map_state=self._no_map(key),
        )

    def neuron(self, view: NeuronView) -> str:
        key, model, layer, index = view.run, view.model, view.layer, view.index
        here = ("r", key, "neuron", model, str(layer), str(index))
        links = self._links(here)

        def has_page(number: int, of: str = model, at: int = layer) -> bool:
            return self.paged(key, of, at, number)

        other = "fit" if view.split == "held_out" else "held_out"
        split = "" if view.split == "held_out" else view.split
        up = links.to("r", key, "layer", model, layer)
        api = f"/api{links.to(*here)}" if not self.static else ""
        usual = view.explanations[0].explainer if view.explanations else ""
        told = "" if view.explainer == usual else view.explainer
        simulators = [
            (e.explainer, links.to(*here, split=split, explainer=e.explainer))
            for e in view.explanations
            if e.explainer in SIMULATORS and not e.set_name and e.explainer != view.explainer
        ]
        return self._page(
            "neuron.html",
            here,
            self._crumbs(links, key, (model, ""), (f"layer {layer}", up), (f"neuron {index}", "")),
            key,
            v=view,
            has_page=has_page,
            facts=_facts(view),
            histogram=drawings.histogram,
            excerpts=excerpts_html(view.excerpts),
            more=links.to(*here, split=split, explainer=told, all=1),
            other_split=links.to(*here, split=other if other != "held_out" else "", explainer=told),
            index_state=self._index_state(
                key, "Nearest neurons", "None: it fires on no token that was seen twice."
            ),
            effects=self.library.effects_command(key, model),
            api=api,
            svg=f"{api}/card.svg",
            simulators=simulators,
            latex=latex.figure(view),
            data=as_data(plain(view)) if self.static else "",
            card=as_data({"svg": drawings.card(view), "name": f"{model}-{layer}-{index}.png"}),
        )

    def search(self, key: str, text: str, token: str, model: str = "") -> str:
        found = None
        if text or token:
            found = self.library.search(
                key, text=text, token=token, limit=SEARCH_LIMIT, model=model
            )
        models = [m for m in self.library.run(key).models if m.neurons]
        links = self._links(("r", key, "search"))
        crumbs = self._crumbs(links, key, ("search", ""))
        return self._page(
            "search.html",
            links.here,
            crumbs,
            key,
            found=found,
            text=text,
            token=token,
            model=model,
            models=models,
            limit=SEARCH_LIMIT,
        )

    def compare(self, key: str, left: str, right: str) -> str:
        """Two layers, or two neurons, as MODEL/LAYER or MODEL/LAYER/NEURON; without `right` the twin's."""
        card = self.library.run(key)
        found = compared(self.library, key, left, right)
        links = self._links(("r", key, "compare"))
        places = [f"{m.name}/{layer}" for m in card.models for layer in m.neurons]
        return self._page(
            "compare.html",
            links.here,
            self._crumbs(links, key, ("compare", "")),
            key,
            found=found,
            places=places,
            histogram=drawings.histogram,
            excerpts_html=excerpts_html,
            spread=drawings.spread,
            facts=_facts,
        )

    def live_page(self, key: str) -> str:
        links = self._links(("r", key, "live"))
        card = self.library.run(key)
        models = {m.name: m.neurons for m in card.models if m.neurons}
        return self._page(
            "live.html",
            links.here,
            self._crumbs(links, key, ("live", "")),
            key,
            models=models,
            data=as_data(plain({"run": key, "models": models})),
        )

    def error(self, status: int, told: str) -> str:
        return self._page("error.html", (), [], "", status=status, told=told)

    # ---- parts ------------------------------------------------------------------------------------

    def _best(self, run: RunCard) -> list[tuple[str, list[SearchHit]]]:
        """Of each trained model, neurons to begin with that have a page."""
        found = []
        for card in run.models:
            if not card.neurons or card.null_of:
                continue
            with contextlib.suppress(NotFound):  # damaged: the card says so
                hits = self.library.best(run.key, card.name)
                shown = [h for h in hits if self.paged(run.key, h.model, h.layer, h.index)]
                found += [(card.name, shown)] if shown else []
        return found

    def _index_state(self, key: str, what: str, otherwise: str) -> str:
        """Why something that needs the index is not there; `otherwise` where the index is."""
        state = self.library.index_state(key)
        if state.ready:
            return otherwise
        if state.problem:
            return f"{what} cannot be shown: the index could not be built ({state.problem})."
        return f"{what} will be here when the index is built ({state.done} of {state.total} parts): load again."

    def _no_map(self, key: str) -> str:
        problem = self.library.index_state(key).problem
        later = "The map of this layer is being drawn: load the page again."
        told = f"The map cannot be drawn ({problem})." if problem else later
        return self._index_state(key, "The map", told)

    def _links(self, here: tuple[str, ...]) -> Links:
        return Links(tuple(here), self.static)

    def _crumbs(self, links: Links, key: str, *rest: tuple[str, str]) -> Crumbs:
        return [(key, links.to("r", key)), *rest]

    def _page(
        self, template: str, here: Sequence[str], crumbs: Crumbs, key: str, **values: Any
    ) -> str:
        return (
            _environment()
            .get_template(template)
            .render(
                links=self._links(tuple(here)),
                crumbs=crumbs,
                run_key=key,
                live=self.live and not self.static,
                metric_name=lambda m: METRIC_NAMES.get(m, m),
                **values,
            )
        )


def excerpts_html(excerpts: Sequence[ExcerptView]) -> Markup:
    """Excerpts by kind and bin; each token shaded by true and by simulated activation."""
    parts: list[str] = []
    for kind, members in groupby(excerpts, key=lambda e: e.kind):
        parts.append(f'<h3>{_KINDS[kind]}</h3><div class="excerpts">')
        for e in members:
            bin_ = f'<span class="bin">bin {e.bin}</span>' if e.bin >= 0 else ""
            sides = [("true", e.true)] + ([("simulated", e.simulated)] if e.simulated else [])
            lines = "".join(_line(name, tokens, e.peak) for name, tokens in sides)
            where = escape(printable(e.document))
            parts.append(f'<div class="excerpt">{bin_}{lines}<p class="from">{where}</p></div>')
        parts.append("</div>")
    return Markup("".join(parts))


def _line(name: str, tokens: Sequence[ShadedToken], peak: int) -> str:
    """One excerpt, a span a token with its value on hover and tap (`title`); tokens at 0 share one."""
    shown = [_shown_token(t.text) for t in tokens]
    zero = [
        not t.value and place != peak and shown[place][0] == "span"
        for place, t in enumerate(tokens)
    ]
    spans = []
    for alike, group in groupby(range(len(tokens)), lambda place: -1 if zero[place] else place):
        if alike < 0:
            spans.append(f'<span title="0">{"".join(shown[p][1] for p in group)}</span>')
            continue
        (tag, text), (_, value, level) = shown[alike], tokens[alike]
        kinds = [f"l{level}"] * (level > 0) + ["peak"] * (alike == peak)
        label = f' class="{" ".join(kinds)}"' if kinds else ""
        spans.append(f'<{tag}{label} title="{value or 0:.3g}">{text}</{tag}>')
    return (
        f'<div class="line {name}" dir="ltr"><span class="side">{name}</span>{"".join(spans)}</div>'
    )


@lru_cache(maxsize=1 << 16)
def _shown_token(text: str) -> tuple[str, str]:
    """Element and content of a token; what runs from right to left must not reorder its neighbours."""
    return "bdi" if runs_right_to_left(text) else "span", str(faint_marks(visible(text)))


def as_data(value: Any) -> Markup:
    """JSON for a data block: nothing in it can end the block."""
    told = json.dumps(value, ensure_ascii=True)
    for character in "<>&":
        told = told.replace(character, f"\\u{ord(character):04x}")
    return Markup(told)


def _facts(view: NeuronView) -> list[tuple[str, str]]:
    s = view.statistics
    names = {
        "firing_rate": "above 0 on",
        "maximum": "largest",
        "mean": "mean",
        "variance": "variance",
        "skew": "skew",
        "kurtosis": "kurtosis",
        "n_tokens": "tokens searched",
    }
    shown = []
    for name, label in names.items():
        if name in s:
            value = s[name]
            told = f"{100 * value:.3g}% of tokens" if name == "firing_rate" else f"{value:.3g}"
            shown.append((label, f"{int(value):,}" if name == "n_tokens" else told))
    return [*shown, ("site", printable(view.site))]


def _metrics_of(cards: Sequence[ModelCard]) -> list[str]:
    found = {m.metric for c in cards for m in c.metrics}
    return [m for m in METRIC_NAMES if m in found]


def _pairs(card: RunCard) -> list[tuple[ModelCard, ModelCard]]:
    """CRATE models with a twin."""
    trained = [c for c in card.models if c.family == "crate" and c.neurons and not c.null_of]
    return [(c, card.model(twin)) for c in trained if (twin := card.twin(c.name))]


_made: list[jinja2.Environment] = []


def _environment() -> jinja2.Environment:
    if not _made:
        folder = resources.files("cratelm.viewer") / "templates"
        environment = jinja2.Environment(
            loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        environment.filters["seen"] = lambda text: printable(str(text)) if text else text
        environment.filters["tenth"] = lambda x: f"{round(x, 1) + 0.0:.1f}"
        environment.filters["token"] = _token
        environment.filters["thousands"] = lambda n: "–" if n is None else f"{n:,}"
        _made.append(environment)
    return _made[0]


def _token(text: str) -> Markup:
    return Markup(f'<bdi class="token">{faint_marks(visible(text))}</bdi>')
