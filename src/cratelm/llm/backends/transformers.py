"""A local Hugging Face causal language model as a backend: `hf:ID_OR_PATH`, including GGUF files.

Three things make `LogprobQuery` requests fast:
- the tokens that all requests share (instructions and examples) pass through the model once, and those
  that the requests on one explanation share once per explanation; their keys and values are reused;
- logits are computed only at the slots, and only for the options (unless `full`);
- slots are located by character offsets, so that one pass answers all slots of a text.

The shared part is the common prefix of the token ids of whole texts, never of the text itself: each text
is first tokenised as a whole, so that reuse does not change its tokenisation.

Precision: bfloat16 if the hardware supports it (GPUs; CPUs with avx512_bf16 or amx_bf16), else float32;
logits at slots are always in float32.

Memory in addition to the weights: `BATCH_TOKENS` tokens of keys and values, shared ones counted per row.

Shapes: B requests of a batch, S tokens after the shared ones, n slots of a request, O options,
V vocabulary, d width of the model.
"""

import copy
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.llm.backends.model_source import fingerprint, loading, locate, short_name
from cratelm.llm.requests import (
    CHAT_IDENTITY,
    NO_RANK,
    Answer,
    Chat,
    Embed,
    Failure,
    FailureKind,
    LogprobQuery,
    OptionLogprobs,
    Outcome,
    Request,
    completion_tokens,
    key,
)
from cratelm.llm.thinking import (
    UnfinishedThoughts,
    answer_after_thoughts,
    no_answer_before,
    prompt_opens_thoughts,
)
from cratelm.runs.devices import device_of
from cratelm.runs.pretrained import from_pretrained

BATCH_TOKENS = 4096
"""tokens of keys and values held for one batch"""
CHAT_BATCH = 8
RANKED = 20
"""number of most likely tokens at each slot whose ranks are reported"""
DECODING = "the likeliest token; at a temperature with Gumbel noise of the request's own seed"
"""how chats are decoded, as it enters the identity; a model's own generation settings are not used"""
THINKING = "; thoughts before the answer"
"""added to it if a model may think before it answers"""


