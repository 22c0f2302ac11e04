"""Render pages as HTML from records, for the server and for an exported folder.

All corpus text is made visible (`cratelm.text.display`) and escaped, so that it cannot contain active content.
"""

import contextlib
import json
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from itertools import groupby
from typing import Any
from urllib.parse import quote, urlencode

import jinja2
from markupsafe import Markup, escape

from cratelm.records import has_both_ends, neuron_name
from cratelm.report.cells import METRIC_NAMES
from cratelm.results.finding import Finding
from cratelm.results.views import (
    ExcerptView,
    LayerQuery,
    ModelCard,
    NeuronView,
    NotFound,
    RunCard,
    plain,
)
from cratelm.score.simulators import SIMULATORS
from cratelm.text.display import printable, visible
from cratelm.text.shading import faint_marks, shaded_html
from cratelm.viewer import drawings
from cratelm.viewer.compare import compare
from cratelm.viewer.exports import latex_figure, svg_card
from cratelm.viewer.featured import RARELY, FeaturedNeuron, ranking
from cratelm.viewer.finding_drawing import finding_picture
from cratelm.viewer.run_reader import Library

SEARCH_LIMIT = 100
"""maximum number of neurons on the search page"""
_KINDS = {
    "top": "Strongest",
    "openai_bin": "By quantile",
    "anthropic_bin": "By range",
    "random": "Around random tokens",
    "out_of_context": "Strongest tokens in a short context",
}
Crumbs = list[tuple[str, str]]
"""name and address of each breadcrumb; the page itself has no address"""


@dataclass(frozen=True)
class Links:
    """Addresses of pages as written on the page `here`: absolute on a server, relative in a folder."""

    here: tuple[str, ...] = ()
    static: bool = False
    """addresses of files in a folder, which end in .html and have no query"""

    def to(self, *parts: str | int, **query: str | int) -> str:
        """Return the address of a page, such as that of ("r", "demo", "layer", "crate-2l", 0)."""
        parameters = {k: v for k, v in query.items() if v != ""}
        if self.static:
            return self._relative(file_of(tuple(map(str, parts))))
        path = "/" + "/".join(quote(str(p), safe="") for p in parts)
        return f"{path}?{urlencode(parameters)}" if parameters else path

    def asset(self, name: str) -> str:
        """Return the address of a stylesheet or script."""
        if self.static:
            return self._relative(f"assets/{name}")
        return f"/assets/{name}"

    def _relative(self, file: str) -> str:
        start = posixpath.dirname(file_of(self.here)) or "."
        return quote(posixpath.relpath(file, start))


def file_of(parts: Sequence[str]) -> str:
    """Return the path of a page's file in an exported folder."""
    return "/".join(parts) + ".html" if parts else "index.html"


