"""The neurons of one model as a table with one row per neuron, sorted by layer and index, and pages of that table.

Memory: about 60 bytes per neuron, 9 bytes per neuron for each explainer and metric, 8 for each figure over all
held-out tokens, and the text of the explanations. Excerpts, payloads and lists of documents are not read. 36,864
neurons with two explainers take about 20 MB.

Shape legend: n neurons of a model, e neurons that are looked up in the table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cratelm.activations.store import summaries_path
from cratelm.explain.phrases import NEARLY
from cratelm.records import METRICS, NeuronKey, has_both_ends, neuron_name
from cratelm.results.sparsity import dead_rows
from cratelm.results.stages import Problems, principal_explainer, set_names
from cratelm.results.views import LastToken, LayerPage, LayerQuery, NeuronRow
from cratelm.runs import Run, Stage
from cratelm.runs.names import set_name
from cratelm.runs.reading import read_parquet, verified
from cratelm.score.whole_summary import LOOKUP
from cratelm.text.claim import claim

ExplainerKey = tuple[str, str]
"""name of the set (empty without a language model) and explainer"""
CONCEPTS = "concepts"
"""explainer whose claims say what tokens share"""
OnToken = Mapping[NeuronKey, tuple[float, int]]
"""by neuron: mean activation on a token divided by the neuron's maximum, and number of occurrences of the
token"""


@dataclass(frozen=True, eq=False)
class ScoreColumn:
    """Scores of one explainer under one metric."""

    values: NDArray[np.float64]
    """[n] x 100; NaN if there is no score"""
    status: NDArray[np.object_]
    """[n] `defined`, `undefined`, `dead`, `failed`, or empty if the neuron was not selected for scoring"""
    reasons: NDArray[np.object_]
    """[n] why there is no score; empty if there is one"""


@dataclass(frozen=True, eq=False)
class LastTokenColumns:
    """What the last token alone explains of each neuron on all held-out tokens. NaN where there is no figure."""

    token_share: NDArray[np.float64]
    """[n] fraction of the variance"""
    token_entropy: NDArray[np.float64]
    """[n] nats"""
    correlations: Mapping[str, NDArray[np.float64]]
    """[n] by explainer, x 100"""

    @property
    def context_share(self) -> NDArray[np.float64]:
        """Return 1 - the token share, [n]."""
        return 1 - self.token_share

    def row(self, row: int) -> LastToken:
        """Return the figures of one neuron."""
        share = float(self.token_share[row])
        values = {explainer: float(of[row]) for explainer, of in self.correlations.items()}
        look_up = values.get(LOOKUP, np.nan)
        return LastToken(
            token_share=_number(share),
            context_share=_number(1 - share),
            token_entropy=_number(self.token_entropy[row]),
            correlations={e: _number(value) for e, value in values.items()},
            gains={e: _number(value - look_up) for e, value in values.items() if e != LOOKUP},
        )


@dataclass(frozen=True, eq=False)
class NeuronTable:
    """The neurons of one model."""

    site: str
    layer: NDArray[np.int32]
    """[n]"""
    index: NDArray[np.int32]
    """[n]"""
    firing_rate: NDArray[np.float64]
    """[n] fraction of held-out tokens on which the neuron fires"""
    maximum: NDArray[np.float32]
    """[n] largest raw activation on the held-out split"""
    texts: Mapping[ExplainerKey, NDArray[np.object_]]
    """[n] explanations of each explainer, empty if there is none"""
    scores: Mapping[tuple[str, str, str], ScoreColumn]
    """by set, explainer and metric"""
    problems: tuple[str, ...]
    """messages about files that cannot be read, and about stale stages"""
    last_token: LastTokenColumns | None = None
    """None if it was not measured"""
    claims: Mapping[ExplainerKey, NDArray[np.float64]] = field(default_factory=dict)
    """[n] fraction of the variance over the fit excerpts that the claim of each explanation explains, NaN without one; by
    explainers that have such figures"""

    @property
    def has_ends(self) -> bool:
        """Return whether the rows are ends of neurons."""
        return has_both_ends(self.site)

    @cached_property
    def explainers(self) -> tuple[ExplainerKey, ...]:
        """Return all explainers with explanations or scores, the principal one first."""
        keys = {*self.texts, *((s, e) for s, e, _ in self.scores)}
        return tuple(sorted(keys, key=lambda key: (key != self.principal, key)))

    @cached_property
    def principal(self) -> ExplainerKey | None:
        """Return the explainer that tables show; see `principal_explainer`."""
        keys = {*self.texts, *((s, e) for s, e, _ in self.scores)}
        return principal_explainer(keys)

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Return the metrics of the principal explainer, in their usual order."""
        scored = {m for s, e, m in self.scores if (s, e) == self.principal}
        return tuple(m for m in METRICS if m in scored)

    @cached_property
    def explanations(self) -> NDArray[np.object_]:
        """Return the sentence [n] that stands first for each neuron, empty if it has none.

        It is that of the explainer whose claim explains most of the fit excerpts; of concepts, which say what tokens share,
        if it explains nearly as much. Without such figures it is that of the principal explainer.
        """
        texts = self.texts.get(self.principal) if self.principal else None
        found = np.full(len(self.layer), "", object) if texts is None else texts.copy()
        if self.principal not in self.claims:  # none, or a language model's
            return found
        keys = sorted(self.claims, key=lambda key: (key != self.principal, key))
        worth = np.stack([np.nan_to_num(self.claims[key], nan=-1.0) for key in keys])
        worth *= np.array([1 / NEARLY if key[1] == CONCEPTS else 1.0 for key in keys])[:, None]
        best = worth.argmax(0)
        for number, key in enumerate(keys):
            rows = (best == number) & (worth[number] >= 0)
            found[rows] = self.texts[key][rows]
        return found

    def score(self, metric: str) -> ScoreColumn | None:
        """Return the scores of the principal explainer under a metric; None if it has none."""
        return self.scores.get((*self.principal, metric)) if self.principal else None

    def best_score(self) -> ScoreColumn | None:
        """Return the scores under the first metric, which ranks the neurons; None without scores."""
        return self.score(self.metrics[0]) if self.metrics else None

    def rows_of(self, layer: int) -> slice:
        """Return the rows of a layer."""
        low, high = np.searchsorted(self.layer, [layer, layer + 1])
        return slice(int(low), int(high))

    def rows(self, layers: NDArray[Any], indices: NDArray[Any]) -> NDArray[np.int64]:
        """Return the rows [e] of many neurons; -1 for a neuron that is not in the table."""
        rows, in_table = _lookup(layers, indices, _packed(self.layer, self.index))
        return np.where(in_table, rows, -1)

    def row(self, layer: int, index: int) -> int | None:
        """Return the row of a neuron; None if it is not in the table."""
        here = self.rows_of(layer)
        row = here.start + int(np.searchsorted(self.index[here], index))
        return row if row < here.stop and self.index[row] == index else None

    def containing(self, text: str, among: Sequence[int] | None = None) -> NDArray[np.int64]:
        """Return the rows whose explanation contains every word of `text`, ignoring case.

        `among` restricts the search to these rows; None searches all rows.
        """
        folded = self._folded
        rows = [r for r in (range(len(folded)) if among is None else among) if folded[r]]
        for word in text.casefold().split():
            rows = [r for r in rows if word in folded[r]]
        return np.array(rows, np.int64)

    @cached_property
    def _folded(self) -> list[str]:
        return [str(text).casefold() for text in self.explanations]