class LocalBackend:
    """A causal language model in this process, loaded at the first request that needs it.

    Raises `InputError` if the model does not exist or cannot be read.
    """

    supports_logprobs = True
    reason = ""
    way = ""
    reads_by_slot = False
    parallel = 1
    address = ""

    def __init__(
        self,
        specification: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        thinking_tokens: int = 0,
    ):
        """`specification` is the text after `hf:`: a Hub id, a folder, a `.gguf` file, or `smollm2`.

        `thinking_tokens`: tokens of thoughts that are allowed in addition to those of an answer; with 0,
        chat templates that can turn thinking off do so.
        """
        self._source = locate(specification)
        self.name = short_name(specification, self._source)
        self._device = device_of(_device() if device == "auto" else device)
        self._dtype = _dtype(self._device) if dtype == "auto" else getattr(torch, dtype)
        self.thinking_tokens = thinking_tokens
        self._shared: tuple[list[int], Any] = ([], None)
        self._shared_chat: tuple[list[int], Any] = ([], None)

    @property
    def identity(self) -> dict[str, str]:
        """Return fingerprint and precision of the weights, and how chats are decoded."""
        return {
            "backend": "hf",
            "weights": self._fingerprint,
            "dtype": str(self._dtype).removeprefix("torch."),
            CHAT_IDENTITY: DECODING + (THINKING if self.thinking_tokens else ""),
        }

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._source)

    @property
    def window(self) -> int:
        """Return how many requests to pass at a time."""
        return 1024

    @cached_property
    def tokenizer(self) -> Any:
        """Return the tokenizer, loaded at first use."""
        from transformers import AutoTokenizer

        with loading(self._source):
            tokenizer = AutoTokenizer.from_pretrained(
                *self._source.arguments, **self._source.pinned
            )
        if not tokenizer.is_fast:
            raise InputError(
                f"{self._source} has a slow tokenizer, which reports no character offsets: choose a model"
                " with a fast tokenizer (tokenizer.json)"
            )
        return tokenizer

    @cached_property
    def model(self) -> Any:
        """Return the model, loaded at first use."""
        from transformers import GenerationConfig

        with loading(self._source):
            model = from_pretrained(
                *self._source.arguments, dtype=self._dtype, **self._source.pinned
            )
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        ours = {name: getattr(model.generation_config, name) for name in special}
        model.generation_config = GenerationConfig(**ours)
        return model.to(device=self._device, dtype=self._dtype).eval()  # type: ignore[arg-type]

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self.tokenizer(text).input_ids)

    def tokens_at_slot(self, options: Sequence[str], slot_before: str) -> list[int]:
        """Return how many tokens each option takes after `slot_before`."""
        start = len(slot_before)
        counts = []
        for option in options:
            offsets = self.tokenizer(
                f"{slot_before}{option}\n", return_offsets_mapping=True
            ).offset_mapping
            inside = [(a, b) for a, b in offsets if a < start + len(option) and b > start]
            begins = bool(inside) and inside[0][0] == start
            ends = bool(inside) and inside[-1][1] == start + len(option)
            # an option that is merged with its surroundings is not a single token
            counts.append(len(inside) if begins and ends else len(inside) + 1)
        return counts

    @torch.inference_mode()
    def answer(self, requests: Sequence[Request]) -> Generator[list[tuple[int, Outcome]]]:
        """Yield outcomes with the index of their request, in groups.

        Queries with the same context form one group, chats and embeddings form batches; all requests of a
        group have the same settings. A `JsonQuery` fails, since local models report log-probabilities.
        """
        groups: dict[Any, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(_group(request), []).append(index)
        for indices in groups.values():
            group: list[Any] = [requests[i] for i in indices]
            if isinstance(group[0], LogprobQuery):
                parts = [(indices, self._read(group))]
            else:
                cuts = range(0, len(group), CHAT_BATCH)
                parts = (
                    (indices[c : c + CHAT_BATCH], self._batch(group[c : c + CHAT_BATCH]))
                    for c in cuts
                )
            for part_indices, outcomes in parts:
                yield list(zip(part_indices, outcomes, strict=True))

    def _batch(self, requests: list[Any]) -> list[Outcome]:
        if isinstance(requests[0], Chat):
            return self._chat(requests)
        if isinstance(requests[0], Embed):
            return self._embed(requests)
        reason = "a local model answers by log-probabilities, not by JSON"
        return [Failure(FailureKind.MALFORMED, reason) for _ in requests]

    # --- log-probabilities ---------------------------------------------------------------------

    def _read(self, requests: list[LogprobQuery]) -> list[Outcome]:
        """Return the outcomes of requests with the same preamble, context, options and `full`."""
        started = time.monotonic()
        encoded = self.tokenizer([r.text for r in requests], return_offsets_mapping=True)
        ids: list[list[int]] = encoded.input_ids
        slot_tokens = [
            _slot_tokens(offsets, r.offsets)
            for offsets, r in zip(encoded.offset_mapping, requests, strict=True)
        ]
        options = self._option_ids(requests[0])
        readable = [i for i, p in enumerate(slot_tokens) if p is not None and options is not None]
        logprobs: dict[int, OptionLogprobs] = {}
        if readable:
            # A slot is predicted from the token before it, which must pass through the model in this
            # batch: the shared prefix ends before the earliest such token.
            first = min(slot_tokens[i][0] for i in readable) - 1  # type: ignore[index]
            n_shared = min(_n_common([ids[i] for i in readable]), first)
            cache = self._context_cache(ids[readable[0]][:n_shared], requests[0])
            for batch in self._batches(readable, ids, n_shared):
                rows = [
                    (ids[i][n_shared:], [p - n_shared for p in slot_tokens[i] or ()]) for i in batch
                ]
                answers = self._forward(rows, cache, n_shared, options or [], requests[0].full)
                logprobs |= dict(zip(batch, answers, strict=True))
        seconds = (time.monotonic() - started) / len(requests)
        return [
            Answer(logprobs[i], len(ids[i]), 0, seconds)
            if i in logprobs
            else Failure(FailureKind.UNREADABLE, self._why(requests[i], slot_tokens[i]))
            for i in range(len(requests))
        ]

    def _why(self, request: LogprobQuery, slot_tokens: list[int] | None) -> str:
        if slot_tokens is None:
            return "no token begins at one of the slots"
        return f"one of the options {', '.join(map(repr, request.options))} is not a single token"

    def _option_ids(self, request: LogprobQuery) -> list[int] | None:
        """Return the token id of each option at the first slot, [O]; None if one is not a single token."""
        before = request.text[: request.offsets[0]] if request.slots else ""
        # The tokenisation of an option depends on the text near it only, so the last two lines replace the
        # whole prompt. The last line alone is not enough: it may be empty, and some tokenizers treat the
        # beginning of a text differently (SentencePiece puts a space before it).
        line = before.rfind("\n")
        before = before[before.rfind("\n", 0, max(line, 0)) + 1 :]
        if any(n != 1 for n in self.tokens_at_slot(request.options, before)):
            return None
        ids = []
        for option in request.options:
            encoded = self.tokenizer(f"{before}{option}\n", return_offsets_mapping=True)
            at = next(
                i for i, (a, b) in enumerate(encoded.offset_mapping) if a == len(before) and b > a
            )
            ids.append(encoded.input_ids[at])
        return ids

    def _context_cache(self, ids: list[int], request: LogprobQuery) -> Any:
        """Return keys and values of `ids`; those of the preamble are reused from the last call if it is equal."""
        from transformers import DynamicCache

        if not ids:
            return DynamicCache()
        previous, cache = self._shared
        n = _n_common([previous, ids]) if cache is not None else 0
        n_preamble = min(len(self.tokenizer(request.preamble).input_ids) - 1, len(ids) - 1)
        if n < n_preamble:
            # without a configuration, so that every layer holds every token: a sliding window
            # could not be cut back to a shorter prefix
            cache = DynamicCache()
            self._run(ids[:n_preamble], cache)
            self._shared, n = (ids[:n_preamble], cache), n_preamble
        extended = _of_first(self._shared[1], n)
        if n < len(ids):
            self._run(ids[n:], extended)
        return extended

    def _run(self, ids: list[int], cache: Any) -> None:
        with _Head(self.model, None, None):
            self.model(torch.tensor([ids], device=self._device), past_key_values=cache)

    def _batches(
        self, indices: list[int], ids: list[list[int]], n_shared: int
    ) -> Iterator[list[int]]:
        """Yield batches of requests of similar length, at most `BATCH_TOKENS` tokens or a single request."""
        batch: list[int] = []
        for i in sorted(indices, key=lambda i: -len(ids[i])):
            longest = len(ids[batch[0]]) if batch else 0
            # sorted from long to short: begin a new batch if a fifth would be padding, or at the limit
            short = len(ids[i]) - n_shared < 0.8 * (longest - n_shared)
            if batch and (short or (len(batch) + 1) * longest > BATCH_TOKENS):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _forward(
        self,
        rows: list[tuple[list[int], list[int]]],
        cache: Any,
        n_shared: int,
        options: list[int],
        full: bool,
    ) -> list[OptionLogprobs]:
        """Return the log-probabilities of `rows`: (token ids after the shared ones, indices of the slots in them)."""
        longest = max(len(ids) for ids, _ in rows)
        tokens = torch.zeros(len(rows), longest, dtype=torch.long)  # [B, S]
        mask = torch.zeros(len(rows), n_shared + longest, dtype=torch.long)
        mask[:, :n_shared] = 1
        for row, (ids, _) in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, n_shared : n_shared + len(ids)] = 1
        # logits at a token predict the next one, so those of the token before a slot are read
        predicting = [(row, p - 1) for row, (_, slots) in enumerate(rows) for p in slots]
        before = torch.tensor(predicting, device=self._device)  # [sum n, 2]
        with _Head(self.model, before, None if full else options) as head:
            self.model(
                tokens.to(self._device),
                attention_mask=mask.to(self._device),
                position_ids=torch.arange(n_shared, n_shared + longest, device=self._device)[None],
                past_key_values=_repeated(cache, len(rows)),
            )
        logits = head.logits[0]  # [sum n, V] or [sum n, O]
        return _option_logprobs(logits, [len(slots) for _, slots in rows], options, full)

    # --- chats and embeddings --------------------------------------------------------------------

    def _chat(self, requests: list[Chat]) -> list[Outcome]:
        """Return the continuations of conversations with the same settings, padded on the left."""
        from transformers import GenerationConfig, LogitsProcessorList

        started = time.monotonic()
        tokenizer, settings = self.tokenizer, requests[0]
        prompts = [self._template(r) for r in requests]
        rows = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
        ids, mask, cache = self._after_shared(rows)
        noise = LogitsProcessorList()
        if settings.temperature > 0:
            seeds = [int(key(r, self.identity)[:15], 16) for r in requests]
            noise.append(_GumbelNoise(seeds, settings.temperature))
        produced = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=GenerationConfig(
                max_new_tokens=completion_tokens(settings, self.thinking_tokens),
                do_sample=False,
                pad_token_id=self._pad,
                # thoughts may hold the text that ends an answer
                stop_strings=[settings.stop]
                if settings.stop and not self.thinking_tokens
                else None,
            ),
            logits_processor=noise,
            tokenizer=tokenizer,
        )
        new = produced[:, ids.shape[1] :]
        seconds = (time.monotonic() - started) / len(requests)
        outcomes: list[Outcome] = []
        for prompt, row, new_ids in zip(prompts, rows, new, strict=True):
            n = int((new_ids != self._pad).sum())
            kind, reason = FailureKind.EMPTY, "the model's answer is empty"
            try:
                text = self._answer(new_ids, prompt)
            except UnfinishedThoughts:
                text, cap = "", completion_tokens(settings, self.thinking_tokens)
                kind, reason = FailureKind.CUT, no_answer_before(cap, self.thinking_tokens)
            if text:
                outcomes.append(Answer(text, len(row), n, seconds))
            else:
                outcomes.append(Failure(kind, reason, len(row), n, seconds))
        return outcomes

    def _answer(self, new_ids: torch.Tensor, prompt: str) -> str:
        """Return the text of generated tokens without thoughts; raise `UnfinishedThoughts` if they do not end."""
        text = self.tokenizer.decode(new_ids, skip_special_tokens=True)
        # markers of thoughts are special tokens of some models
        whole = self.tokenizer.decode(new_ids, skip_special_tokens=False)
        answer = answer_after_thoughts(whole, opened=prompt_opens_thoughts(prompt))
        if answer is not whole:
            text = answer
            for token in self.tokenizer.all_special_tokens:
                text = text.replace(token, "")
        return text.strip()

    def _after_shared(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Return token ids and mask [B, S] of conversations, and keys and values of their common prefix.

        Masked padding separates the shared tokens from the other ones.
        """
        from transformers import DynamicCache

        n = min(_n_common(rows), min(map(len, rows)) - 1)
        previous, cache = self._shared_chat
        if previous != rows[0][:n] or cache is None:
            cache = DynamicCache()
            self._run(rows[0][:n], cache)
            self._shared_chat = (rows[0][:n], cache)
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self._pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            padding = longest - len(row)
            ids[i, :n], mask[i, :n] = torch.tensor(row[:n]), 1
            ids[i, n + padding :] = torch.tensor(row[n:])
            mask[i, n + padding :] = 1
        copies = _repeated(_of_first(cache, n), len(rows))
        return ids.to(self._device), mask.to(self._device), copies

    @property
    def _pad(self) -> int:
        tokenizer = self.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _template(self, request: Chat) -> str:
        messages = [{"role": role, "content": text} for role, text in request.messages]
        if self.tokenizer.chat_template:
            options = {"tokenize": False, "add_generation_prompt": True, **self._thinking_options}
            try:
                return self.tokenizer.apply_chat_template(messages, **options)
            except Exception:  # templates can raise any error: some do not support system messages
                messages = _without_system(messages)
                return self.tokenizer.apply_chat_template(messages, **options)
        # a base model: the conversation as plain text
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages) + "\n\nassistant:"

    @property
    def _thinking_options(self) -> dict[str, bool]:
        """Return the options that turn thinking on or off, of those that the chat template mentions."""
        template = str(self.tokenizer.chat_template)
        return {
            name: bool(self.thinking_tokens)
            for name in (
                "enable_thinking",
                "thinking",
            )  # of Qwen and others; of DeepSeek and Granite
            if re.search(rf"\b{name}\b", template)
        }

    def _embed(self, requests: list[Embed]) -> list[Outcome]:
        """Return the embedding of each text: the mean of the last hidden states over its tokens, [E]."""
        started = time.monotonic()
        outcomes: list[Outcome] = []
        for request in requests:
            ids = self.tokenizer(request.text, return_tensors="pt").input_ids.to(self._device)
            if not ids.numel():
                outcomes.append(Failure(FailureKind.EMPTY, "a text without tokens"))
                continue
            hidden = self.model.base_model(ids).last_hidden_state[0]  # [T, E]
            vector = hidden.float().mean(dim=0).cpu().numpy()
            outcomes.append(Answer(vector, ids.shape[1], 0))
        seconds = (time.monotonic() - started) / len(requests)
        return [
            Answer(o.value, o.prompt_tokens, 0, seconds) if isinstance(o, Answer) else o
            for o in outcomes
        ]


class _GumbelNoise:
    """Logits processor that turns greedy decoding into sampling from the softmax at a temperature.

    The argmax of logits / temperature plus Gumbel noise is such a sample (Gumbel 1954). Each row has its
    own generator, so that an answer does not depend on the other requests in its batch; the sampling of
    `generate` itself uses one generator for all rows.
    """

    def __init__(self, seeds: Sequence[int], temperature: float):
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        shape = scores.shape[1:]  # [B, V] without B
        uniform = torch.stack(
            [torch.rand(shape, generator=g, dtype=torch.float64) for g in self._generators]
        )
        gumbel = -(-uniform.log()).log()  # [B, V]; -inf where 0 was drawn
        return scores / self._temperature + gumbel.to(scores)


class _Head:
    """Context in which the model's output head computes only the logits that are needed, in float32.

    `before` [m, 2]: (row, token) of the hidden states to read, None for none; `columns`: token ids whose
    logits are needed, None for all of them. After a pass, `logits` is [1, m, V or O].

    Uses hooks on the head rather than a direct call, because the model's forward continues after the head:
    scaling and soft-capping of logits (Gemma 2 and others) still apply.
    """

    def __init__(self, model: Any, before: torch.Tensor | None, columns: list[int] | None):
        self._model, self._before, self._columns = model, before, columns
        self.logits = torch.zeros(1, 0, 0)

    def __enter__(self) -> "_Head":
        head = self._model.get_output_embeddings()
        self._hooks = [
            head.register_forward_pre_hook(self._gather),
            head.register_forward_hook(self._compute),
            self._model.register_forward_hook(self._keep),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _gather(self, _: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        hidden = inputs[0]  # [B, S, d]
        if self._before is None:
            return (hidden[:1, :0],)
        return (hidden[self._before[:, 0], self._before[:, 1]][None],)  # [1, m, d]

    def _compute(self, head: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> Any:
        weight, bias = head.weight, getattr(head, "bias", None)
        if self._columns is not None:
            weight = weight[self._columns]
            bias = None if bias is None else bias[self._columns]
        bias = None if bias is None else bias.float()
        return F.linear(inputs[0].float(), weight.float(), bias)

    def _keep(self, _: Any, __: Any, output: Any) -> None:
        self.logits = output.logits.float()


def _option_logprobs(
    logits: torch.Tensor, lengths: list[int], options: list[int], full: bool
) -> list[OptionLogprobs]:
    """Return the answer to each request, from logits [sum n, V] if `full`, else [sum n, O]."""
    chosen = logits[:, options] if full else logits  # [sum n, O]
    log_probs = chosen.log_softmax(-1).cpu().numpy()
    mass = ranks = None
    if full:
        mass = (chosen.logsumexp(-1) - logits.logsumexp(-1)).exp().cpu().numpy()
        ranks = _ranks(logits.topk(min(RANKED, logits.shape[1])).indices.cpu().numpy(), options)
    cuts = np.cumsum(lengths)[:-1]
    parts = [None if x is None else np.split(x, cuts) for x in (log_probs, mass, ranks)]
    return [
        OptionLogprobs(*(None if part is None else part[i] for part in parts))  # type: ignore[arg-type]
        for i in range(len(lengths))
    ]


def _ranks(best: NDArray, options: list[int]) -> NDArray[np.uint16]:
    """Return the rank of each option among the `best` tokens [m, RANKED] of each row, [m, O].

    The rank is `NO_RANK` if the option is not among them.
    """
    same = best[:, :, None] == np.array(options)  # [m, RANKED, O]
    return np.where(same.any(axis=1), same.argmax(axis=1), NO_RANK).astype(np.uint16)


def _group(request: Request) -> Any:
    """Return a key that is equal for requests that may share a batch."""
    if isinstance(request, LogprobQuery):
        return (LogprobQuery, request.preamble, request.context, request.options, request.full)
    if isinstance(request, Chat):
        return (Chat, request.max_tokens, request.temperature, request.seed, request.stop)
    return (type(request),)


def _slot_tokens(offsets: Sequence[tuple[int, int]], slots: Sequence[int]) -> list[int] | None:
    """Return the index of the token that begins at each slot, a character offset, [n].

    None if no token begins at one of the slots, or if it is the first token, which nothing predicts.
    """
    begins = {a: i for i, (a, b) in reversed(list(enumerate(offsets))) if b > a}
    tokens = [begins.get(slot, 0) for slot in slots]
    return tokens if tokens and min(tokens) > 0 else None


def _n_common(rows: list[list[int]]) -> int:
    """Return the length of the longest prefix that all rows share."""
    n = min(map(len, rows))
    for i in range(n):
        if any(row[i] != rows[0][i] for row in rows):
            return i
    return n


def _of_first(cache: Any, n: int) -> Any:
    """Return a cache of one row cut to its first `n` tokens; appending to it leaves the original unchanged."""
    return _changed(cache, lambda x: x[:, :, :n])


def _repeated(cache: Any, n: int) -> Any:
    """Return a cache of one row repeated for `n` rows."""
    return _changed(cache, lambda x: x.expand(n, -1, -1, -1))


def _changed(cache: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a cache with `change` applied to keys and values [B, heads, T, d] of each layer.

    The results are views: nothing is copied. That is safe because `DynamicCache` concatenates when it grows
    and never writes into its existing tensors.
    """
    changed = copy.copy(cache)
    changed.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in changed.layers:
        layer.keys, layer.values = change(layer.keys), change(layer.values)
    return changed


def _without_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the messages with the system message put before the first user message."""
    if messages[0]["role"] != "system" or len(messages) < 2:
        return messages
    joined = messages[0]["content"] + "\n\n" + messages[1]["content"]
    return [{"role": "user", "content": joined}, *messages[2:]]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return torch.float32
    return torch.bfloat16 if re.search(r"\b(avx512_bf16|amx_bf16)\b", flags) else torch.float32
