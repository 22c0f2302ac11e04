"""Recipes of `cratelm study`: a YAML file that names a grid of models and the options of the stages.

```yaml
question: Are CRATE's neurons easier to explain than those of GPT-2?
families: [crate, gpt2]
sizes: [1l, 2l, 3l]
seeds: [0, 1, 2]
controls: [init]                 # null controls of the first seed of each family and size
rates: {crate: 0.015}            # peak learning rates by family; others have that of `train`
switches:                        # models that differ from a family in options of `train`
  frozen: {families: [crate], train: {freeze: [dictionary]}}
equal_flops: gpt2                # the other families also trained for as many FLOPs as this one
stages:                          # in this order; those after `train` may be absent
  tokenize: {vocab_size: 4096}
  tune: {steps: 100}             # the same search of a rate for each family and size that has none in `rates`
  train: {steps: 1500}
  harvest: {tokens: 200000}
  explain: {neurons: 64}         # a list of several, if language models explain too
  score: {}
  replace: {}
  analyze: {}
  seeds: {}                      # of every model with two seeds
```

The options of a stage are those of its verb, with underscores. `run`, `model`, `name`, `seed`, `force` and `quiet` come
from the grid and the command line.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cratelm.activations.config import HarvestConfig
from cratelm.analysis.config import AnalyzeConfig
from cratelm.analysis.seeds_config import SeedsConfig
from cratelm.errors import InputError, one_line
from cratelm.explain.config import ExplainConfig
from cratelm.models import SIZES
from cratelm.models.families import FAMILIES, import_outside_families
from cratelm.replace.config import ReplaceConfig
from cratelm.runs import StageName
from cratelm.runs.names import NULLS, NullKind, check_name, seeded_name, untrained_name
from cratelm.score.config import ScoreConfig
from cratelm.tokens.config import TokenizeConfig
from cratelm.train.config import TrainConfig
from cratelm.train.tune_config import TuneConfig

_Config = TypeVar("_Config")
STAGES: dict[str, type] = {
    "tokenize": TokenizeConfig,
    "tune": TuneConfig,
    "train": TrainConfig,
    "harvest": HarvestConfig,
    "explain": ExplainConfig,
    "score": ScoreConfig,
    "replace": ReplaceConfig,
    "analyze": AnalyzeConfig,
    "seeds": SeedsConfig,
}
"""configuration of each stage of a recipe, in the order in which they run"""
FOLDERS: dict[str, StageName] = {
    "train": "model",
    "harvest": "activations",
    "explain": "explanations",
    "score": "scores",
    "replace": "replacement",
    "analyze": "analysis",
}
"""folder in the run of each stage of one model"""
SEVERAL = ("explain", "score", "replace")
"""stages that a recipe may give several times: once without a language model, and with one"""
CONTROLLED = ("train", "harvest", "explain", "score")
"""stages of null controls"""
_OF_THE_GRID = ("run", "model", "name", "force", "quiet", "null", "device", "tuned")
"""options that a recipe cannot give: the grid or the command line decides them"""
EQUAL_FLOPS = "equal-flops"
"""part of the name of models that are trained for as many FLOPs as another family"""


@dataclass(frozen=True)
class Switch:
    """Models that differ from their family in options of `train`."""

    name: str
    families: tuple[str, ...]
    sizes: tuple[str, ...]
    train: Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One model of the grid."""

    family: str
    size: str
    seed: int = 0
    switch: str = ""
    """name of the switch; empty for the plain family"""
    budget: str = ""
    """family whose FLOPs it is trained for; empty for as many tokens as all have"""
    control: NullKind | None = None
    """kind of null control; None for a model that is trained"""
    train: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """options of `train` that differ from those of the recipe"""

    @property
    def architecture(self) -> str:
        """Return FAMILY-SIZE, as `train --model` takes it."""
        return f"{self.family}-{self.size}"

    @property
    def base(self) -> str:
        """Return the name of the model with seed 0 that is not a control, such as crate-2l-frozen."""
        parts = (self.architecture, self.switch, EQUAL_FLOPS if self.budget else "")
        return "-".join(part for part in parts if part)

    @property
    def name(self) -> str:
        """Return the name of the model's folder in the run."""
        name = seeded_name(self.base, self.seed)
        return untrained_name(name, self.control) if self.control else name


