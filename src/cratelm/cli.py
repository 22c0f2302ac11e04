"""The command line: a table of verbs, one a stage; each is also a Python function of the same name.

A verb is a configuration dataclass, which is its `--help`, and a function of it. A verb of two words,
`import records`, is a kind of the first and the function `import_records`. A failure prints one line
and exits with a status other than 0; `CRATELM_TRACEBACK=1` shows where it came from.
"""

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from cratelm.errors import BudgetReached, InputError


@dataclass(frozen=True)
class Verb:
    """Where a verb's configuration and function are found; nothing is imported before it is used."""

    module: str
    """module of the function, which is called as the verb"""
    config: str
    """`module:Class` of its configuration"""
    summary: str


VERBS: dict[str, Verb] = {
    "demo": Verb(
        "cratelm.pipelines.demo",
        "cratelm.pipelines.demo_config:DemoConfig",
        "the whole line on a small scale: train twins, harvest, explain, score, report",
    ),
    "tokenize": Verb(
        "cratelm.tokens.tokenize",
        "cratelm.tokens.config:TokenizeConfig",
        "documents -> token shards with document borders",
    ),
    "train": Verb(
        "cratelm.train.loop", "cratelm.train.config:TrainConfig", "train a model on the shards"
    ),
    "evaluate": Verb(
        "cratelm.evaluate.evaluate",
        "cratelm.evaluate.config:EvaluateConfig",
        "loss, perplexity and accuracy of models on the shards and on named sets",
    ),
    "predict": Verb(
        "cratelm.evaluate.predict",
        "cratelm.evaluate.config:PredictConfig",
        "next-token predictions of models on the same text, as a page",
    ),
    "harvest": Verb(
        "cratelm.activations.harvest",
        "cratelm.activations.config:HarvestConfig",
        "excerpts and statistics of every neuron",
    ),
    "explain": Verb(
        "cratelm.explain.explain",
        "cratelm.explain.config:ExplainConfig",
        "explain each neuron from its excerpts",
    ),
    "score": Verb(
        "cratelm.score.score",
        "cratelm.score.config:ScoreConfig",
        "score the explanations on held-out excerpts",
    ),
    "report": Verb(
        "cratelm.report.report",
        "cratelm.report.config:ReportConfig",
        "one page, tables and figures about a run",
    ),
    "view": Verb(
        "cratelm.viewer.view",
        "cratelm.viewer.config:ViewConfig",
        "browse neurons in a web browser, or write the pages into a folder",
    ),
    "analyze": Verb(
        "cratelm.analysis.analyze",
        "cratelm.analysis.config:AnalyzeConfig",
        "what CRATE's derivation promises, measured layer by layer",
    ),
    "steer": Verb(
        "cratelm.steer.steer",
        "cratelm.steer.config:SteerConfig",
        "set, add, scale or zero neurons; see the next token and the continuation change",
    ),
    "effects": Verb(
        "cratelm.steer.effects",
        "cratelm.steer.config:EffectsConfig",
        "what each neuron writes to the vocabulary, and the loss without it",
    ),
    "intervene": Verb(
        "cratelm.steer.intervene",
        "cratelm.steer.config:InterveneConfig",
        "does steering change the text as the explanation says? asked of a language model",
    ),
    "sae train": Verb(
        "cratelm.sae.train",
        "cratelm.sae.train_config:SaeTrainConfig",
        "sparse autoencoders on a site of a model, with SAELens underneath",
    ),
    "sae evaluate": Verb(
        "cratelm.sae.evaluate",
        "cratelm.sae.evaluate_config:SaeEvaluateConfig",
        "what autoencoders keep of the activations and of the loss, beside the site's own code",
    ),
    "sae compare": Verb(
        "cratelm.pipelines.sae_compare",
        "cratelm.pipelines.sae_compare_config:SaeCompareConfig",
        "neurons beside latents: all of it in one command, from training to the report",
    ),
    "import authors": Verb(
        "cratelm.interop.import_authors",
        "cratelm.interop.import_authors_config:ImportAuthorsConfig",
        "a checkpoint of the paper's authors as a Hugging Face folder",
    ),
    "import sae": Verb(
        "cratelm.interop.import_sae",
        "cratelm.interop.import_sae_config:ImportSaeConfig",
        "a sparse autoencoder of the paper's authors as a folder",
    ),
    "import records": Verb(
        "cratelm.interop.import_records",
        "cratelm.interop.import_records_config:ImportRecordsConfig",
        "a run of activations harvested elsewhere, from OpenAI's NeuronRecord JSON",
    ),
    "export model": Verb(
        "cratelm.interop.export_model",
        "cratelm.interop.export_model_config:ExportModelConfig",
        "a folder that transformers loads without cratelm, ready for the Hub",
    ),
    "export records": Verb(
        "cratelm.interop.export_records",
        "cratelm.interop.export_config:ExportRecordsConfig",
        "excerpts of a harvest as OpenAI's NeuronRecord JSON",
    ),
    "export neuronpedia": Verb(
        "cratelm.interop.neuronpedia",
        "cratelm.interop.export_config:ExportNeuronpediaConfig",
        "neurons, excerpts, explanations and scores in Neuronpedia's export format",
    ),
}


def function_name(verb: str) -> str:
    """Name of the verb as a Python function."""
    return verb.replace(" ", "_")


def config_class(verb: str) -> type:
    """The configuration dataclass of a verb."""
    module, name = VERBS[verb].config.split(":")
    return getattr(importlib.import_module(module), name)


