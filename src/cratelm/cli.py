"""The command line: a table of verbs, most of which run one stage.

A verb is a configuration dataclass, whose fields are its options, and a function of that dataclass.
A verb may have two words: in `import records`, `records` is a kind of `import`. `cratelm.api` offers
the same verbs as Python functions. A failure prints one line and exits with a status other than 0;
with `CRATELM_TRACEBACK=1` it prints the traceback.
"""

import ast
import contextlib
import dataclasses
import difflib
import gc
import importlib
import inspect
import io
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from cratelm.errors import BudgetReached, InputError, one_line


@dataclass(frozen=True)
class Verb:
    """Modules of a verb's configuration and function, which are imported only when they are used."""

    module: str
    """module of the function, which has the verb's name"""
    config: str
    """`module:Class` of its configuration"""
    summary: str
    """what the verb does, as one line of `cratelm --help`"""
    several: bool = False
    """whether several processes that `torchrun` started share its work"""


VERBS: dict[str, Verb] = {
    "demo": Verb(
        "cratelm.pipelines.demo",
        "cratelm.pipelines.config:DemoConfig",
        "run the whole pipeline on a small scale: train twins, harvest, explain, score, report",
    ),
    "tokenize": Verb(
        "cratelm.tokens.tokenize",
        "cratelm.tokens.config:TokenizeConfig",
        "turn documents into token shards with document boundaries",
    ),
    "tune": Verb(
        "cratelm.train.tune",
        "cratelm.train.tune_config:TuneConfig",
        "search the learning rate of a model by short trainings",
    ),
    "train": Verb(
        "cratelm.train.loop",
        "cratelm.train.config:TrainConfig",
        "train a model on the shards",
        several=True,
    ),
    "evaluate": Verb(
        "cratelm.evaluate.evaluate",
        "cratelm.evaluate.config:EvaluateConfig",
        "measure loss, perplexity and accuracy of models on the shards and on named sets",
    ),
    "predict": Verb(
        "cratelm.evaluate.predict",
        "cratelm.evaluate.config:PredictConfig",
        "show next-token predictions of models on the same text, as a page",
    ),
    "probe": Verb(
        "cratelm.probes.probe",
        "cratelm.probes.config:ProbeConfig",
        "train models on synthetic tasks, and measure what each family can do",
    ),
    "harvest": Verb(
        "cratelm.activations.harvest",
        "cratelm.activations.config:HarvestConfig",
        "collect excerpts and statistics of every neuron",
        several=True,
    ),
    "merge harvest": Verb(
        "cratelm.activations.merge_harvest",
        "cratelm.activations.config:MergeHarvestConfig",
        "make a harvest from parts that were collected separately",
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
    "replace": Verb(
        "cratelm.replace.replace",
        "cratelm.replace.config:ReplaceConfig",
        "run a model on the explanations of its neurons, and measure the loss",
        several=True,
    ),
    "report": Verb(
        "cratelm.report.report",
        "cratelm.report.config:ReportConfig",
        "write a page, tables and figures about a run",
    ),
    "view": Verb(
        "cratelm.viewer.view",
        "cratelm.viewer.config:ViewConfig",
        "browse neurons in a web browser, or write the pages into a folder",
    ),
    "check": Verb(
        "cratelm.runs.check",
        "cratelm.runs.check_config:CheckConfig",
        "verify every file of a run; list what is damaged, stale or left over",
    ),
    "analyze": Verb(
        "cratelm.analysis.analyze",
        "cratelm.analysis.config:AnalyzeConfig",
        "measure, layer by layer, what CRATE's derivation predicts",
        several=True,
    ),
    "seeds": Verb(
        "cratelm.analysis.seeds",
        "cratelm.analysis.seeds_config:SeedsConfig",
        "match the neurons of several seeds of a model, and test explanations on the matches",
    ),
    "study": Verb(
        "cratelm.pipelines.study",
        "cratelm.pipelines.study_config:StudyConfig",
        "train, measure and compare a grid of families, sizes, seeds and switches, as a recipe says",
    ),
    "steer": Verb(
        "cratelm.steer.steer",
        "cratelm.steer.config:SteerConfig",
        "set, add, scale or zero neurons; see how the next token and the continuation change",
    ),
    "effects": Verb(
        "cratelm.steer.effects",
        "cratelm.steer.config:EffectsConfig",
        "measure what each neuron writes to the vocabulary, and the loss without it",
        several=True,
    ),
    "intervene": Verb(
        "cratelm.steer.intervene",
        "cratelm.steer.config:InterveneConfig",
        "ask a language model whether steering changes the text as the explanation says",
    ),
    "sae train": Verb(
        "cratelm.sae.train",
        "cratelm.sae.train_config:SaeTrainConfig",
        "train sparse autoencoders on a site of a model, using SAELens",
    ),
    "sae evaluate": Verb(
        "cratelm.sae.evaluate",
        "cratelm.sae.evaluate_config:SaeEvaluateConfig",
        "measure what autoencoders keep of activations and loss, next to the site's own code",
    ),
    "sae compare": Verb(
        "cratelm.pipelines.sae_compare",
        "cratelm.pipelines.config:SaeCompareConfig",
        "compare neurons with latents in one command, from training to the report",
    ),
    "import authors": Verb(
        "cratelm.interop.import_authors",
        "cratelm.interop.config:ImportAuthorsConfig",
        "convert a checkpoint of the paper's authors to a Hugging Face folder",
    ),
    "import sparse-gpt": Verb(
        "cratelm.interop.import_sparse_gpt",
        "cratelm.interop.config:ImportSparseGptConfig",
        "convert a released checkpoint of a weight-sparse GPT to a Hugging Face folder",
    ),
    "import sae": Verb(
        "cratelm.interop.import_sae",
        "cratelm.interop.config:ImportSaeConfig",
        "convert a sparse autoencoder of the paper's authors to a folder",
    ),
    "import records": Verb(
        "cratelm.interop.import_records",
        "cratelm.interop.config:ImportRecordsConfig",
        "make a run from activations harvested elsewhere, in OpenAI's NeuronRecord JSON",
    ),
    "export model": Verb(
        "cratelm.interop.export_model",
        "cratelm.interop.config:ExportModelConfig",
        "write a folder that transformers loads without cratelm, ready for the Hub",
    ),
    "export records": Verb(
        "cratelm.interop.export_records",
        "cratelm.interop.config:ExportRecordsConfig",
        "write excerpts of a harvest as OpenAI's NeuronRecord JSON",
    ),
    "export neuronpedia": Verb(
        "cratelm.interop.neuronpedia",
        "cratelm.interop.config:ExportNeuronpediaConfig",
        "write neurons, excerpts, explanations and scores in Neuronpedia's export format",
    ),
}


_LONGEST_MESSAGE = 2000
"""characters"""
GROUPS = {
    "what to run": "",
    "model": "model",
    "language model": "language model",
    "limits": "limit",
    "output": "output",
}
"""groups of options, in the order of `--help`, and the word that `--help` prints before "options" """
_GROUP_OF_NAME = {
    **dict.fromkeys(
        ("max_tokens", "max_documents", "batch_tokens", "memory_mib", "buffer_mib"), "limits"
    ),
    **dict.fromkeys(
        ("out", "output", "static", "push", "tensorboard", "wandb", "force", "quiet"), "output"
    ),
}
"""group of options that mean the same in every verb; used if a field does not name its own group"""


def function_name(verb: str) -> str:
    """Return the name of the verb as a Python function."""
    return verb.replace(" ", "_").replace("-", "_")


def config_class(verb: str) -> type:
    """Return the configuration dataclass of a verb."""
    module, name = VERBS[verb].config.split(":")
    return getattr(importlib.import_module(module), name)


def verb_function(verb: str) -> Callable[[Any], Any]:
    """Import the function of a verb, which takes its configuration, and return it."""
    # torch and transformers create a million objects that stay. To search them again and again for garbage
    # takes a fifth of the time of the import.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return getattr(importlib.import_module(VERBS[verb].module), function_name(verb))
    finally:
        if was_enabled:
            gc.enable()


def run_verb(verb: str, config: Any) -> Any:
    """Call the function of a verb with its configuration, and return its result."""
    return verb_function(verb)(config)


def option_group(field: dataclasses.Field) -> str:
    """Return the group of an option in `--help`: `metadata["group"]`, or that of its name."""
    return field.metadata.get("group", _GROUP_OF_NAME.get(field.name, "what to run"))


def option_texts(config: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass and of its bases, each on one line."""
    texts: dict[str, str] = {}
    for owner in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(field.target, ast.Name)
                texts[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return texts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    The status is 0 for success, 2 for a mistake in the input, 3 for a limit that the user set, 130 for an
    interruption, 141 for a closed output and 1 for any other failure. `check` adds 4 and 5, for what it found.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("cratelm"))
        return 0
    verb, options = split_words(words)
    kinds = _kinds()
    if verb in kinds:
        if options and options[0] not in ("-h", "--help"):
            return _fail(verb, _unknown("kind", options[0], kinds[verb]), 2)
        print(_overview(verb))
        return 0 if options else 2
    if verb not in VERBS:
        return _fail("", _unknown("verb", verb, _first_words()), 2)
    from cratelm.runs.ranks import n_ranks, rank  # on first use: `--help` needs none

    if n_ranks() > 1 and not VERBS[verb].several:
        several = ", ".join(name for name, entry in VERBS.items() if entry.several)
        message = f"it runs in one process: type it without torchrun, which is for {several}"
        return _fail(verb, message, 2)
    try:
        config = parse_options(verb, options)
        function = verb_function(verb)
        if arguments is None:  # a process of its own: what was imported stays until it ends
            gc.freeze()
        result = function(config)
        if rank() == 0:
            print(as_text(result))
    except KeyboardInterrupt as stop:
        return _fail(verb, str(stop) or "interrupted; the same command resumes the work", 130)
    except BrokenPipeError:  # the reader of the output, such as `| head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("CRATELM_TRACEBACK"):
            raise
        return _fail(verb, *_message_and_status(error))
    return getattr(result, "exit_status", 0)


def split_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """Split a command into its verb, of one word or two, and its options.

    If the words name no verb, the first word is returned as the verb.
    """
    two = " ".join(words[:2])
    return (two, list(words[2:])) if two in VERBS else (words[0], list(words[1:]))


def _kinds() -> dict[str, list[str]]:
    """Return the second words of two-word verbs, by their first word."""
    kinds: dict[str, list[str]] = {}
    for first, _, second in (verb.partition(" ") for verb in VERBS):
        if second:
            kinds.setdefault(first, []).append(second)
    return kinds


def _first_words() -> list[str]:
    """Return the first words of all verbs, in the order of the table."""
    return list(dict.fromkeys(verb.split()[0] for verb in VERBS))


def _unknown(noun: str, word: str, choices: Sequence[str]) -> str:
    """Return the message for a word that is not among the choices; `noun` says what they are."""
    near = difflib.get_close_matches(word, choices, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"there is no {noun} {word!r}: {hint}{noun.capitalize()}s are {', '.join(choices)}"


def parse_options(verb: str, arguments: list[str]) -> Any:
    """Return the configuration that the arguments specify.

    Prints the help and raises `SystemExit` for `--help`. Raises `InputError` for arguments that do
    not parse, and for values that the configuration rejects.
    """
    import tyro

    # tyro offers no public hook for errors: `console_outputs=False` drops the message altogether, and
    # `SubcommandApp`, which would import the configuration of every verb, prints the same boxes. So
    # its output is captured and reduced to one line.
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), _paths_as_text():
            parsed = tyro.cli(
                _grouped(config_class(verb)),
                prog=f"cratelm {verb}",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(_one_line(stderr.getvalue(), verb)) from None
    options: dict[str, Any] = {}
    for field in dataclasses.fields(parsed):
        value = getattr(parsed, field.name)
        options |= vars(value) if field.name.startswith(_NESTED) else {field.name: value}
    return config_class(verb)(**options)


def _paths_as_text() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which tyro leaves a path as it was typed.

    The configuration makes the `Path`: `Path("")` is the working directory, so that an empty path could no
    longer be refused.
    """
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def path_rule(kind: Any) -> Any:
        if kind.type is not Path:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda words: words[0],
            is_instance=lambda value: isinstance(value, str | Path),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


_NESTED = "group_"


def _grouped(config: type) -> type:
    """Return a dataclass with the fields of `config`, in which all groups but the first are nested.

    tyro draws the options of a nested dataclass in a box of their own. The configurations themselves
    stay flat, which is how they are saved in the run.
    """
    import tyro

    types, texts = get_type_hints(config, include_extras=True), option_texts(config)
    members: dict[str, list[tuple[str, Any, Any]]] = {group: [] for group in GROUPS}
    for field in dataclasses.fields(config):
        # an empty default is not informative: the option's text says what happens without it
        hint = "" if field.default in (None, "", ()) else None
        arg = tyro.conf.arg(help=texts.get(field.name, ""), help_behavior_hint=hint)
        annotated = Annotated[types[field.name], arg]
        copy = dataclasses.field(default=field.default, default_factory=field.default_factory)  # type: ignore[call-overload]
        members[option_group(field)].append((field.name, annotated, copy))
    first, *others = GROUPS
    nested = []
    for group in others:
        if members[group]:
            box = dataclasses.make_dataclass("Group", members[group], kw_only=True)
            name = _NESTED + group.replace(" ", "_")
            nested.append((name, Annotated[box, tyro.conf.arg(name=GROUPS[group], help="")]))
    options = dataclasses.make_dataclass("Options", [*members[first], *nested], kw_only=True)
    options.__doc__ = config.__doc__
    return options


def _one_line(box: str, verb: str) -> str:
    """Return the message of tyro's error box on one line, without the option help that it repeats.

    The box contains a title and blocks between rules: the error, then suggestions or the option's
    help. Below a line that ends in a colon, options are indented by 4 and their help by 8.
    """
    blocks: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        text = line[1:].removeprefix(" ").rstrip(" │╮╯")  # borders are blank without UTF-8
        if set(text.strip()) <= {"─", "-"}:
            blocks.append([])
        elif not text.startswith(" " * 8):
            blocks[-1].append(text.strip())
    message, *others = [block for block in blocks if block] or [[box.strip()]]
    line = " ".join(message)
    if message[0].startswith("Missing from"):
        line = f"missing {', '.join(message[1:])}"
    line = re.sub(r"^Error parsing \w+: (?=--)", "", line)
    hints = " ".join(text for block in others for text in block)
    if near := re.search(r"Perhaps you meant:\s*(--[\w-]+)", hints):
        line += f"; did you mean {near[1]}?"
    elif expected := re.search(r"Argument helptext: (--[\w-]+ \S+)", hints):
        line = f"{line.removesuffix('.')}; expected {expected[1]}"
    return f"{line} (`cratelm {verb} --help` lists the options)"


def _message_and_status(error: Exception) -> tuple[str, int]:
    """Return the text to print for an error, and the exit status."""
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, BudgetReached):
        return str(error), 3
    from cratelm.runs.storage import storage_error  # on first use: `--help` needs none

    if (fault := storage_error(error)) is not None:
        return str(fault), 2
    return (
        f"{type(error).__name__}: {one_line(error, 300)} (CRATELM_TRACEBACK=1 prints the traceback)",
        1,
    )


def _fail(verb: str, message: str, status: int) -> int:
    from cratelm.runs.ranks import REPORTS_AFTER, rank  # on first use: `--help` needs none

    if number := rank():
        time.sleep(REPORTS_AFTER)
        message = f"rank {number}: {message}"
    if len(message) > _LONGEST_MESSAGE:  # it repeats what was typed
        half = _LONGEST_MESSAGE // 2
        message = f"{message[:half]} … {message[-half:]}"
    print(f"cratelm {verb}: {message}".replace(" :", ":"), file=sys.stderr)
    return status


def as_text(result: Any) -> str:
    """Return a verb's result as text: its own `str`, or a line per field."""
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
    """Return the list of all verbs, or of the kinds of a first word."""
    summaries = {
        name: verb.summary
        for name, verb in VERBS.items()
        if not first or name.startswith(f"{first} ")
    }
    width = max(map(len, summaries))
    return "\n".join(
        [
            f"usage: cratelm {f'{first} KIND' if first else 'VERB'} [OPTIONS]",
            "",
            "White-box language models whose neurons can be read: train, measure, compare.",
            "",
            *(f"  {name:<{width}}  {summary}" for name, summary in summaries.items()),
            "",
            f"`cratelm {first or 'VERB'}{' KIND' if first else ''} --help` lists the options."
            + ("" if first else " Start with `cratelm demo`."),
        ]
    )
