"""Options of `cratelm score`. Imports nothing heavy."""

from dataclasses import dataclass

from cratelm.errors import InputError
from cratelm.explain.config import Prompts
from cratelm.llm.config import LLMConfig, check_specification, option
from cratelm.records import CORRELATIONS, METRICS, SIMULATION_METRICS, Metric
from cratelm.runs import at_least, check_resamples
from cratelm.runs.model_options import SourceOptions
from cratelm.runs.names import check_name

PER_BIN = 10
"""excerpts per quantile bin: five times as many calls, about those of the metric `anthropic`"""


@dataclass(frozen=True)
class ScoreConfig(LLMConfig, SourceOptions):
    """Score the explanations of one model on held-out excerpts, with null controls."""

    simulator: str = ""
    """a language model that reads explanations: `hf:ID_OR_PATH` (a Hub id, a folder, a GGUF file, or
    `smollm2`), or `openai:MODEL` at --base-url; default: each explanation's own simulator, without one"""
    explanations: str = ""
    """explanations to score: the name of the language model that wrote them, or `llm-free` for those made
    without one; default: those of the simulator itself"""
    metrics: tuple[Metric, ...] = SIMULATION_METRICS
    """`top_and_random`, `random_only` (64-token excerpts), `anthropic` (8-token excerpts): simulation, as is
    `all_tokens_estimate`: the correlation over all held-out tokens, estimated from `--per-bin` ones in each of five bins.
    With a language model also `detection`, `fuzzing`, both with hard negatives (`detection_hard`,
    `fuzzing_hard`: texts with the same token, on which the neuron is silent), `intruder`, `embedding`"""
    paper_compat: bool = False
    """also score with levels read as in the paper's code: only among the five most likely tokens, and with a
    simulated 10 read as 1"""
    all_tokens: bool = True
    """also score over all held-out tokens that the harvest searched, and measure what the last token alone
    explains: the model runs over them again. Without a language model only"""
    per_bin: int = PER_BIN
    """`all_tokens_estimate`: excerpts per bin, at most as many as the harvest kept (20 by default). With a language
    model each is a call, once for the neuron's own explanation and once for another's: with 10, 100 calls per neuron"""
    audit: bool = False
    """also audit the metrics: whether they notice planted explanations, and those of the run, that are half missing or
    twice too broad. Without a language model only; takes three to four times as long"""
    resamples: int = 2000
    """number of bootstrap resamples for the intervals in `summary.json`"""
    seed: int = 0
    """seed of the shuffled control, of the bootstrap and of the scorers' random draws"""
    prompts: Prompts = option("cratelm", "language model")
    """prompts that ask for levels: cratelm's, or OpenAI's published ones (extra `openai-prompts`)"""
    name: str = option("", "output")
    """name of these scores in folders and tables; default: the explainer's name, and the simulator's if it
    differs"""

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = METRICS if self.simulator else CORRELATIONS
        unknown = [m for m in self.metrics if m not in allowed]
        if unknown or not self.metrics or len(set(self.metrics)) != len(self.metrics):
            needs = "" if self.simulator else " (other metrics need --simulator)"
            raise InputError(
                f"--metrics {' '.join(self.metrics) or '(none)'}:"
                f" give one or more of {', '.join(allowed)}, each once{needs}"
            )
        if self.simulator:
            check_specification("--simulator", self.simulator)
        elif self.explanations or self.paper_compat or self.name:
            raise InputError(
                "--explanations, --name and --paper-compat need a language model as simulator:"
                " add --simulator hf:ID_OR_PATH or openai:MODEL"
            )
        if self.simulator and self.audit:
            raise InputError("--audit changes look-up tables and tries: omit --simulator")
        if self.name:
            check_name("--name", self.name)
        at_least(self, {"resamples": 100, "seed": 0, "per_bin": 1})
        check_resamples(self)
