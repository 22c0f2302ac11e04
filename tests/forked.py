"""Processes that begin with cratelm and torch imported, which takes an interpreter longer than most tests."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "cratelm.pipelines.demo",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "undrawn",
    ]
)


def run_ranks(count: int, folder: Path, body: Callable[..., None], *arguments: Any) -> None:
    """Call `body(*arguments)` in some processes, which `torchrun` might have started, and wait for all of them.

    If one fails, the others are ended, and its error is raised.
    """
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    ranks = []
    for rank in range(count):
        variables = {k: str(v) for k, v in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        error = folder / f"rank-{rank}.txt"
        ranks.append(FORKED.Process(target=_rank, args=(variables, error, body, *arguments)))
    for process in ranks:
        process.start()
    began = time.monotonic()
    while any(process.exitcode is None for process in ranks):
        failed = any(process.exitcode for process in ranks)
        if failed or time.monotonic() - began > 600:
            for process in ranks:
                process.kill()
        time.sleep(0.02)
    errors = [path.read_text() for path in sorted(folder.glob("rank-*.txt"))]
    assert [process.exitcode for process in ranks] == [0] * count, "\n".join(errors)[-9000:]


def _rank(
    variables: dict[str, str], error: Path, body: Callable[..., None], *arguments: Any
) -> None:
    import torch

    os.environ |= variables
    torch.set_num_threads(1)
    try:
        body(*arguments)
    except BaseException:
        error.write_text(traceback.format_exc())
        raise
