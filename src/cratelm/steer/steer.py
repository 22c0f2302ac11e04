"""`cratelm steer`: edit neurons while a model reads a text, and show how its output changes.

Shape legend: n tokens of the text (the first is the one that texts begin with), V vocabulary.
"""

import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cratelm.activations.open_harvest import open_site
from cratelm.errors import InputError
from cratelm.models.open import LoadedModel, encoder_of, open_model
from cratelm.runs import Run, write_json
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
from cratelm.tokens.shards import TokenStore


@dataclass(frozen=True)
class SteerResult:
    """What the edits do to the next token, and to the continuation."""

    model: str
    site: str
    edits: str
    """in words"""
    text: str
    n_tokens: int
    """of the text, with the token that every text begins with"""
    next_token: NextTokenChange
    continuation: str
    """without the edits; empty with `--generate 0`"""
    steered_continuation: str

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
    """One line per token, columns aligned."""
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
    """Run the model on the text with the edits and without.

    Raises `InputError` where the model, the text, the site or a neuron is missing, the text is
    longer than the model takes, or no token stands at the positions.
    """
    run = Run(config.run)
    subject = open_model(
        run,
        config.path or config.model,
        from_run=config.path is None,
        device=config.device,
        dtype=config.dtype,
    )
    encoder = encoder_of(subject, run)
    text = _text(config, run)
    ids = torch.tensor([[encoder.start, *encoder.encode(text)]], device=subject.model.device)
    _check_length(ids, subject, config)
    site = open_site(run, subject, config.site, config.sae)
    edits = config.edits()
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
    """The edits in words: `neurons 1:32 0:7 set 3 at positions all`."""
    operation, value = config.edits()[0].operation
    done = "zero" if operation == "zero" else f"{operation} {value:g}"
    many = "neuron" if len(config.neurons) == 1 else "neurons"
    return f"{many} {' '.join(config.neurons)} {done} at positions {config.positions}"


def _text(config: SteerConfig, run: Run) -> str:
    """The text given, or the beginning of a held-out document."""
    if config.text is not None:
        return config.text
    if config.text_file is not None:
        try:
            return Path(config.text_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{config.text_file} cannot be read as UTF-8 text ({error}): give another --text-file"
            ) from None
    run.stage("tokens").require("tokenize")
    store = TokenStore(run.stage("tokens").path)
    split = store.split("held_out")
    if not split.n_documents:
        raise InputError(f"{store.path} has no held-out document: give a text with --text")
    number = random.Random(config.seed).randrange(split.n_documents)
    start, stop = int(split.starts[number]), int(split.starts[number + 1]) - 1
    ids = split.read(start, min(stop, start + config.tokens)).tolist()
    return store.tokenizer.decode(ids, skip_special_tokens=False).strip("\ufffd")


def _check_length(ids: torch.Tensor, subject: LoadedModel, config: SteerConfig) -> None:
    whole = ids.shape[1] + config.generate
    if subject.longest is not None and whole > subject.longest:
        raise InputError(
            f"the text has {ids.shape[1]} tokens, which with --generate {config.generate} is more than the"
            f" {subject.longest} that {subject.name} takes: give a shorter text, or generate fewer"
        )


def _check_positions(edit: Edit, ids: torch.Tensor, count: int) -> None:
    """Raises `InputError` where no token of the text or the continuation stands at the positions.

    The last token generated is read by no further pass, so that no edit can be made at it.
    """
    n = ids.shape[1]
    position = torch.arange(n + max(0, count - 1))[None]
    if not chosen(edit.where, position, torch.tensor([[n]])).any():
        raise InputError(
            f"no token stands at the positions: the text has {n} tokens, numbered from 0, and"
            f" {count} are generated; give other --positions"
        )
