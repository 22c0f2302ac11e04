"""A small OpenAI-compatible server on 127.0.0.1 that answers sensibly, and fails as it is told to.

    with LLMServer() as server:
        backend = ServerBackend("tiny", server.base_url)

It tokenises with a byte-level BPE of its own, echoes prompts with log-probabilities and offsets, and
says levels that are high where a line's token is a word of the explanation. From a script:
`python tests/llm_server.py --rate 0.3 --seed 1` prints its address and serves until it is stopped.
"""

import argparse
import contextlib
import hashlib
import json
import math
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

MODEL = "tiny"
LINES = [
    "def total(values): return sum(values) / len(values)",
    "names of cities, numbers and animals: the fox, the heron 12 10 9 8 7",
    "Neuron reacts to: words of a text\nthe\t0\nfox\t10\nCafé, 中文 and 😀\t3\n",
]
VOCABULARY = 320
WIDTH = 16
"""of an embedding"""


class Fault(StrEnum):
    """What may happen to a request."""

    STALL = "stall"
    """nothing comes, for `LLMServer.stall` seconds"""
    DRIBBLE = "dribble"
    """a header, then a byte now and then, for as long"""
    DROP = "drop"
    """the connection is closed before the answer"""
    CUT = "cut"
    """the connection is closed in the middle of the answer"""
    BUSY = "busy"
    """429 with Retry-After"""
    ERROR = "error"
    """500, whose message tells the request's own Authorization header"""
    TRUNCATED = "truncated"
    """200 with the first half of the JSON"""
    WRONG_COUNT = "wrong count"
    """numbers, or tokens of the prompt, are missing; a chat is answered"""
    REFUSAL = "refusal"
    """the model declines; an embedding is answered"""
    EMPTY = "empty"
    """no text, no log-probabilities, an empty vector"""
    GARBAGE = "garbage"
    """100 KB of letters, as the text of a chat, else as the whole body"""


RETRIED = (Fault.DROP, Fault.CUT, Fault.BUSY, Fault.ERROR)
"""faults that a client tries again after"""


@dataclass(frozen=True)
class Call:
    """One HTTP request as it came."""

    path: str
    body: dict[str, Any]
    content: str
    """sha256 of path and body: equal for equal requests"""
    attempt: int
    """times that the same content came before"""


Faults = Callable[[int, Call], Fault | None]
"""from the server's seed and a call, what happens to it; None: it is answered"""


def storm(rate: float, among: Iterable[Fault] = tuple(Fault)) -> Faults:
    """Faults at random, a share `rate` of all calls, decided by seed, content and attempt alone."""
    kinds = list(among)

    def fault(seed: int, call: Call) -> Fault | None:
        draw = _draw(f"{seed} {call.content} {call.attempt}")
        return kinds[int(draw / rate * len(kinds))] if draw < rate else None

    return fault