# ---- reading --------------------------------------------------------------------------------------


def read_neuron_table(run: Run, model: str) -> NeuronTable:
    """Return the neurons of a harvested model. `problems` reports explanations and scores that are damaged.

    Raises one of `READ_ERRORS` if the summaries of the held-out split cannot be read.
    """
    table = read_parquet(
        summaries_path(run.stage("activations", model).path, "held_out"),
        columns=["site", "layer", "index", "firing_rate", "maximum"],
    )
    layer, index = table["layer"].to_numpy(), table["index"].to_numpy()
    keys = _packed(layer, index)
    texts: dict[ExplainerKey, Any] = {}
    claims: dict[ExplainerKey, NDArray[np.float64]] = {}
    scores: dict[tuple[str, str, str], ScoreColumn] = {}
    problems = Problems(run.stale_lines(model))
    for name in ["", *set_names(run, model)]:
        explained = run.stage("explanations", set_name(model, name))
        scored = run.stage("scores", set_name(model, name))
        read_texts = partial(_read_finished, explained, _texts, keys)
        read_scores = partial(_read_finished, scored, _scores, keys)
        text_columns = problems.attempt(f"{explained.path} cannot be read", read_texts, {})
        for explainer, (column, of_claim) in text_columns.items():
            texts[name, explainer] = column
            if np.isfinite(of_claim).any():
                claims[name, explainer] = of_claim
        score_columns = problems.attempt(f"{scored.path} cannot be read", read_scores, {})
        scores |= {(name, *key): column for key, column in score_columns.items()}
    scored = run.stage("scores", model)
    read_last_token = partial(_last_token, scored, keys)
    label = f"token shares in {scored.path} cannot be read"
    last_token = problems.attempt(label, read_last_token, None)
    return NeuronTable(
        site=str(table["site"][0]) if len(table) else "",
        layer=layer,
        index=index,
        firing_rate=table["firing_rate"].to_numpy(),
        maximum=table["maximum"].to_numpy(),
        texts=texts,
        scores=scores,
        problems=tuple(problems.lines),
        last_token=last_token,
        claims=claims,
    )