@dataclass(frozen=True)
class Recipe:
    """What a recipe says; several recipes of one command are joined."""

    names: tuple[str, ...]
    """names of the files, without `.yaml`"""
    questions: tuple[str, ...]
    cells: tuple[Cell, ...]
    """in the order in which they are made: seed after seed"""
    stages: Mapping[str, tuple[Mapping[str, Any], ...]]
    """options of each stage"""

    @property
    def name(self) -> str:
        """Return the name of the study, `laptop` or `laptop+frontier`."""
        return "+".join(self.names)

    def options(self, stage: str) -> Mapping[str, Any]:
        """Return the options of a stage that is given once, or of the first; empty if it is absent."""
        return next(iter(self.stages.get(stage, ())), {})

    def stages_of(self, cell: Cell) -> tuple[str, ...]:
        """Return the names of the stages that a model passes through, in order."""
        of_models = [s for s in self.stages if s not in ("tokenize", "tune", "seeds")]
        return tuple(s for s in of_models if not cell.control or s in CONTROLLED)

    def seeded(self) -> dict[str, list[Cell]]:
        """Return the models of which there are two or more seeds, by the name of the first, controls left out."""
        groups: dict[str, list[Cell]] = {}
        for cell in self.cells:
            if not cell.control:
                groups.setdefault(cell.base, []).append(cell)
        return {base: cells for base, cells in groups.items() if len(cells) > 1}

    def tuned(self) -> list[Cell]:
        """Return the plain models whose rate is searched, one for each family and size: those of the lowest seed."""
        if "tune" not in self.stages:
            return []
        plain = [c for c in self.cells if not (c.control or c.switch or c.budget)]
        found: dict[str, Cell] = {}
        for cell in plain:
            if "learning_rate" not in {**self.options("train"), **cell.train}:
                found.setdefault(cell.architecture, cell)
        return list(found.values())

    def with_corpus(self, corpus: str | None) -> "Recipe":
        """Return the recipe with another corpus; the same one for None."""
        if corpus is None:
            return self
        return replace(
            self,
            stages={**self.stages, "tokenize": ({**self.options("tokenize"), "corpus": corpus},)},
        )

    def steps(self, cell: Cell, flops: Mapping[str, float]) -> int:
        """Return the number of training steps of a model.

        `flops` are those of a forward pass per token, by name; only models trained for equal FLOPs need them.
        """
        plain = train_config(self, cell, Path()).resolved().steps
        if not cell.budget or not plain:
            return plain
        return max(1, round(plain * flops[f"{cell.budget}-{cell.size}"] / flops[cell.name]))


def own_recipes() -> dict[str, Path]:
    """Return the recipes that come with cratelm, by name."""
    package = Path(__file__).parents[1]
    # of an installed package, or of a checkout of the repository
    folders = (package / "recipes", package.parents[1] / "recipes")
    found = (path for folder in folders for path in sorted(folder.glob("*.yaml")))
    return {path.stem: path for path in found}


def _found(path: Path) -> Path:
    """Return the file that is named: itself, or the recipe of cratelm with that name."""
    if path.exists():
        return path
    own = own_recipes()
    if str(path) in own:
        return own[str(path)]
    raise InputError(
        f"there is no recipe {path}: name a YAML file, or one of cratelm's own, {', '.join(own)}"
    )


def read_recipes(named: Sequence[Path]) -> Recipe:
    """Return what the recipes say together: files, or names of cratelm's own, such as `laptop`.

    Raises `InputError`, which names the file and the key, for a recipe that cannot be read, unknown keys, families or
    options, options that their verb refuses, and recipes whose stages differ.
    """
    import_outside_families()
    paths = [_found(path) for path in named]
    read = [_read(path) for path in paths]
    first = read[0]
    for path, other in zip(paths[1:], read[1:], strict=True):
        for stage in STAGES:
            if other.stages.get(stage) != first.stages.get(stage):
                raise InputError(
                    f"{path} and {paths[0]} give stage {stage} different options: recipes of one command share all"
                    " stages; give them different runs, one command each"
                )
    cells: dict[str, Cell] = {}
    for path, recipe in zip(paths, read, strict=True):
        for cell in recipe.cells:
            if cells.setdefault(cell.name, cell) != cell or cells[cell.name].train != cell.train:
                raise InputError(
                    f"{path} trains {cell.name} otherwise than another recipe does: give the switch, or the rate,"
                    " of one of them another name, or the recipes different runs"
                )
    ordered = sorted(cells.values(), key=lambda cell: cell.seed)  # a stable sort: seed after seed
    return Recipe(
        tuple(recipe.names[0] for recipe in read),
        tuple(q for recipe in read for q in recipe.questions),
        tuple(ordered),
        first.stages,
    )


