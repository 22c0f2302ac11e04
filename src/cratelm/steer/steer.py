"""`cratelm steer`: edit neurons while a model reads a text, and show how its output changes.

Shape legend: n tokens of the text (including the token that begins every text), V vocabulary.
"""

import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cratelm.activations.open_harvest import open_site
from cratelm.corpus.formats import text_of_file
from cratelm.errors import InputError
from cratelm.models.begin import announced, opening
from cratelm.models.open import LoadedModel, encoder_of, open_model
from cratelm.models.sites import both_ends, without_ends
from cratelm.records import names_an_end
from cratelm.runs import Run, check_memory, write_json
from cratelm.runs.storage import check_target
from cratelm.steer.config import SteerConfig
from cratelm.steer.edits import Edit
from cratelm.steer.next_tokens import (
    NextTokenChange,
    TokenChange,
    compare_next_tokens,
    continue_text,
    next_log_probabilities,
)
from cratelm.steer.steering import chosen, steering
from cratelm.text.display import visible
from cratelm.text.table import align
from cratelm.tokens.beginning import Beginning
from cratelm.tokens.shards import TokenStore


@dataclass(frozen=True)
class SteerResult:
    """Result of `cratelm steer`: the effect of the edits on the next token and on the continuation."""

    model: str
    site: str
    edits: str
    """the edits in words"""
    text: str
    n_tokens: int
    """tokens of the text, including the token that begins every text"""
    next_token: NextTokenChange
    continuation: str
    """continuation without the edits; empty with `--generate 0`"""
    steered_continuation: str
    """continuation with the edits; empty with `--generate 0`"""

    def __str__(self) -> str:
        change = self.next_token
        lines = [
            f"{self.model}, {self.site}: {self.edits}",
            f"text of {self.n_tokens} tokens: ... {visible(self.text[-60:])}",
            f"next token: total variation {change.total_variation:.4f}, KL {change.kl:.4f} nats",
            "",
            *_table("gain most", change.gains),
            "",
            *_table("lose most", change.losses),
        ]
        if self.continuation or self.steered_continuation:
            lines += ["", f"plain    {visible(self.continuation)}"]
            lines += [f"steered  {visible(self.steered_continuation)}"]
        return "\n".join(lines)


def _table(heading: str, changes: tuple[TokenChange, ...]) -> list[str]:
    """Return the lines of a table, one per token, with aligned columns."""
    if not changes:
        return [f"{heading}: none"]
    header = [heading, "  before", "   after", "difference", "ln ratio"]
    rows = [
        (visible(c.token), *map(str.format, ("{:.4%}", "{:.4%}", "{:+.4%}", "{:+.3f}"), figures))
        for c in changes
        for figures in [(c.before, c.after, c.difference, c.log_ratio)]
    ]
    return align([header, *rows])


def steer(config: SteerConfig) -> SteerResult:
    """Run the model on the text with and without the edits, and return the changes.

    Raises `InputError` if the model, the text, the site or a neuron is missing, if the text is longer than
    the model takes, or if there is no token at the positions.
    """
    run = Run(config.run)
    if config.output is not None:
        check_target(Path(config.output), "--output", "file")
    name, from_run = config.path or config.model, config.path is None
    subject = open_model(run, name, config, from_run=from_run)
    encoder = encoder_of(subject, run)
    beginning = announced(subject, run, config.begin_token)
    start, text = opening(encoder, beginning), _text(config, run, beginning)
    ids = torch.tensor([[start, *encoder.encode(text)]], device=subject.model.device)
    _check_length(ids, subject, config)
    site = open_site(run, subject, config.site, config.sae)
    site = both_ends(site) if names_an_end(config.neurons) else without_ends(site)
    first = beginning.extra if config.positions == "all" else 0
    edits = [edit.from_position(first) for edit in config.edits(site.name)]
    _check_positions(edits[0], ids, config.generate)
    before = next_log_probabilities(subject.model, ids)
    sampling = (config.generate, config.temperature, config.seed)
    plain = continue_text(subject.model, encoder, ids, *sampling)
    with steering(subject.model, *edits, site=site):
        after = next_log_probabilities(subject.model, ids)
        steered = continue_text(subject.model, encoder, ids, *sampling)
    result = SteerResult(
        model=subject.name,
        site=site.name,
        edits=_in_words(config),
        text=text,
        n_tokens=ids.shape[1],
        next_token=compare_next_tokens(before, after, encoder.display, config.top),
        continuation=plain,
        steered_continuation=steered,
    )
    if config.output is not None:
        write_json(Path(config.output), asdict(result))
    return result


def _in_words(config: SteerConfig) -> str:
    """Return the edits in words, such as `neurons 1:32 0:7 set 3 at positions all`."""
    operation, value = config.edits()[0].operation
    action = "zero" if operation == "zero" else f"{operation} {value:g}"
    noun = "neuron" if len(config.neurons) == 1 else "neurons"
    return f"{noun} {' '.join(config.neurons)} {action} at positions {config.positions}"


def _text(config: SteerConfig, run: Run, beginning: Beginning) -> str:
    """Return the text of the options, or by default the beginning of a held-out document."""
    if config.text is not None:
        return config.text
    if config.text_file is not None:
        return text_of_file(Path(config.text_file))
    run.stage("tokens").require("tokenize")
    store = TokenStore(run.stage("tokens").path)
    split = store.split("held_out")
    if not split.n_documents:
        raise InputError(f"{store.path} has no held-out document: give a text with --text")
    number = random.Random(config.seed).randrange(split.n_documents)
    start, stop = int(split.starts[number]), int(split.starts[number + 1]) - 1
    ids = beginning.without(split.read(start, min(stop, start + config.tokens))).tolist()
    return store.tokenizer.decode(ids, skip_special_tokens=False).strip("\ufffd")


def _check_length(ids: torch.Tensor, subject: LoadedModel, config: SteerConfig) -> None:
    check_memory(config, {"generate": 16 * config.generate}, "the continuations")
    whole = ids.shape[1] + config.generate
    if subject.longest is not None and whole > subject.longest:
        raise InputError(
            f"the text has {ids.shape[1]} tokens, which with --generate {config.generate} exceeds the"
            f" {subject.longest} that {subject.name} takes: give a shorter text or a lower --generate"
        )


def _check_positions(edit: Edit, ids: torch.Tensor, count: int) -> None:
    """Raise `InputError` if no token of the text or the continuation is at the positions of the edit.

    The last generated token is not read by any further pass, so that it cannot be edited.
    """
    n = ids.shape[1]
    position = torch.arange(n + max(0, count - 1))[None]
    if not chosen(edit.where, position, torch.tensor([[n]])).any():
        raise InputError(
            f"no token is at these positions: the text has {n} tokens, numbered from 0, and"
            f" {count} are generated; give other --positions"
        )
