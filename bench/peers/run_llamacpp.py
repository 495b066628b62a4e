"""Runner for llama.cpp's server; runs inside its environment, see protocol.py.

`extra["server"]` names a `llama-server` that was compiled for this processor; where it is empty the server inside the
package `xllamacpp` is used, whose build knows no more than AVX2. Both are asked the same way, over HTTP on loopback.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time

from protocol import Generate, Options, Prompts, serve


def load(options: Options) -> Generate:
    """One slot per sequence, each with room for the longest; flash attention; llama.cpp's own batch sizes."""
    host, port = _start_native(options) if options.extra["server"] else _start_package(options)

    def generate(prompts: Prompts, new_tokens: int) -> list[int]:
        body = {
            "prompt": prompts if len(prompts) > 1 else prompts[0],
            "n_predict": new_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "cache_prompt": options.prefix_cache,
        }
        answer = _post(host, port, body)
        results = answer if isinstance(answer, list) else [answer]
        return [result["tokens_predicted"] for result in results]

    return generate


def _start_native(options: Options) -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [options.extra["server"], "--model", options.model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--threads", str(options.threads), "--threads-batch", str(options.threads), "--offline"]
    command += ["--parallel", str(options.max_concurrency), "--no-kv-unified", "--flash-attn", "on"]
    command += ["--ctx-size", str(options.max_concurrency * options.max_tokens), "--cache-ram", "0"]
    command += ["--slot-prompt-similarity", "0.1" if options.prefix_cache else "0"]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2)
    while server.poll() is None:
        if _healthy("127.0.0.1", port):
            return "127.0.0.1", port
        time.sleep(0.2)
    raise RuntimeError(f"llama-server ended with status {server.returncode} while loading")


def _start_package(options: Options) -> tuple[str, int]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.n_parallel, params.n_ctx = options.max_concurrency, options.max_concurrency * options.max_tokens
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.kv_unified, params.cache_ram_mib = False, 0
    params.slot_prompt_similarity = 0.1 if options.prefix_cache else 0.0
    _start_package.server = xllamacpp.Server(params)  # type: ignore[attr-defined]  # it ends when it is collected
    address = _start_package.server.listening_address  # type: ignore[attr-defined]
    host, _, port = address.removeprefix("http://").rpartition(":")
    return host, int(port)


def _healthy(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _post(host: str, port: int, body: dict[str, object]):
    """Answers take as long as the work does: no time limit here, the driver has one."""
    connection = http.client.HTTPConnection(host, port)
    connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"llama.cpp answered {response.status}: {text[:500].decode(errors='replace')}")
    return json.loads(text)


if __name__ == "__main__":
    os.environ.setdefault("LLAMA_ARG_NO_WEBUI", "1")
    serve(load)