@dataclass(frozen=True)
class Pages:
    """The pages of a library."""

    library: Library
    live: bool = False
    """whether pages link to the live page"""
    static: bool = False
    """whether pages are files in a folder"""
    paged: Callable[[str, str, int, int], bool] = lambda *_: True
    """whether a neuron (run, model, layer, index) has a page"""

    def overview(self, key: str | None = None) -> str:
        """Return the overview of one run, or of all runs."""
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
            llm_explainers=_llm_explainers,
            scores_by_layer=self._scores_by_layer,
            pairs=_pairs,
            featured=self._featured,
            finding_of=self._finding,
            shaded=lambda e: shaded_html(e.true, e.peak, every_value=False),
            rarely=RARELY,
        )

    def layer(self, key: str, model: str, layer: int, query: LayerQuery) -> str:
        """Return the table and the map of a layer."""
        page = self.library.layer(key, model, layer, query)
        query = page.query
        card = self.library.run(key).model(model)
        links = self._links(("r", key, "layer", model, str(layer)))

        def has_page(index: int) -> bool:
            return self.paged(key, model, layer, index)

        stem = links.to("r", key, "neuron", model, layer, 0)
        site = card.site

        def address(index: int) -> str:
            end = "0.html" if self.static else "0"
            name = neuron_name(index, site)
            name = name if name.isdecimal() else quote(name)  # a map has thousands of addresses
            return stem.removesuffix(end) + end.replace("0", name) if has_page(index) else ""

        def same_query(**changed: Any) -> str:
            filters = {
                "q": query.text,
                "token": query.token,
                "only": "" if query.only == "all" else query.only,
            }
            order = {"sort": query.sort, "direction": "descending" if query.descending else ""}
            return links.to("r", key, "layer", model, layer, **{**filters, **order, **changed})

        def sorted_by(name: str) -> str:
            down = name != "index" if query.sort != name else not query.descending
            return same_query(sort=name, direction="descending" if down else "")

        twin = self.library.run(key).twin(model)
        return self._page(
            "layer.html",
            links.here,
            self._crumbs(links, key, (model, ""), (f"layer {layer}", "")),
            key,
            page=page,
            layers=sorted(card.neurons),
            twin=twin if twin and layer in self.library.run(key).model(twin).neurons else "",
            others=self._others(key, model),
            problems=self.library.table(key, model).problems,
            has_page=has_page,
            sorted_by=sorted_by,
            paged=lambda number: same_query(page=number),
            drawn=self.library.drawn_map(key, model, layer, address, cached=not self.static),
            details_at="" if self.static else f"/api{links.to('r', key, 'map', model, layer)}",
            details=as_data(self.library.map_details(key, model, layer)) if self.static else "",
            map_state=self._no_map(key),
        )

    def neuron(self, view: NeuronView) -> str:
        """Return the page of one neuron."""
        key, model, layer = view.run, view.model, view.layer
        here = ("r", key, "neuron", model, str(layer), view.name)
        links = self._links(here)

        def has_page(number: int, of: str = model, at: int = layer) -> bool:
            return self.paged(key, of, at, number)

        other = "fit" if view.split == "held_out" else "held_out"
        split = "" if view.split == "held_out" else view.split
        up = links.to("r", key, "layer", model, layer)
        api = f"/api{links.to(*here)}" if not self.static else ""
        usual = view.explanations[0].explainer if view.explanations else ""
        simulator = "" if view.explainer == usual else view.explainer
        simulators = [
            (e.explainer, links.to(*here, split=split, explainer=e.explainer))
            for e in view.explanations
            if e.explainer in SIMULATORS and not e.set_name and e.explainer != view.explainer
        ]
        return self._page(
            "neuron.html",
            here,
            self._crumbs(
                links, key, (model, ""), (f"layer {layer}", up), (f"neuron {view.name}", "")
            ),
            key,
            v=view,
            others=self._others(key, model),
            has_page=has_page,
            facts=_facts(view),
            last_token=_last_token(view),
            histogram=drawings.histogram,
            excerpts=excerpts_html(view.excerpts),
            **self._other_end(view),
            more=links.to(*here, split=split, explainer=simulator, all=1),
            other_split=links.to(
                *here, split=other if other != "held_out" else "", explainer=simulator
            ),
            index_state=self._index_state(
                key,
                "Nearest neurons",
                "None: the neuron fires on no token that occurs at least twice.",
            ),
            effects=self.library.effects_command(key, model),
            api=api,
            svg=f"{api}/card.svg",
            simulators=simulators,
            latex=latex_figure(view),
            data=as_data(plain(view)) if self.static else "",
            card=as_data({"svg": svg_card(view), "name": f"{model}-{layer}-{view.name}.png"}),
        )

    def _others(self, key: str, model: str) -> list[str]:
        """Return the models to choose from for a comparison with a model, none in pages without a server.

        There are some where the run has more models than a model, its twin and their null controls.
        """
        card = self.library.run(key)
        trained = [m.name for m in card.models if m.neurons and not m.null_of]
        if self.static or len(trained) < 3:
            return []
        return [m.name for m in card.models if m.neurons and m.name != model]

    def _other_end(self, view: NeuronView) -> dict[str, Any]:
        """Return what the page of an end shows of the neuron's other end; empty values if it has one end."""
        if view.other_end is None:
            return {"other_end": None, "other_facts": [], "other_excerpts": ""}
        other = self.library.neuron(
            view.run, view.model, view.layer, view.other_end, view.split, excerpts="top"
        )
        return {
            "other_end": other,
            "other_facts": _facts(other),
            "other_excerpts": excerpts_html(other.excerpts),
        }

    def search(self, key: str, text: str, token: str, model: str = "") -> str:
        """Return the search form, with the results if anything was searched for."""
        results = None
        if text or token:
            results = self.library.search(
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
            found=results,
            text=text,
            token=token,
            model=model,
            models=models,
            limit=SEARCH_LIMIT,
        )

    def compare(self, key: str, left: str, right: str) -> str:
        """Return two layers or two neurons side by side, each named MODEL/LAYER or MODEL/LAYER/NEURON.

        An empty `right` stands for the counterpart of `left` in the twin, the name of a model for that in this model.
        """
        card = self.library.run(key)
        comparison = compare(self.library, key, left, right)
        links = self._links(("r", key, "compare"))
        layers_of_run = [m.name for m in card.models if m.neurons]
        layers_of_run += [f"{m.name}/{layer}" for m in card.models for layer in m.neurons]
        return self._page(
            "compare.html",
            links.here,
            self._crumbs(links, key, ("compare", "")),
            key,
            comparison=comparison,
            layers_of_run=layers_of_run,
            histogram=drawings.histogram,
            excerpts_html=excerpts_html,
            score_histograms=drawings.score_histograms,
            facts=_facts,
            last_token=_last_token,
        )

    def live_page(self, key: str) -> str:
        """Return the live page, which runs the model."""
        links = self._links(("r", key, "live"))
        card = self.library.run(key)
        models = {m.name: m.neurons for m in card.models if m.neurons}
        ends = {name: has_both_ends(card.model(name).site) for name in models}
        return self._page(
            "live.html",
            links.here,
            self._crumbs(links, key, ("live", "")),
            key,
            models=models,
            data=as_data(
                plain(
                    {
                        "run": key,
                        "models": models,
                        "ends": ends,
                        "missing": self.library.not_explained(key, models),
                    }
                )
            ),
        )

    def error(self, status: int, message: str) -> str:
        """Return the page of an error."""
        return self._page("error.html", (), [], "", status=status, message=message)

    # ---- parts ------------------------------------------------------------------------------------

    def _scores_by_layer(self, run: RunCard, metric: str) -> Markup:
        """Return the curve of scores by layer, drawn once: matplotlib takes 100 times as long as the page."""
        draw = partial(drawings.scores_by_layer, run, metric)
        return self.library.drawing(run.key, ("scores by layer", metric), draw)

    def _featured(self, run: RunCard) -> list[tuple[str, str, Sequence[FeaturedNeuron]]]:
        """Return the neurons to start with by trained model, among those that have a page, and what ranks them."""
        featured = []
        for card in run.models:
            if not card.neurons or card.null_of:
                continue
            with contextlib.suppress(NotFound):  # a damaged harvest, which the model's card reports
                eligible = partial(self.paged, run.key, card.name) if self.static else None
                neurons = self.library.featured(run.key, card.name, eligible)
                measure = ranking(self.library.table(run.key, card.name))[1]
                featured += [(card.name, measure, neurons)] if neurons else []
        return featured

    def _finding(self, run: RunCard) -> tuple[Finding, Markup] | None:
        """Return the finding of a run with its picture; None if nothing is scored."""
        finding = self.library.finding(run.key)
        return (finding, finding_picture(finding)) if finding else None

    def _index_state(self, key: str, content: str, otherwise: str) -> str:
        """Return why `content`, which needs the index, is missing; `otherwise` if the index is ready."""
        state = self.library.index_state(key)
        if state.ready:
            return otherwise
        if state.problem:
            return f"{content} cannot be shown: the index could not be built ({state.problem})."
        progress = f"{state.done} of {state.total} parts are done"
        return f"{content} will appear when the index is built ({progress}): reload the page then."

    def _no_map(self, key: str) -> str:
        problem = self.library.index_state(key).problem
        pending = "The map of this layer is being computed: reload the page in a moment."
        reason = f"The map cannot be drawn ({problem})." if problem else pending
        return self._index_state(key, "The map", reason)

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
                neuron_name=partial(self.library.neuron_name, key),
                **values,
            )
        )


