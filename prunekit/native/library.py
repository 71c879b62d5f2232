"""The C++ kernels as a shared library, compiled once per machine, cached, and called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

from prunekit.errors import CheckpointError, PrunekitError
from prunekit.utils.io import cache_folder, os_error_reason, sha256, write_atomic

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-std=c++17")
COMPILE_TIMEOUT = 120  # seconds

_POINTER, _INT64, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
_TRAINING = {
    "norm_act": [*[_POINTER] * 4, _INT, *[_DOUBLE] * 2, *[_POINTER] * 5, *[_INT64] * 3, _INT],
    "norm_act_backward": [*[_POINTER] * 5, *[_INT64] * 3, _INT],
    "depthwise": [*[_POINTER] * 3, *[_INT64] * 4, _INT],
    "depthwise_kernel": [*[_POINTER] * 3, *[_INT64] * 4, _INT],
}
SIGNATURES = {
    **{f"{name}_{kind}": arguments for name, arguments in _TRAINING.items() for kind in ("float", "double")},
    # Inference is only in float32.
    "infer_conv": [*[_POINTER] * 16, *[_INT64] * 10, _INT],
    "infer_depthwise": [*[_POINTER] * 5, *[_INT64] * 4, _INT],
    "infer_upsample": [*[_POINTER] * 4, *[_INT64] * 6, _INT],
    "infer_pool": [*[_POINTER] * 2, *[_INT64] * 4, _INT, _INT],
}
SOURCES = ("kernels.cpp", "inference.cpp")


class NoKernels(PrunekitError):
    """The kernels are not available; the message says why."""


@functools.cache
def load() -> ctypes.CDLL | NoKernels:
    """Return the library, compiled on the first call on this machine, or the reason why there is none."""
    try:
        return _load()
    except NoKernels as error:
        return error


def _load() -> ctypes.CDLL:
    if os.environ.get("PRUNEKIT_KERNELS", "1") == "0":
        raise NoKernels("PRUNEKIT_KERNELS is 0")
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++")
    if compiler is None:
        raise NoKernels("there is no C++ compiler; install g++, or set CXX")
    sources = {name: resources.files("prunekit.native").joinpath(name).read_bytes() for name in SOURCES}
    # -march=native depends on the machine, and machines may share a home folder.
    machine = f"{platform.machine()} {_processor()}"
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=COMPILE_TIMEOUT
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernels(f"{compiler} does not start") from error
    texts = (" ".join(FLAGS), version, machine)
    key = sha256(b"\0".join([*sources.values(), *(text.encode() for text in texts)]))
    path = cache_folder() / "kernels" / f"{key[:32]}.so"
    for recompile in (False, True):
        if recompile or not _is_intact(path):
            _compile(compiler, sources, path)
        try:
            library = ctypes.CDLL(str(path))
            for name, arguments in SIGNATURES.items():
                function = getattr(library, name)
                function.argtypes, function.restype = arguments, None
            return library
        except (OSError, AttributeError) as error:
            reason = error
    raise NoKernels(f"{path} does not load ({reason})")


def _compile(compiler: str, sources: dict[str, bytes], path: Path) -> None:
    """Compile the library and write it to ``path`` atomically, followed by its checksum."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            library = Path(folder) / "kernels.so"
            for name, source in sources.items():
                (Path(folder) / name).write_bytes(source)
            command = [compiler, *FLAGS, *(str(Path(folder) / name) for name in sources), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
                raise NoKernels(f"{compiler} fails ({reason})")
            data = library.read_bytes()
        # The loader ignores what follows the sections of the file.
        write_atomic(path, data + sha256(data).encode())
    except subprocess.TimeoutExpired as error:
        raise NoKernels(f"{compiler} takes more than {COMPILE_TIMEOUT} s") from error
    except (OSError, CheckpointError) as error:
        reason = os_error_reason(error) if isinstance(error, OSError) else str(error)
        raise NoKernels(
            f"cannot compile in {path.parent} ({reason}); set PRUNEKIT_CACHE to a writable folder"
        ) from error


def _is_intact(path: Path) -> bool:
    """Whether a library matches its checksum; a damaged one may load and compute wrong values."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return sha256(data[:-64]).encode() == data[-64:]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return " ".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))