def always(fault: Fault, attempts: float = math.inf) -> Faults:
    """One fault, at each content's first `attempts` attempts."""
    return lambda seed, call: fault if call.attempt < attempts else None


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Print nothing: a connection that the test dropped is no error, and tests read the error output."""


class LLMServer:
    """A context manager; its public attributes may be changed while it runs.

    `offsets`: "true" tells where in the prompt each token begins; "decoded" adds up the lengths of
    decoded tokens, as vLLM does, which drifts after characters cut over two tokens. `bos`: a begin
    token `<s>` is in front of every prompt, and counted, as vLLM does.
    """

    def __init__(
        self,
        faults: Faults | None = None,
        seed: int = 0,
        *,
        key: str = "",
        echo: bool = True,
        schema: bool = True,
        max_logprobs: int = 20,
        offsets: Literal["true", "decoded"] = "true",
        bos: bool = False,
        delay: float = 0.0,
        stall: float = 30.0,
        retry_after: float | str = 0.01,
        override: Callable[[Call], tuple[int, dict[str, Any]] | None] | None = None,
    ):
        """`key`: the only one that is let in, empty: all are. `echo`, `schema`: whether prompts are
        echoed, whether response_format is taken. `delay`, `stall`, `retry_after`: seconds, the
        last also as a date. `override`: status and body of a call, None for the usual ones."""
        self.override = override
        self.faults, self.seed, self.key = faults, seed, key
        self.echo, self.schema, self.max_logprobs = echo, schema, max_logprobs
        self.offsets, self.bos = offsets, bos
        self.delay, self.stall, self.retry_after = delay, stall, retry_after
        self.requests: Counter[str] = Counter()
        """times that each content came"""
        self.answered: Counter[str] = Counter()
        """times that each content was answered without a fault"""
        self.calls: list[Call] = []
        self.faults_served: Counter[Fault] = Counter()
        self.most_at_once = 0
        """the most requests that were in the server at a time"""
        self.tokenizer = _tokenizer()
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._now = 0

    def __enter__(self) -> "LLMServer":
        self.closing.clear()
        self._http = _QuietServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Closes the port: what is in flight ends, and further connections are refused."""
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    @property
    def now(self) -> int:
        """Requests in the server."""
        return self._now

    @contextlib.contextmanager
    def taking(self, path: str, body: dict[str, Any]):
        """Books one request in, and out at the end."""
        text = json.dumps([path, body], sort_keys=True)
        content = hashlib.sha256(text.encode()).hexdigest()
        with self._lock:
            call = Call(path, body, content, self.requests[content])
            self.requests[content] += 1
            self.calls.append(call)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield call
        finally:
            with self._lock:
                self._now -= 1

    def fault(self, call: Call) -> Fault | None:
        """What happens to a call, counted."""
        found = self.faults(self.seed, call) if self.faults else None
        with self._lock:
            if found is None:
                self.answered[call.content] += 1
            else:
                self.faults_served[found] += 1
        return found

    def answer(self, call: Call, fault: Fault | None) -> tuple[int, dict[str, Any]]:
        """Status and body."""
        body = call.body
        other = self.override(call) if self.override else None
        if other is not None:
            return other
        if body.get("model") != MODEL:
            return 404, _error(f"no model {body.get('model')}")
        if call.path == "/v1/chat/completions":
            return self._chat(body, fault)
        if call.path == "/v1/completions":
            return self._completion(body, fault)
        if call.path == "/v1/embeddings":
            vector = [] if fault in (Fault.EMPTY, Fault.WRONG_COUNT) else embedding(body["input"])
            usage = {"prompt_tokens": self.n_tokens(body["input"])}
            return 200, {"data": [{"index": 0, "embedding": vector}], "usage": usage}
        return 404, _error(f"no such path: {call.path}")

    def _chat(self, body: dict[str, Any], fault: Fault | None) -> tuple[int, dict[str, Any]]:
        wanted = body.get("response_format")
        if wanted and not self.schema:
            return 400, _error("response_format is not supported")
        prompt = "\n".join(message["content"] for message in body["messages"])
        text = self._values(body, prompt, fault) or explanation_of(prompt)
        finish, message = "stop", {"role": "assistant", "content": text, "refusal": None}
        if fault == Fault.REFUSAL:
            message = {"role": "assistant", "content": None, "refusal": "I cannot help with\nthat."}
        elif fault == Fault.EMPTY:
            message["content"] = " \n"
        elif fault == Fault.GARBAGE:
            message["content"], finish = "garbage " * 12_800, "length"
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return 200, {"choices": [choice], "usage": self._usage(prompt, text)}

    def _values(self, body: dict[str, Any], prompt: str, fault: Fault | None) -> str:
        """JSON with numbers, where the schema or the conversation asks for it; else empty."""
        schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
        if schema:
            values = schema["properties"]["values"]
            n, low, high = (
                values["minItems"],
                values["items"]["minimum"],
                values["items"]["maximum"],
            )
        elif asked := re.search(r"Give (\d+) integers", prompt):
            n, low, high = int(asked[1]), 0, 9
        else:
            return ""
        numbered = re.findall(r"^\d+[\t:]\s?(.*)$", body["messages"][-1]["content"], re.MULTILINE)
        tokens = (numbered + [""] * n)[:n]
        levels = [min(high, max(low, level(prompt, token))) for token in tokens]
        return json.dumps({"values": levels[:-2] if fault == Fault.WRONG_COUNT else levels})

    def _completion(self, body: dict[str, Any], fault: Fault | None) -> tuple[int, dict[str, Any]]:
        prompt, n_top = body["prompt"], body.get("logprobs") or 0
        if n_top > self.max_logprobs:
            return 400, _error(f"logprobs: at most {self.max_logprobs}")
        if body.get("echo") and not self.echo:
            return 400, _error("Only no echo is supported")
        told = self.echoed(prompt, n_top)
        if fault == Fault.WRONG_COUNT:
            told = {name: column[: len(column) // 2] for name, column in told.items()}
        finish = "content_filter" if fault == Fault.REFUSAL else "length"
        choice = {
            "index": 0,
            "text": prompt + told["tokens"][-1],
            "logprobs": None if fault in (Fault.EMPTY, Fault.REFUSAL) else told,
            "finish_reason": finish,
        }
        return 200, {"choices": [choice], "usage": self._usage(prompt, "x")}

    def echoed(self, prompt: str, n_top: int) -> dict[str, list[Any]]:
        """`logprobs` of a completion: each token of the prompt, then one that was generated."""
        encoding = self.tokenizer.encode(prompt)
        begins = [begin for begin, _ in encoding.offsets]
        tokens = self._strings(prompt, encoding)
        tops: list[dict[str, float] | None] = [
            likely(prompt[:begin], n_top, token)
            for begin, token in zip(begins, tokens, strict=True)
        ]
        begins, tokens, tops = [*begins, len(prompt)], [*tokens, "7"], [*tops, {"7": -0.1}]
        if self.bos:
            begins, tokens, tops = [0, *(b + 3 for b in begins)], ["<s>", *tokens], [None, *tops]
        if self.offsets == "decoded":
            begins = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
        tops[0] = None  # nothing stands before the first
        told = [top and top[token] for top, token in zip(tops, tokens, strict=True)]
        return {
            "text_offset": begins,
            "tokens": tokens,
            "token_logprobs": told,
            "top_logprobs": tops,
        }

    def _strings(self, prompt: str, encoding: Any) -> list[str]:
        """Of each token; of a character cut over several: the last has it, or none ("decoded")."""
        strings = []
        spans = encoding.offsets
        for i, (begin, end) in enumerate(spans):
            following = spans[i + 1][0] if i + 1 < len(spans) else len(prompt)
            cut = following < end or (i > 0 and spans[i - 1][1] > begin)
            if cut and self.offsets == "decoded":
                strings.append("\ufffd")
            else:
                strings.append(prompt[begin : min(end, following)])
        return strings

    def n_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text).ids)

    def _usage(self, prompt: str, said: str) -> dict[str, int]:
        counts = {"prompt_tokens": self.n_tokens(prompt), "completion_tokens": self.n_tokens(said)}
        return {**counts, "total_tokens": sum(counts.values())}