def excerpts_html(excerpts: Sequence[ExcerptView]) -> Markup:
    """Return excerpts grouped by kind, with each token shaded by its true and by its simulated activation."""
    parts: list[str] = []
    for kind, members in groupby(excerpts, key=lambda e: e.kind):
        parts.append(f'<h3>{_KINDS[kind]}</h3><div class="excerpts">')
        for e in members:
            bin_ = f'<span class="bin">bin {e.bin}</span>' if e.bin >= 0 else ""
            sides = [("true", e.true)] + ([("simulated", e.simulated)] if e.simulated else [])
            lines = "".join(
                f'<div class="line {name}" dir="ltr"><span class="side">{name}</span>'
                f"{shaded_html(tokens, e.peak)}</div>"
                for name, tokens in sides
            )
            document = escape(printable(e.document))
            parts.append(f'<div class="excerpt">{bin_}{lines}<p class="from">{document}</p></div>')
        parts.append("</div>")
    return Markup("".join(parts))


def as_data(value: Any) -> Markup:
    """Return JSON for a data block of a page, escaped so that it cannot end the block."""
    data = json.dumps(value, ensure_ascii=True)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return Markup(data)


def _facts(view: NeuronView) -> list[tuple[str, str]]:
    s = view.statistics
    names = {
        "firing_rate": "fires on",
        "maximum": "largest",
        "mean": "mean",
        "variance": "variance",
        "skew": "skew",
        "kurtosis": "kurtosis",
        "n_tokens": "tokens searched",
    }
    facts = []
    for name, label in names.items():
        if name in s:
            value = s[name]
            fact = f"{100 * value:.3g}% of tokens" if name == "firing_rate" else f"{value:.3g}"
            facts.append((label, f"{int(value):,}" if name == "n_tokens" else fact))
    return [*facts, ("site", printable(view.site))]


