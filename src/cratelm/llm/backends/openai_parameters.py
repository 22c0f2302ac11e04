"""Parameters of a request that a server refuses, although the request works without them.

Newer models refuse parameters that older ones need: `max_tokens` in favour of `max_completion_tokens`, any
temperature but 1, a seed. Their servers answer HTTP 400 or 422 and name the parameter in words of their own.
A refused parameter is left out, or renamed, from then on; nothing is left out that the answer depends on, such
as the prompt or the limit on tokens.
"""

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

RENAMED = {"max_tokens": "max_completion_tokens"}
OPTIONAL = ("temperature", "seed", "encoding_format", "stop", "return_token_ids", "cache_prompt")
_REFUSAL = re.compile(
    r"unsupported|not\b.{0,20}\b(?:support|permit|allow|accept|available|valid|recogni[sz]e)|unrecogni[sz]ed"
    r"|unknown|unexpected|forbidden|extraneous|deprecated|does not|doesn't|cannot|can't|must be"
    r"|\bonly\b|may only|no longer|invalid",
    re.IGNORECASE,
)
_TOO_LONG = re.compile(
    r"context length|context window|too (?:large|long|many)|exceed", re.IGNORECASE
)
"""such messages name `max_tokens` because of its value, which another name does not change"""


class Parameters:
    """The parameters that one server does not accept, learnt from its refusals."""

    def __init__(self, name: str, say: Callable[[str], None] | None = None):
        """`name`: of the model, for the line that is printed once for each parameter."""
        self._name, self._say = name, say or _print
        self._changed: dict[str, str] = {}
        """new name of a refused parameter; empty if it is left out"""

    def accepted(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return `options` under the names that the server accepts, without those that it refuses."""
        renamed = ((self._changed.get(name, name), value) for name, value in options.items())
        return {name: value for name, value in renamed if name}

    def learn(self, refusal: str, sent: Mapping[str, Any]) -> bool:
        """Return whether a refusal of a request with the options `sent` names one that it can do without."""
        if not _REFUSAL.search(refusal):
            return False
        named = [name for name in sent if re.search(rf"(?<!\w){name}(?!\w)", refusal)]
        usable = () if _TOO_LONG.search(refusal) else RENAMED
        new = [name for name in named if name in usable or name in OPTIONAL]
        for name in new:
            other = RENAMED.get(name, "")
            if name not in self._changed:
                how = f"{other} is sent instead" if other else "it is left out"
                self._say(f"{self._name} refuses the parameter {name}: {how} from now on")
            self._changed[name] = other
        return bool(new)


def refusal_of(body: object, message: str) -> str:
    """Return what a response with status 400 or 422 says, without the request that some servers repeat in it.

    `body` is its content as parsed from JSON, `message` the text to use if that has no known form.
    """
    if not isinstance(body, dict):
        return message
    details = body.get("detail")
    if isinstance(details, list):  # FastAPI, pydantic
        return "; ".join(
            f"{' '.join(map(str, d.get('loc', ())))}: {d.get('msg', '')}"
            for d in details
            if isinstance(d, dict) and isinstance(d.get("loc", ()), list | tuple)
        )
    inner = body.get("error", body)
    if isinstance(inner, dict) and isinstance(inner.get("message"), str):
        return f"{inner.get('param') or ''}: {inner['message']}"
    return details if isinstance(details, str) else message


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
