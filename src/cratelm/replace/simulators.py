"""Explanations of all neurons as a file, from which they can be simulated again without the fit tokens.

`explanations.safetensors` has the arrays of each explainer, layer and stacked part, and in its metadata under `parts` a
JSON list that says what they are. Explanations of more than `MOST` values are not written: the tables of all contexts
of a large text take gigabytes, and the same command makes them again.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from cratelm.errors import InputError
from cratelm.explain.concepts.features import ConceptReader
from cratelm.explain.concepts.library import Library
from cratelm.replace.concepts import ByConcept
from cratelm.replace.contexts import Contexts
from cratelm.replace.predictors import ByContext, Predictor, Stacked
from cratelm.replace.tables import Tables, Tries
from cratelm.runs.reading import reading

FILE = "explanations.safetensors"
MOST = 2**24
"""values of one explainer: 64 MiB"""


def write_simulators(folder: Path, explained: Mapping[str, Sequence[Predictor]]) -> list[str]:
    """Write the explanations that are small enough, by explainer and place, and return their explainers."""
    arrays: dict[str, NDArray] = {}
    parts: list[dict[str, Any]] = []
    written = []
    for explainer, predictors in explained.items():
        if sum(p.n_values for p in predictors) > MOST:
            continue
        written.append(explainer)
        for place, predictor in enumerate(predictors):
            stacked = predictor.parts if isinstance(predictor, Stacked) else [predictor]
            for number, part in enumerate(stacked):
                key = f"{len(parts)}"
                kind, of_part, bounds = _arrays(part)
                arrays |= {f"{key}.{name}": array for name, array in of_part.items()}
                described = {
                    "key": key, "explainer": explainer, "place": place, "part": number,
                    "kind": kind, "bounds": bounds,
                }  # fmt: skip
                if isinstance(part, ByConcept):
                    names = ("terms", "operators")
                    described["formulas"] = [{n: of[n] for n in names} for of in part.payloads]
                parts.append(described)
    save_file(arrays, folder / FILE, {"parts": json.dumps(parts)})
    return written


def _arrays(part: Predictor) -> tuple[str, dict[str, NDArray], list[int]]:
    if isinstance(part, ByConcept):
        library = np.frombuffer(part.reader.library.as_json().encode(), np.uint8)
        found = {"means": part.means, "default": part.default, "library": library}
        return "concepts", found, []
    assert isinstance(part, ByContext)
    contexts = part.tables.contexts
    shared = {
        "tokens": contexts.tokens.astype(np.int32),
        "parents": contexts.parents.astype(np.int32),
    }
    if isinstance(part.tables, Tables):
        return "tables", shared | {"values": part.tables.values}, list(contexts.bounds)
    rise = part.tables.rise
    sparse = {
        "default": part.tables.default,
        "rise": rise.data.astype(np.float32),
        "columns": rise.indices.astype(np.int32),
        "rows": rise.indptr.astype(np.int32),
    }
    return "tries", shared | sparse, list(contexts.bounds)


def read_simulators(
    folder: str | Path, explainer: str, token_strings: Sequence[str]
) -> list[Predictor]:
    """Return the explanations of an explainer by place; `token_strings` [V] is the text of each token id.

    Raises `InputError` if the file has none of it, or is damaged.
    """
    path = Path(folder) / FILE
    with (
        reading(path, "explanations that `cratelm replace` wrote") as sound,
        safe_open(sound, "numpy") as file,
    ):
        parts = json.loads((file.metadata() or {})["parts"])
        by_place: dict[int, list[Predictor]] = {}
        for part in parts:
            if part["explainer"] == explainer:
                by_place.setdefault(part["place"], []).append(
                    _predictor(file, part, token_strings, str(path))
                )
    if not by_place:
        names = sorted({part["explainer"] for part in parts})
        raise InputError(
            f"{path} has no explanations by {explainer!r}: name one of {', '.join(names) or '(none)'}"
        )
    return [of[0] if len(of) == 1 else Stacked(of) for _, of in sorted(by_place.items())]


def _predictor(
    file: Any, part: Mapping[str, Any], token_strings: Sequence[str], path: str
) -> Predictor:
    from scipy.sparse import csr_array  # takes a quarter of a second

    def array(name: str) -> NDArray:
        return file.get_tensor(f"{part['key']}.{name}")

    if part["kind"] == "concepts":
        library = Library.from_json(array("library").tobytes().decode(), path)
        reader = ConceptReader(library, token_strings)
        return ByConcept(part["formulas"], array("means"), array("default"), reader)
    tokens, parents = (array(name).astype(np.int64) for name in ("tokens", "parents"))
    contexts = Contexts(tokens, parents, np.zeros_like(tokens), tuple(part["bounds"]))
    if part["kind"] == "tables":
        return ByContext(Tables(contexts, array("values")))
    default = array("default")
    rise = (array("rise").astype(np.float64), array("columns"), array("rows"))
    return ByContext(Tries(contexts, default, csr_array(rise, shape=(len(contexts), len(default)))))