def _last_token(view: NeuronView) -> list[tuple[str, str]]:
    """Return the figures over all held-out tokens with their labels; none if they were not measured."""
    of = view.last_token
    if of is None:
        return []

    def shown(value: float | None, form: str, unit: str = "") -> str:
        return "–" if value is None else f"{value:{form}}{unit}"

    def percent(share: float | None) -> str:
        return shown(None if share is None else 100 * share, ".1f", "%")

    return [
        ("token share", percent(of.token_share)),
        ("context share", percent(of.context_share)),
        ("token entropy", shown(of.token_entropy, ".2f", " nats")),
        *(
            (f"{printable(explainer)}, correlation × 100", shown(value, ".1f"))
            for explainer, value in of.correlations.items()
        ),
        *(
            (f"{printable(explainer)}, gain over look-up", shown(value, "+.1f"))
            for explainer, value in of.gains.items()
        ),
    ]


def _metrics_of(cards: Sequence[ModelCard], explainer: str = "") -> list[str]:
    """Return the metrics that an explainer, by default each model's own, was scored with."""
    return [m for m in METRIC_NAMES if any(c.metric(m, explainer) for c in cards)]


def _llm_explainers(cards: Sequence[ModelCard]) -> list[str]:
    """Return the explainers that are language models and not the principal explainer of every model."""
    return sorted({e.explainer for c in cards for e in c.by_llm})


def _pairs(card: RunCard) -> list[tuple[ModelCard, ModelCard]]:
    """Return the harvested CRATE models with their twins."""
    trained = [c for c in card.models if c.family == "crate" and c.neurons and not c.null_of]
    return [(c, card.model(twin)) for c in trained if (twin := card.twin(c.name))]


@cache
def _environment() -> jinja2.Environment:
    """Return the templates, compiled once per process."""
    folder = resources.files("cratelm.viewer") / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters["printable"] = lambda text: printable(str(text)) if text else text
    environment.filters["tenth"] = lambda x: f"{round(x, 1) + 0.0:.1f}"
    environment.filters["token"] = _token
    environment.filters["thousands"] = lambda n: "–" if n is None else f"{n:,}"
    return environment


def _token(text: str) -> Markup:
    shown = visible(text)
    # codes such as \xd7 would be reversed within right-to-left letters
    order = ' dir="ltr"' if "\\" in shown else ""
    return Markup(f'<bdi class="token"{order}>{faint_marks(shown)}</bdi>')