def _read(path: Path) -> Recipe:
    content = _content(path)
    where = _Where(path)
    known = (
        "question",
        "families",
        "sizes",
        "seeds",
        "controls",
        "rates",
        "switches",
        "equal_flops",
        "stages",
    )
    where.check_keys("the recipe", content, known)
    where.check(isinstance(content.get("question", ""), str), "question", "must be text")
    stages = _stages(where, content.get("stages"))
    cells = tuple(_cells(where, content))
    names = [cell.name for cell in cells]
    twice = next((n for n in names if names.count(n) > 1), None)
    where.check(twice is None, "the grid", f"has two models called {twice}: rename a switch")
    question = content.get("question", "")
    recipe = Recipe((path.stem,), (question,) if question else (), cells, stages)
    for cell in recipe.tuned():
        with where.errors("stages.tune"):
            tune_config(recipe, cell, Path("runs/study"))
    for cell in cells:
        for stage in recipe.stages_of(cell):
            list(configs_of(recipe, cell, stage, Path("runs/study"), where=where))
    return recipe


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"the recipe {path} cannot be read ({error.strerror}): name a YAML file, such as recipes/laptop.yaml"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not YAML: {one_line(error, 200)}") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{path} has no keys: a recipe needs families, sizes and stages, as in recipes/laptop.yaml"
        )
    return content


@dataclass(frozen=True)
class _Where:
    """The file that errors name."""

    path: Path

    def check(self, holds: bool, key: str, message: str) -> None:
        if not holds:
            raise InputError(f"{self.path}: {key} {message}")

    def check_keys(self, key: str, mapping: Any, known: Iterable[str]) -> None:
        self.check(isinstance(mapping, dict), key, f"must be keys with values, not {mapping!r:.60}")
        names = tuple(known)
        unknown = next((str(name) for name in mapping if name not in names), None)
        self.check(unknown is None, key, f"has no {unknown!r}: expected {', '.join(names)}")

    @contextlib.contextmanager
    def errors(self, key: str) -> Iterator[None]:
        """Let the error of a configuration name the file and the key."""
        try:
            yield
        except InputError as error:
            raise InputError(f"{self.path}: {key}: {error}") from None

    def words(self, key: str, value: Any, allowed: Iterable[str], what: str) -> tuple[str, ...]:
        """Return a list of different words, each one of those allowed."""
        names = tuple(allowed)
        good = isinstance(value, list) and value and all(isinstance(v, str) for v in value)
        self.check(
            bool(good),
            key,
            f"must be a list of {what}, such as [{', '.join(names[:2])}], not {value!r:.60}",
        )
        unknown = next((v for v in value if v not in names), None)
        self.check(unknown is None, key, f"has {unknown!r}: expected {', '.join(names)}")
        self.check(len(set(value)) == len(value), key, "must name each once")
        return tuple(value)


def _stages(where: _Where, value: Any) -> dict[str, tuple[dict[str, Any], ...]]:
    where.check(value is not None, "the recipe", "lacks `stages`: give at least `train: {}`")
    where.check_keys("stages", value, STAGES)
    stages: dict[str, tuple[dict[str, Any], ...]] = {}
    for stage in STAGES:
        if stage not in value and stage not in ("tokenize", "train"):
            continue
        given = value.get(stage) or {}
        lists = isinstance(given, list) and stage in SEVERAL and given
        options = tuple(of or {} for of in given) if lists else (given,)
        for of in options:
            allowed = (f.name for f in fields(STAGES[stage]) if f.name not in _OF_THE_GRID)
            where.check_keys(f"stages.{stage}", of, allowed)
        stages[stage] = options
    needs = {"explain": "harvest", "score": "explain", "seeds": "harvest"}
    for stage, needed in needs.items():
        where.check(
            stage not in stages or needed in stages,
            "stages",
            f"has {stage} without {needed}: add {needed}",
        )
    return stages


def _cells(where: _Where, content: Mapping[str, Any]) -> Iterator[Cell]:
    layers = tuple(dict.fromkeys(name.rpartition("-")[2] for name in SIZES))
    families = where.words("families", content.get("families"), FAMILIES, "families")
    sizes = where.words("sizes", content.get("sizes"), layers, "sizes")
    seeds = content.get("seeds", [0])
    good = isinstance(seeds, list) and seeds and all(type(s) is int and s >= 0 for s in seeds)
    where.check(
        bool(good) and len(set(seeds)) == len(seeds),
        "seeds",
        f"must be different numbers from 0, such as [0, 1, 2], not {seeds!r:.60}",
    )
    controls = content.get("controls") or []
    if controls:
        where.words("controls", controls, NULLS, "null controls")
    kinds: list[NullKind] = [kind for kind in NULLS if kind in controls]
    rates = content.get("rates") or {}
    where.check_keys("rates", rates, FAMILIES)
    switches = _switches(where, content.get("switches") or {}, families, sizes)
    reference = content.get("equal_flops")
    where.check(
        reference is None or reference in families,
        "equal_flops",
        f"is {reference!r}: name one of the families",
    )
    for seed in seeds:
        for family in families:
            rate = {"learning_rate": rates[family]} if family in rates else {}
            for size in sizes:
                yield Cell(family, size, seed, train=rate)
                if seed == seeds[0]:
                    yield from (Cell(family, size, seed, control=kind) for kind in kinds)
                if reference and family != reference:
                    yield Cell(family, size, seed, budget=reference, train=rate)
        for switch in switches:
            for family in switch.families:
                rate = {"learning_rate": rates[family]} if family in rates else {}
                for size in switch.sizes:
                    yield Cell(family, size, seed, switch.name, train={**rate, **switch.train})