def _read_finished(
    stage: Stage, read: Callable[[Path, NDArray[np.int64]], dict], keys: NDArray[np.int64]
) -> dict:
    return {} if stage.completion() is None else read(stage.path, keys)


def _texts(
    folder: Path, keys: NDArray[np.int64]
) -> dict[str, tuple[NDArray[np.object_], NDArray[np.float64]]]:
    """Return sentences and what their claims explain [n], by explainer."""
    path = folder / "explanations.parquet"
    columns = ["layer", "index", "explainer", "text"]
    if "claim_variance" in pq.read_schema(verified(path)).names:  # absent in version 0.1.0
        columns.append("claim_variance")
    table = read_parquet(path, columns=columns)
    by_explainer = {}
    explainers = table["explainer"].to_numpy()
    for explainer in np.unique(explainers.astype(str)).tolist():
        part = table.filter(pa.array(explainers == explainer))
        rows, in_keys = _rows(part, keys)
        column = np.full(len(keys), "", object)
        column[rows] = part["text"].to_numpy()[in_keys]
        of_claim = np.full(len(keys), np.nan)
        if "claim_variance" in columns:
            of_claim = _spread(part, "claim_variance", keys)
        by_explainer[explainer] = column, of_claim
    return by_explainer


def _scores(folder: Path, keys: NDArray[np.int64]) -> dict[tuple[str, str], ScoreColumn]:
    columns = ["layer", "index", "explainer", "metric", "value", "status", "reason"]
    table = read_parquet(
        folder / "scores.parquet", columns=columns, filters=[("control", "=", "none")]
    )
    by_metric = {}
    explainers, metrics = (table[c].to_numpy() for c in ("explainer", "metric"))
    usual = {m: i for i, m in enumerate(METRICS)}
    pairs = set(zip(explainers, metrics, strict=True))
    for explainer, metric in sorted(pairs, key=lambda p: (p[0], usual.get(p[1], len(usual)), p)):
        part = table.filter(pa.array((explainers == explainer) & (metrics == metric)))
        rows, in_keys = _rows(part, keys)
        values = np.full(len(keys), np.nan)
        status, reasons = np.full(len(keys), "", object), np.full(len(keys), "", object)
        values[rows] = 100 * part["value"].to_numpy()[in_keys].astype(float)
        status[rows] = part["status"].to_numpy()[in_keys]
        reasons[rows] = part["reason"].to_numpy()[in_keys]
        by_metric[explainer, metric] = ScoreColumn(values, status, reasons)
    return by_metric


def _last_token(stage: Stage, keys: NDArray[np.int64]) -> LastTokenColumns | None:
    """Return the figures over all held-out tokens; None if they were not measured."""
    shares, whole = (stage.path / name for name in ("token_shares.parquet", "all_tokens.parquet"))
    if stage.completion() is None or not verified(shares).is_file():
        return None
    figures = ("token_share", "token_entropy")
    table = read_parquet(shares, columns=["layer", "index", *figures])
    share, entropy = (_spread(table, name, keys) for name in figures)
    columns = ["layer", "index", "explainer", "correlation"]
    scored = read_parquet(whole, columns=columns, filters=[("control", "=", "none")])
    explainers = scored["explainer"].to_numpy()
    correlations = {
        name: 100 * _spread(scored.filter(pa.array(explainers == name)), "correlation", keys)
        for name in np.unique(explainers.astype(str)).tolist()
    }
    return LastTokenColumns(share, entropy, correlations)