def explanation_of(prompt: str) -> str:
    """The word in guillemets that the prompt has most of; without any, a word of its own."""
    marked = Counter(word.strip() for word in re.findall("«(.*?)»", prompt) if word.strip())
    word = max(sorted(marked), key=marked.__getitem__) if marked else f"thing {_draw(prompt):.4f}"
    return f"the token {word}"


def level(before: str, token: str) -> int:
    """0..9: high where the token is part of the last explanation before it."""
    told = re.findall(r"^(?:Neuron reacts to|Description): (.*)$", before, re.MULTILINE)
    words = re.findall(r"\S+", told[-1].lower()) if told else []
    noise = int(2 * _draw(f"{token} {words}"))
    return 8 + noise if token.strip().lower() in words else noise


def likely(before: str, n_top: int, stands: str) -> dict[str, float]:
    """Log-probabilities of what could stand after `before`: the `n_top` likeliest tokens, and what does."""
    line = before.rsplit("\n", 1)[-1]
    best = level(before, line.rstrip("\t"))
    tilt = _draw(before)  # every place has its own distribution
    weights = {str(d): math.exp(-abs(d - best) - 0.5 * tilt * (d + 1)) for d in range(10)}
    weights |= {f" {d}": 0.001 for d in range(10)} | {"\ufffd": 0.002, "\n": 0.004 + tilt / 99}
    weights.setdefault(stands, 1e-6)
    total = sum(weights.values())
    ordered = sorted(weights, key=lambda t: -weights[t])[:n_top]
    return {token: math.log(weights[token] / total) for token in dict.fromkeys([*ordered, stands])}