def _switches(
    where: _Where, value: Any, families: tuple[str, ...], sizes: tuple[str, ...]
) -> list[Switch]:
    where.check(
        isinstance(value, dict), "switches", f"must be names with options, not {value!r:.60}"
    )
    switches = []
    for name, of in value.items():
        key = f"switches.{name}"
        check_name(f"{where.path}: the name of a switch", str(name), reserved="@+")
        where.check(
            str(name) != EQUAL_FLOPS,
            key,
            "has the name of models trained for equal FLOPs: rename it",
        )
        where.check_keys(key, of, ("families", "sizes", "train"))
        allowed = (f.name for f in fields(TrainConfig) if f.name not in _OF_THE_GRID)
        where.check_keys(f"{key}.train", of.get("train"), allowed)
        switches.append(
            Switch(
                str(name),
                where.words(
                    f"{key}.families", of.get("families", list(families)), FAMILIES, "families"
                ),
                where.words(f"{key}.sizes", of.get("sizes", list(sizes)), sizes, "sizes"),
                of["train"],
            )
        )
    return switches


def configs_of(
    recipe: Recipe,
    cell: Cell,
    stage: str,
    run: Path,
    *,
    where: _Where | None = None,
    **common: Any,
) -> Iterator[Any]:
    """Yield the configurations of one stage of a model, one for each time that the recipe gives it.

    `common` are options of every stage, such as `force` and `quiet`. Raises `InputError` for options that the verb refuses.
    """
    if stage == "train":
        yield train_config(recipe, cell, run, where=where, **common)
        return
    for options in recipe.stages[stage]:
        kind = STAGES[stage]
        given: dict[str, Any] = {"seed": 0, **options, **common, "run": run, "model": cell.name}
        if cell.control and stage == "explain" and "explainer" not in options:
            given["explainers"] = [
                e
                for e in options.get("explainers", ExplainConfig.explainers)
                if "concepts" not in e
            ] or ["lookup"]
        yield _config(kind, given, where, f"stages.{stage}")


def train_config(
    recipe: Recipe,
    cell: Cell,
    run: Path,
    *,
    steps: int | None = None,
    where: _Where | None = None,
    **common: Any,
) -> TrainConfig:
    """Return the options that train a model of the grid; `steps` in place of those of the recipe."""
    options = {**recipe.options("train"), **cell.train, **common, "run": run, "name": cell.name}
    if cell.control in ("permuted", "embeddings"):
        kept = {"run", "name", "sequence_length", *common}
        options = {k: v for k, v in options.items() if k in kept}
        options |= {"model": seeded_name(cell.base, cell.seed), "null": cell.control}
    else:
        options |= {"model": cell.architecture, "seed": cell.seed}
    if steps is not None:
        options["steps"] = steps
    if cell.control == "init":
        options["steps"] = 0
        options.pop("warmup", None)
    return _config(TrainConfig, options, where, "stages.train")


def tune_config(recipe: Recipe, cell: Cell, run: Path, **common: Any) -> TuneConfig:
    """Return the options that search the rate of a plain model, with those of its training."""
    shared = {f.name for f in fields(TuneConfig)} & {f.name for f in fields(TrainConfig)}
    train = {k: v for k, v in recipe.options("train").items() if k in shared - {"steps"}}
    options = {**train, "seed": cell.seed, **recipe.options("tune"), **common}
    return _config(
        TuneConfig, {**options, "run": run, "model": cell.architecture}, None, "stages.tune"
    )


def tokenize_config(recipe: Recipe, run: Path, **common: Any) -> TokenizeConfig:
    """Return the options of `tokenize`."""
    return _config(
        TokenizeConfig,
        {**recipe.options("tokenize"), **common, "run": run},
        None,
        "stages.tokenize",
    )


def _config(
    kind: type[_Config], options: Mapping[str, Any], where: _Where | None, key: str
) -> _Config:
    """Return a configuration, which checks and converts the values. Errors name the file and the key."""
    if where is None:
        return kind(**options)
    with where.errors(key):
        return kind(**options)
