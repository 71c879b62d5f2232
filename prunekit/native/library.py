"""The kernels as a library: compiled once for a machine with the compiler that is there, and kept.

Plain C functions over addresses, called through ctypes: nothing of PyTorch is compiled against, so it takes three
seconds, and a new version of PyTorch needs no new library. The library asks for the same OpenMP as PyTorch by name and
so shares its threads.
"""

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
LONGEST = 120  # seconds that the compiler may take

_POINTER, _NUMBER, _COUNT, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
SIGNATURES = {
    "norm_act": [*[_POINTER] * 4, _COUNT, *[_REAL] * 2, *[_POINTER] * 5, *[_NUMBER] * 3, _COUNT],
    "norm_act_backward": [*[_POINTER] * 5, *[_NUMBER] * 3, _COUNT],
    "depthwise": [*[_POINTER] * 3, *[_NUMBER] * 4, _COUNT],
    "depthwise_kernel": [*[_POINTER] * 3, *[_NUMBER] * 4, _COUNT],
}
# In float32 alone.
INFERENCE = {
    "infer_conv": [*[_POINTER] * 16, *[_NUMBER] * 10, _COUNT],
    "infer_depthwise": [*[_POINTER] * 5, *[_NUMBER] * 4, _COUNT],
    "infer_upsample": [*[_POINTER] * 4, *[_NUMBER] * 6, _COUNT],
    "infer_pool": [*[_POINTER] * 2, *[_NUMBER] * 4, _COUNT, _COUNT],
}
SOURCES = ("kernels.cpp", "inference.cpp")


class NoKernels(PrunekitError):
    """The kernels cannot be had here; says why."""


@functools.cache
def load() -> ctypes.CDLL | NoKernels:
    """The library, compiled at the first call on this machine; or why there is none."""
    try:
        return _load()
    except NoKernels as why:
        return why


def _load() -> ctypes.CDLL:
    if os.environ.get("PRUNEKIT_KERNELS", "1") == "0":
        raise NoKernels("PRUNEKIT_KERNELS is 0")
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++")
    if compiler is None:
        raise NoKernels("there is no C++ compiler; install g++, or name one in CXX")
    sources = {name: resources.files("prunekit.native").joinpath(name).read_bytes() for name in SOURCES}
    # What -march=native means differs from machine to machine, and home folders are shared.
    machine = f"{platform.machine()} {_processor()}"
    key = sha256(
        b"\0".join([*sources.values(), " ".join(FLAGS).encode(), _version(compiler).encode(), machine.encode()])
    )
    path = cache_folder() / "kernels" / f"{key[:32]}.so"
    for fresh in (False, True):
        if fresh or not _is_whole(path):
            _compile(compiler, sources, path)
        try:
            return _typed(ctypes.CDLL(str(path)))
        except (OSError, AttributeError) as error:
            broken = error
    raise NoKernels(f"{path} does not load ({broken})")


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, arguments in SIGNATURES.items():
        for kind in ("float", "double"):
            function = getattr(library, f"{name}_{kind}")
            function.argtypes, function.restype = arguments, None
    for name, arguments in INFERENCE.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def _compile(compiler: str, sources: dict[str, bytes], path: Path) -> None:
    """Put the library at ``path``, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / "kernels.so"
            for name, source in sources.items():
                (Path(folder) / name).write_bytes(source)
            command = [compiler, *FLAGS, *(str(Path(folder) / name) for name in sources), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
            if done.returncode:
                said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
                raise NoKernels(f"{compiler} fails ({said})")
            data = made.read_bytes()
        # What loads such a file looks at nothing behind its sections.
        write_atomic(path, data + sha256(data).encode())
    except subprocess.TimeoutExpired as error:
        raise NoKernels(f"{compiler} takes more than {LONGEST} s") from error
    except (OSError, CheckpointError) as error:
        why = os_error_reason(error) if isinstance(error, OSError) else str(error)
        raise NoKernels(f"cannot compile in {path.parent} ({why}); set PRUNEKIT_CACHE to a folder") from error


def _is_whole(path: Path) -> bool:
    """Whether a library ends with its checksum: a damaged one may load, and compute something else or crash."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return sha256(data[:-64]).encode() == data[-64:]


def _version(compiler: str) -> str:
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=LONGEST)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernels(f"{compiler} does not start") from error
    return done.stdout


def _processor() -> str:
    """What tells processors apart, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return " ".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))
