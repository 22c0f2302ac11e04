"""`cratelm view`: serve the neuron browser on this machine, or write it into a folder."""

import contextlib
import errno
import gc
import os
import socket
from typing import Any

from cratelm.errors import InputError, missing_extra
from cratelm.viewer.config import ViewConfig
from cratelm.viewer.run_reader import Library


def view(config: ViewConfig) -> Any:
    """Serve the runs until interrupted, or write their pages into a folder and return what was written.

    Raises `InputError` if a run does not exist, the port is in use, or the extra `viewer` is not installed.
    """
    library = Library(config.runs)
    for key in library.keys:
        library.run(key)  # report a damaged run before the server starts
    if config.static is not None:
        from cratelm.viewer.static_site import check_folder, export

        check_folder(config.static, config.force)  # before the index is made, which takes long
        for key in library.keys:
            library.index_of(key).build()
        return export(library, config.static, config.neurons, config.force, quiet=config.quiet)
    _serve(config, library)
    return ""


def _serve(config: ViewConfig, library: Library) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # pages must not wait for the network
    try:
        import uvicorn

        from cratelm.viewer.server import application
    except ImportError as error:
        otherwise = ", or write the pages with --static"
        raise missing_extra("viewer", "the browser", str(error.name), otherwise) from None
    listening = _listen(config.host, config.port)
    live = None
    if config.live:
        from cratelm.viewer.live import Live
        from cratelm.viewer.live_endpoints import router

        live = router(Live(library, config))
    library.start_indexing()
    app = application(library, config.host, live)
    gc.freeze()  # what exists now lives as long as the server: without it, every full collection searches it again
    port = listening.getsockname()[1]
    host = f"[{config.host}]" if ":" in config.host else config.host
    print(f"http://{host}:{port}/  (Ctrl-C stops)", flush=True)
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=2
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after shutting down
        uvicorn.Server(settings).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address; port 0 selects any free port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise InputError(
                f"port {port} of {host} is in use: type --port {port + 1}, or --port 0 for a free port"
            ) from None
        raise InputError(
            f"cannot listen on {host}:{port} ({error}): give an address of this machine with --host"
        ) from None
    listening.listen(128)
    return listening