def _spread(table: pa.Table, column: str, keys: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the values of a column by neuron [n]; NaN where the table has none."""
    rows, in_keys = _rows(table, keys)
    values = np.full(len(keys), np.nan)
    values[rows] = table[column].to_numpy()[in_keys].astype(float)
    return values


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _packed(layers: NDArray[Any], indices: NDArray[Any]) -> NDArray[np.int64]:
    """Pack layer and index into one integer, so that one binary search can look up many neurons."""
    return layers.astype(np.int64) << 32 | indices


def _rows(table: pa.Table, keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return where the rows of `table` belong among the model's neurons `keys` [n].

    The first array has an entry for each row whose neuron the model has; the second is a mask over all
    rows that selects them.
    """
    rows, in_keys = _lookup(table["layer"].to_numpy(), table["index"].to_numpy(), keys)
    return rows[in_keys], in_keys


def _lookup(
    layers: NDArray[Any], indices: NDArray[Any], keys: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the position [e] of each neuron in the sorted `keys` [n], and a mask [e] of those it contains."""
    wanted = _packed(layers, indices)
    rows = np.searchsorted(keys, wanted).clip(0, max(0, len(keys) - 1))
    in_keys = keys[rows] == wanted if len(keys) else np.zeros(len(wanted), bool)
    return rows, in_keys


# ---- one page of a layer's table ------------------------------------------------------------------

_LAST_TOKEN = ("token_share", "context_share", "token_entropy")
"""columns of `LastTokenColumns` by which a page can be sorted"""


def layer_page(
    model: str,
    layer: int,
    table: NeuronTable,
    query: LayerQuery,
    on_token: OnToken | None,
    note: str,
) -> LayerPage:
    """Return the page that `query` asks for.

    `on_token` holds the neurons that fire on the token searched for; None if no token was searched for.
    """
    query = _with_order(query, table, on_token is not None)
    here = table.rows_of(layer)
    rows = _matching(np.arange(here.start, here.stop), table, query)
    if on_token is not None:
        rows = np.array([r for r in rows if (layer, int(table.index[r])) in on_token], int)
    rows = _sorted(rows, layer, table, query, on_token)
    first = (max(1, query.page) - 1) * query.per_page
    on_page = rows[first : first + query.per_page].tolist()
    return LayerPage(
        model=model,
        layer=layer,
        rows=tuple(map(partial(_row, layer=layer, table=table, on_token=on_token), on_page)),
        total=len(rows),
        n_neurons=here.stop - here.start,
        query=query,
        metrics=table.metrics,
        explainer=table.principal[1] if table.principal else "",
        note=note,
        has_last_token=table.last_token is not None,
        has_ends=table.has_ends,
    )


def _with_order(query: LayerQuery, table: NeuronTable, by_token: bool) -> LayerQuery:
    """Fill in the default order: by the token searched for, else by the first metric, else by index."""
    if query.sort:
        return query
    best = "token" if by_token else next(iter(table.metrics), "index")
    return replace(query, sort=best, descending=best != "index")


def _matching(rows: NDArray[np.int64], table: NeuronTable, query: LayerQuery) -> NDArray[np.int64]:
    if query.only in ("dead", "alive"):
        dead = dead_rows(table.maximum, has_ends=table.has_ends)
        rows = rows[dead[rows] == (query.only == "dead")]
    if query.only == "explained" or query.text.strip():
        return table.containing(query.text, rows.tolist())
    return rows


def _sorted(
    rows: NDArray[np.int64],
    layer: int,
    table: NeuronTable,
    query: LayerQuery,
    on_token: OnToken | None,
) -> NDArray[np.int64]:
    """Sort rows as the query says; rows without a value come last in either direction, ties by index."""
    if query.sort == "token" and on_token is not None:
        values = np.array([on_token[NeuronKey(layer, int(table.index[r]))][0] for r in rows], float)
    elif query.sort in ("firing_rate", "maximum"):
        values = getattr(table, query.sort)[rows].astype(float)
    elif query.sort in _LAST_TOKEN and table.last_token is not None:
        values = getattr(table.last_token, query.sort)[rows]
    else:
        column = table.score(query.sort)
        values = table.index[rows].astype(float) if column is None else column.values[rows]
    order = np.lexsort((rows, -values if query.descending else values, np.isnan(values)))
    return rows[order]


def _row(row: int, *, layer: int, table: NeuronTable, on_token: OnToken | None) -> NeuronRow:
    index = int(table.index[row])
    scores = {m: c for m in table.metrics if (c := table.score(m)) is not None}
    return NeuronRow(
        index=index,
        explanation=claim(str(table.explanations[row])),
        scores={m: _number(c.values[row]) for m, c in scores.items()},
        status={m: str(c.status[row]) for m, c in scores.items()},
        firing_rate=float(table.firing_rate[row]),
        maximum=float(table.maximum[row]),
        on_token=on_token[NeuronKey(layer, index)][0] if on_token else None,
        last_token=table.last_token.row(row) if table.last_token else None,
        name=neuron_name(index, table.site),
        # the rows of both ends are next to each other, from an even row on
        dead=bool(table.maximum[row] <= 0 and (not table.has_ends or table.maximum[row ^ 1] <= 0)),
    )
