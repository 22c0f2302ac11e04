"""A process that has imported cratelm, and forks the ranks of a command, as `torchrun` would start them.

Ranks that are forked cost the time of the command, not that of an interpreter with torch each. Like `torchrun`, the
server gives each rank its environment, and ends the others by SIGTERM when one fails. Requests and answers are lines of
JSON on standard input and output; `RankServer` is the other end.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 60.0
"""seconds after which a command counts as hanging"""
HARVEST = (
    "harvest --run run --model crate-2l --name made --tokens 2000 --top 6 --random 5 --per-bin 3 --context 8"
    " --short-context 2 --pilot-tokens 128 --batch-tokens 48 --device cpu"
)
"""about 40 batches of up to three sequences in each split"""
MODULES = (
    "activations.harvest",
    "steer.effects",
    "replace.replace",
    "analysis.analyze",
    "explain.explain",
    "runs.check",
)


@dataclass(frozen=True)
class Outcome:
    """How the ranks of a command ended."""

    statuses: list[int]
    """exit status of each rank; -9 after SIGKILL"""
    outputs: list[str]
    """standard output and standard error of each rank"""


class RankServer:
    """Client of a server; `close` ends it."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def run(self, command: str, folder: Path, ranks: int = 1, *, fails: str = "") -> Outcome:
        """Run `cratelm COMMAND` in a folder with some ranks.

        `fails` is `RANK:FUNCTION:CALL:HOW`: at that call of a function (`module:name`), the rank is killed (`kill`) or
        has an error (`error`).
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"command": command, "folder": str(folder), "ranks": ranks, "fails": fails}
        self._process.stdin.write(json.dumps(request) + "\n")
        line = self._process.stdout.readline()
        assert line, "the server has died"
        return Outcome(**json.loads(line))

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


# ---- in a rank ------------------------------------------------------------------------------------


def rank(request: dict[str, Any], number: int, port: int, output: Path) -> None:
    """Run the command as one of its ranks."""
    with output.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(request["folder"])
    n_ranks = request["ranks"]
    if n_ranks > 1:
        os.environ |= {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(n_ranks),
            "LOCAL_WORLD_SIZE": str(n_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    fails, _, how = request["fails"].partition(":")
    if fails == str(number):
        install(*how.rsplit(":", 2))
    before = set(sys.modules)
    from cratelm.cli import main

    status = 1
    try:
        status = main(request["command"].split())
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        output.with_suffix(".modules").write_text(" ".join(set(sys.modules) - before))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def install(function: str, call: str, how: str) -> None:
    """Let a call of a function kill the process, or fail."""
    from cratelm.errors import InputError

    module, _, name = function.partition(":")
    owner: Any = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), [0]

    def replaced(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == int(call):
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise InputError("a fault of this rank alone")
        return real(*arguments, **options)

    setattr(owner, name, replaced)


# ---- the server -----------------------------------------------------------------------------------


def run(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a request in forked ranks and return their outcome."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    outputs = [folder / f"{number}.out" for number in range(request["ranks"])]
    sys.stdout.flush()
    children: dict[int, int] = {}
    for number, output in enumerate(outputs):
        process = os.fork()
        if process == 0:
            rank(request, number, port, output)
        children[process] = number
    statuses = [0] * len(children)
    began, is_ending = time.monotonic(), False
    while children:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            number = children.pop(process)
            statuses[number] = os.waitstatus_to_exitcode(status)
            if statuses[number] and not is_ending:
                is_ending = True
                for other in children:
                    os.kill(other, signal.SIGTERM)
        elif time.monotonic() - began > LIMIT:
            for other in children:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.02)
    for module in modules(folder):  # once, for all later children
        import_quietly(module)
    texts = [output.read_text(encoding="utf-8", errors="replace") for output in outputs]
    return {"statuses": statuses, "outputs": texts}


def modules(folder: Path) -> set[str]:
    """The modules that the ranks of a command imported."""
    files = list(folder.glob("*.modules"))
    names = {name for file in files for name in file.read_text().split()}
    for file in files:
        file.unlink()
    return names


def import_quietly(name: str) -> None:
    """Import a module if it can be imported by itself."""
    try:
        importlib.import_module(name)
    except Exception:
        return


def serve() -> None:
    """Answer requests until standard input is closed."""
    import tempfile

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever imports print is no answer
    import torch
    import torch.distributed

    for module in MODULES:
        importlib.import_module(f"cratelm.{module}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            answers.write(json.dumps(run(json.loads(line), Path(folder))) + "\n")
            answers.flush()


if __name__ == "__main__":
    serve()
