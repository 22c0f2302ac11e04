"""llama.cpp's own server, from the package `xllamacpp`, on 127.0.0.1: `python llama_cpp_server.py FILE.gguf PORT`.

It serves until it is stopped.
"""

import sys
import threading

import xllamacpp  # type: ignore[import-not-found]


def main(file: str, port: int) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.hostnames, params.port = ["127.0.0.1"], port
    params.n_ctx, params.n_parallel = 8192, 2
    # one thread: others would wait for each other in busy loops where the cores are shared
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
