"""Runs the command line over and over, each time in a process of its own, and ends that at a moment that is chosen.

As a program this file is the parent of those processes: it imports what a run needs, once, and forks for each request,
a JSON on a line of stdin; the answer is a line of stdout. (A run then starts in no time. The parent itself never
trains, since autograd cannot be forked.)
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

# What changes the disk. Between two of these calls, a process that dies leaves the same folder.
CALLS = ("fsync", "replace", "unlink", "truncate", "rmdir")

WARM = """matplotlib.pyplot onnxruntime onnxscript sklearn.datasets torch_pruning torch._dynamo fvcore.nn thop
prunekit.cli prunekit.pipeline.runner""".split()


class Launcher:
    """The parent, from another process."""

    def __init__(self):
        settings = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **settings},
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()

    def run(self, *arguments, **how):
        """Run ``prunekit ARGUMENTS``.

        Args:
            how: at most one of ``call`` (die before this call of CALLS, from 1), ``step`` (die behind this step of an
                optimizer), ``seconds`` (be killed then); or ``signals`` (send these behind the optimizer's step
                ``at``); ``raises`` (the stage whose function raises, and what).

        Returns:
            status (negative: the signal that ended it), out, err, calls: those of CALLS that there were, each with the
            name of its file.
        """
        self._process.stdin.write(json.dumps({"arguments": [str(a) for a in arguments], **how}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    for name in WARM:
        importlib.import_module(name)
    assert threading.active_count() == 1
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            places = {name: Path(folder) / name for name in ("out", "err", "calls")}
            child = os.fork()
            if not child:
                _child(request, places)
            answer = {"status": _wait(child, request.get("seconds"))}
            answer |= {name: path.read_text() for name, path in places.items()}
            answer["calls"] = answer["calls"].splitlines()
            print(json.dumps(answer), flush=True)


def _wait(child: int, seconds: float | None) -> int:
    """How a process ends, which is killed when so many seconds have passed."""
    end = time.monotonic() + seconds if seconds is not None else None
    while end is not None:
        done, ended = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(ended)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _child(request: dict, places: dict[str, Path]) -> None:
    status = 99
    try:
        counts = os.open(places["calls"], os.O_RDWR | os.O_CREAT)
        for number, name in ((0, os.devnull), (1, places["out"]), (2, places["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        sys.stdin, sys.stdout, sys.stderr = (open(n, "r" if n == 0 else "w", buffering=1) for n in range(3))  # noqa: SIM115
        _prepare(request, counts)
        from prunekit.cli import main

        sys.argv = ["prunekit", *request["arguments"]]
        main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _prepare(request: dict, counts: int) -> None:
    """Put what ends the process where it belongs."""
    done = 0

    def counted(name):
        held = getattr(os, name)

        def call(*arguments, **named):
            nonlocal done
            done += 1
            os.write(counts, f"{name} {_name(name, arguments)}\n".encode())
            if done == request.get("call"):
                if name == "fsync":
                    _tear(arguments[0])
                os.kill(os.getpid(), signal.SIGKILL)
            return held(*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, counted(name))
    from prunekit.pipeline import runner

    # Read from the folder when the run is over, and it takes longer than the run.
    runner.report = lambda *_: None
    if "step" in request or "at" in request:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        steps = 0

        def stepped(*_):
            nonlocal steps
            steps += 1
            if steps == request.get("step"):
                os.kill(os.getpid(), signal.SIGKILL)
            if steps == request.get("at"):
                for number in request["signals"]:
                    signal.raise_signal(number)

        register_optimizer_step_post_hook(stepped)
    if "raises" in request:
        import builtins

        stage, kind, text = request["raises"]

        def broken(*_):
            raise getattr(builtins, kind)(text)

        runner.STAGE_FUNCTIONS[stage] = broken


def _name(call: str, arguments: tuple) -> str:
    """The file that is meant: of two the new one, and with the folder that it lies in."""
    path = os.readlink(f"/proc/self/fd/{arguments[0]}") if call == "fsync" else arguments[-1]
    return "/".join(Path(path).parts[-2:])


def _tear(handle: int) -> None:
    """Let a file be half written, as far as this can be: what was written last is not all there."""
    path = Path(os.readlink(f"/proc/self/fd/{handle}"))
    if path.is_file() and (size := path.stat().st_size) > 3:
        with path.open("r+b") as file:
            file.truncate(size - 3)


if __name__ == "__main__":
    _serve()