def embedding(text: str) -> list[float]:
    """[WIDTH] words counted into places by their hash: texts that share words are near."""
    vector = [0.0] * WIDTH
    for word in re.findall(r"\w+", text.lower()) or [""]:
        vector[int(_draw(word) * WIDTH)] += 1.0
    return vector


def _draw(text: str) -> float:
    """0..1, the same for the same text everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error"}}


def _tokenizer() -> Tokenizer:
    """Byte-level BPE: 256 bytes and the merges of `LINES`, so that rare characters are cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def _handler(server: LLMServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a test's output is its own."""

        def do_GET(self) -> None:
            known = self.path == "/v1/models"
            body = {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
            self._send(200 if known else 404, body if known else _error("no such path"))

        def do_POST(self) -> None:
            if server.closing.is_set():  # a connection that was kept
                self._hang_up()
                return
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with (
                contextlib.suppress(ConnectionError, TimeoutError),
                server.taking(self.path, body) as call,
            ):
                server.closing.wait(server.delay)
                if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                    self._send(401, _error(f"wrong key: {self.headers.get('Authorization')}"))
                    return
                self._serve(call, server.fault(call))

        def _serve(self, call: Call, fault: Fault | None) -> None:
            if fault == Fault.BUSY:
                wait = {"Retry-After": str(server.retry_after)}
                self._send(429, _error("too many requests"), wait)
            elif fault == Fault.ERROR:
                self._send(500, _error(f"failed with {self.headers.get('Authorization')}"))
            elif fault in (Fault.STALL, Fault.DRIBBLE):
                self._dawdle(dribble=fault == Fault.DRIBBLE)
            elif fault == Fault.DROP:
                self._hang_up()
            else:
                status, body = server.answer(call, fault)
                self._send(status, body, fault=fault)

        def _send(
            self,
            status: int,
            body: dict[str, Any],
            headers: dict[str, str] | None = None,
            fault: Fault | None = None,
        ) -> None:
            content = json.dumps(body).encode()
            if fault == Fault.TRUNCATED:
                content = content[: len(content) // 2]
            if fault == Fault.GARBAGE and "/chat/" not in self.path:
                content = b"garbage " * 12_800
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if fault == Fault.CUT else content)
            if fault == Fault.CUT:
                self._hang_up()

        def _dawdle(self, *, dribble: bool) -> None:
            """Until the client goes, the server closes or the time is over."""
            if dribble:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", "1000000")
                self.end_headers()
            until = time.monotonic() + server.stall
            while time.monotonic() < until and not server.closing.wait(0.05):
                if dribble:
                    self.wfile.write(b" ")
                elif self._gone():
                    break
            self._hang_up()

        def _gone(self) -> bool:
            try:
                flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
                return self.connection.recv(1, flags) == b""
            except BlockingIOError:
                return False

        def _hang_up(self) -> None:
            self.wfile.flush()
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(description="serve a made-up model that fails now and then")
    parser.add_argument("--rate", type=float, default=0.0, help="share of requests that fail")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--stall", type=float, default=30.0, help="seconds a stall lasts")
    options = parser.parse_args()
    faults = storm(options.rate) if options.rate else None
    with LLMServer(faults, options.seed, stall=options.stall) as server:
        print(server.base_url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
