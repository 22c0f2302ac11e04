"""The settings of a run, as facts and as commands, from the completion records of the stages."""

import dataclasses
import shlex
from collections.abc import Iterable
from typing import Any

from cratelm.activations.config import HarvestConfig
from cratelm.explain.config import ExplainConfig
from cratelm.interop.config import ImportRecordsConfig
from cratelm.report.config import ReportConfig
from cratelm.results.run_results import RunResults
from cratelm.results.side_results import evaluation_config
from cratelm.results.stages import MODEL_STAGES
from cratelm.runs import Completion, config_dict
from cratelm.runs.stage import usual_name
from cratelm.score.config import ScoreConfig
from cratelm.tokens.config import TokenizeConfig
from cratelm.train.config import TrainConfig

_IMPORTED = "activation records"
"""corpus name of tokens that `import records` wrote"""
_VERBS: dict[str, str] = {"tokens": "tokenize", **MODEL_STAGES}
_CONFIGS: dict[str, type] = {
    "tokens": TokenizeConfig,
    "model": TrainConfig,
    "activations": HarvestConfig,
    "explanations": ExplainConfig,
    "scores": ScoreConfig,
}
"""configuration class by stage"""


def commands(results: RunResults, config: ReportConfig) -> str:
    """Return one command per stage with all settings that differ from their defaults, one per line."""
    stages = [
        done
        for done in _all(results)
        if not (done.stage == "tokens" and done.config.get("corpus") == _IMPORTED)
    ]
    first = [done for done in stages if done.stage in ("tokens", "model")]
    autoencoders = [done for done in results.side_stages if done.stage == "sae"]
    lines = [_command(*_verb(done), _settings(done), results) for done in first]
    for done in autoencoders:
        lines += [_side_command(done, results), *_evaluated(done, results)]
    later = [done for done in stages if done not in first]
    lines += [_command(*_verb(done), _settings(done), results) for done in later]
    others = [done for done in results.side_stages if done not in autoencoders]
    lines += [_side_command(done, results) for done in others]
    return "\n".join([*lines, _command("report", ReportConfig, config_dict(config), results)])


def _side_command(done: Completion, results: RunResults) -> str:
    """Return the command of an additional measurement, with the options that differ from their defaults."""
    return results.run.stage(done.stage, done.name).command(force=False)


def _evaluated(done: Completion, results: RunResults) -> list[str]:
    """Return the command that evaluated these autoencoders; empty if they were not evaluated."""
    config = evaluation_config(results.run, done.name)
    return [] if config is None else [_words("sae evaluate", config, results)]


def _words(verb: str, config: dict[str, Any], results: RunResults) -> str:
    words = ["cratelm", *verb.split(), "--run", str(results.run.path)]
    for name, value in config.items():
        if value not in (None, "", [], False):
            words += _flag(name, value)
    return shlex.join(words)


def _verb(done: Completion) -> tuple[str, type]:
    """Return the command that wrote a stage, and its configuration class."""
    if done.config.get("import") == "records":
        return "import records", ImportRecordsConfig  # also writes the tokens
    return _VERBS[done.stage], _CONFIGS[done.stage]


def facts(results: RunResults) -> list[tuple[str, str]]:
    """Return facts about the run as pairs of name and value: corpus, tokens, seeds, versions, time."""
    done = _all(results)
    harvests = [
        m.completions["activations"] for m in results.models if "activations" in m.completions
    ]
    searched = sorted({_counts(h.results.get("tokens", {})) for h in harvests})
    seeds = {
        verb: _several(c.config.get("seed") for c in done if c.stage == stage)
        for stage, verb in _VERBS.items()
        if stage != "tokens"
    }
    versions = {
        name: _several(c.versions.get(name) for c in done)
        for name in sorted({name for c in done for name in c.versions})
    }
    return [
        *(_corpus_facts(results.tokens) if results.tokens else []),
        ("Tokens searched", "; ".join(searched) or "unknown"),
        ("Explainers", ", ".join(dict.fromkeys([*results.explainers, *results.llm_explainers]))),
        ("Seeds", ", ".join(f"{verb} {seed}" for verb, seed in seeds.items() if seed)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("Source commit", _several(c.git_commit for c in done) or "not from a source tree"),
        (
            "Time",
            f"{sum(c.seconds for c in [*done, *results.side_stages]):,.0f} s, total of all stages in this report",
        ),
    ]


def _all(results: RunResults) -> list[Completion]:
    tokens = [results.tokens] if results.tokens else []
    without_llm = [c for m in results.models for c in m.completions.values()]
    llm_sets = [of_set for m in results.models for of_set in m.llm_sets]
    return [*tokens, *without_llm, *(c for s in llm_sets for c in s.completions.values())]


def _settings(done: Completion) -> dict[str, Any]:
    settings = dict(done.config)
    if done.stage == "model":
        settings["name"] = "" if done.name == usual_name(done) else done.name
    if done.config.get("import") == "records":
        settings["model"] = done.name
    return settings


def _command(verb: str, config: type, settings: dict[str, Any], results: RunResults) -> str:
    words = ["cratelm", *verb.split(), "--run", str(results.run.path)]
    for field in dataclasses.fields(config):
        value = settings.get(field.name)
        default = None if field.default is dataclasses.MISSING else field.default
        plain_default = list(default) if isinstance(default, tuple) else default
        if field.name in settings and value is not None and value != plain_default:
            words += _flag(field.name, value)
        elif field.name == "model" and value:
            # always written, even if it is the default, to distinguish the commands of several models
            words += _flag(field.name, value)
    return shlex.join(words)


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{flag}"]
    return [f"--{flag}", *(map(str, value) if isinstance(value, list) else [str(value)])]


def _corpus_facts(tokens: Completion) -> list[tuple[str, str]]:
    size = tokens.results.get("vocab_size")
    kind = str(tokens.config.get("tokenizer"))
    return [
        ("Corpus", str(tokens.config.get("corpus"))),
        ("Tokenizer", f"{kind}, vocabulary {size:,}" if isinstance(size, int) else kind),
        ("Tokens", _counts(tokens.results.get("tokens", {}))),
        ("Documents", _counts(tokens.results.get("documents", {}))),
    ]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{split} {n:,}" for split, n in counts.items())


def _several(values: Iterable[Any]) -> str:
    """Return the distinct values, joined by `and`."""
    return " and ".join(sorted({str(v) for v in values if v not in (None, "")}))
