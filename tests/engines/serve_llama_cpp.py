"""Serve a GGUF file until standard input ends: `python -m tests.engines.serve_llama_cpp PATH`."""

import sys

import xllamacpp


def main() -> None:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = sys.argv[1]
    parameters.n_ctx = 2048
    parameters.n_parallel = 4
    parameters.port = 0
    parameters.warmup = False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    # Keys and values in full, so that its numbers may be held to others.
    whole = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cache_type_k, parameters.cache_type_v = whole, whole
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