def verb_function(verb: str) -> Callable[..., Any]:
    """The verb as a Python function: `train(run="runs/x", steps=100)`, arguments as on the command line."""
    config = config_class(verb)

    def call(**fields: Any) -> Any:
        return _run(verb, config(**_with_paths(config, fields)))

    call.__name__ = call.__qualname__ = function_name(verb)
    call.__doc__ = f"{config.__doc__}\n\nArguments are the fields of `{config.__name__}`."
    parameters = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for p in inspect.signature(config).parameters.values()
    ]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def _with_paths(config: type, fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` with a `Path` wherever the configuration takes one and a string was given."""
    hints = get_type_hints(config)

    def converted(name: str, value: Any) -> Any:
        hint, one = hints.get(name), isinstance(value, str | Path)
        if get_origin(hint) is tuple and Path in get_args(hint):
            return tuple(map(Path, [value] if one else value))
        return Path(value) if one and Path in (hint, *get_args(hint)) else value

    return {name: converted(name, value) for name, value in fields.items()}


def _run(verb: str, config: Any) -> Any:
    return getattr(importlib.import_module(VERBS[verb].module), function_name(verb))(config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `cratelm`; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0 if given else 2
    if given[0] == "--version":
        from importlib.metadata import version

        print(version("cratelm"))
        return 0
    verb, rest = split_words(given)
    if verb in _groups():
        asked = not rest or rest[0] in ("-h", "--help")
        if asked:
            print(_overview(verb))
            return 0 if rest else 2
        return _fail(verb, _unknown("kind", rest[0], _groups()[verb]), 2)
    if verb not in VERBS:
        return _fail("", _unknown("verb", verb, _words()), 2)
    try:
        print(_told(_run(verb, _parse(verb, rest))))
    except KeyboardInterrupt:
        return _fail(verb, "interrupted; the same command goes on where it was", 130)
    except BrokenPipeError:  # whoever reads what is printed (`| head`) has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("CRATELM_TRACEBACK"):
            raise
        return _fail(verb, *_explained(error))
    return 0


def split_words(given: Sequence[str]) -> tuple[str, list[str]]:
    """The verb, of one word or two, and its arguments; the first word where they name no verb."""
    two = " ".join(given[:2])
    return (two, list(given[2:])) if two in VERBS else (given[0], list(given[1:]))


def _groups() -> dict[str, list[str]]:
    """Kinds of each first word of the verbs of two words."""
    groups: dict[str, list[str]] = {}
    for first, _, second in (verb.partition(" ") for verb in VERBS):
        if second:
            groups.setdefault(first, []).append(second)
    return groups


def _words() -> list[str]:
    """First words of all verbs, in the order of the table."""
    return list(dict.fromkeys(verb.split()[0] for verb in VERBS))


def _unknown(what: str, found: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(found, choices, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"there is no {what} {found!r}: {hint}{what.capitalize()}s are {', '.join(choices)}"


def _parse(verb: str, arguments: list[str]) -> Any:
    """The configuration that the arguments give. Prints `--help` and exits where it is asked for."""
    import tyro

    caught = io.StringIO()
    try:
        with contextlib.redirect_stderr(caught):
            return tyro.cli(config_class(verb), prog=f"cratelm {verb}", args=arguments)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(_one_line(caught.getvalue(), verb)) from None


def _one_line(box: str, verb: str) -> str:
    """The parser draws its errors as a box of a title and blocks; this is the first block, as one line."""
    blocks: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        text = line.strip("│|╭╮╰╯ ")
        if set(text) <= {"─", "-"}:
            blocks.append([])
        else:
            blocks[-1].append(text)
    told, *others = [" ".join(block) for block in blocks if block] or [box.strip()]
    told = re.sub(r"^Error parsing \w+: (?=--)", "", told)
    near = re.search(r"Perhaps you meant:\s*(--[\w-]+)", " ".join(others))
    hint = f"; did you mean {near.group(1)}?" if near else ""
    return f"{told}{hint} (`cratelm {verb} --help` lists the options)"


def _explained(error: Exception) -> tuple[str, int]:
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, BudgetReached):
        return str(error), 3
    told = " ".join(str(error).split())[:300]
    hint = "CRATELM_TRACEBACK=1 shows where"
    return f"{type(error).__name__}: {told} ({hint})", 1


def _fail(verb: str, message: str, status: int) -> int:
    print(f"cratelm {verb}: {message}".replace(" :", ":"), file=sys.stderr)
    return status


def _told(result: Any) -> str:
    """A result as text: its own words, or a line a field."""
    if type(result).__str__ is not object.__str__ or not dataclasses.is_dataclass(result):
        return str(result)
    rows = [(f.name.replace("_", " "), getattr(result, f.name)) for f in dataclasses.fields(result)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {_value(value)}" for name, value in rows if value != "")


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items())
    if isinstance(value, tuple):
        return ", ".join(_value(v) for v in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _overview(first: str = "") -> str:
    """All verbs, or the kinds of a first word."""
    told = {
        v: found.summary for v, found in VERBS.items() if not first or v.startswith(f"{first} ")
    }
    width = max(map(len, told))
    return "\n".join(
        [
            f"usage: cratelm {f'{first} KIND' if first else 'VERB'} [OPTIONS]",
            "",
            "White-box language models whose neurons can be read: train, measure, compare.",
            "",
            *(f"  {name:<{width}}  {summary}" for name, summary in told.items()),
            "",
            f"`cratelm {first or 'VERB'}{' KIND' if first else ''} --help` lists the options."
            + ("" if first else " Start with `cratelm demo`."),
        ]
    )
