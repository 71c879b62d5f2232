"""Fuzz the readers of files: mutations of a stored corpus, each input in bounded time and memory.

Coverage-guided engines (atheris) need a build for each Python version and do not see into the C and Rust libraries that
the readers use.
"""

from __future__ import annotations

import faulthandler
import io
import json
import math
import mmap
import os
import random
import resource
import signal
import struct
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.errors import PrunekitError

CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus"
LARGEST = 1 << 16  # bytes of an input
MEMORY = 1 << 30  # additional bytes of address space for all inputs of a run
SECONDS = 5.0  # for one input
MOST_FAULTS = 20
_INTERESTING = (0, 1, -1, 2, 7, 127, 128, 255, 256, 32767, 65535, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 62)
_TOKENS = (
    *(b"[", b"]", b"{", b"}", b'"', b"'", b",", b":", b"\n", b"\0", b"\x80", b"\xff", b"\xed\xa0\x80", b"\\ud800"),
    *(b"null", b"true", b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 30, b"0.1", b"1" * 5000, b'""', b"{}", b"[]"),
    *(b"../", b"/etc/passwd", b"__class__", b"\xc3\xa9", b"\xe2\x80\xae", b"  ", b"\t"),
)


@dataclass(frozen=True)
class Reader:
    """A reader to fuzz.

    Attributes:
        name: of its corpus folder.
        read: takes an input; may raise only PrunekitError.
        tokens: pieces of its format.
        within: a mutation that keeps the input well-formed (checksums, brackets), so that later checks run; makes half
            of the inputs.
        short: number of inputs in an ordinary test run.
        long: number of inputs in a soak of factor 1.
    """

    name: str
    read: Callable[[bytes], object]
    tokens: tuple[bytes, ...] = ()
    within: Callable[[random.Random, bytes], bytes] | None = None
    short: int = 200
    long: int = 50_000

    def corpus(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted((CORPUS / self.name).iterdir())]


@dataclass
class Found:
    """The result of fuzzing a reader.

    Attributes:
        inputs: number of inputs.
        refused: number of inputs that raised a PrunekitError.
        seconds: total CPU time.
        slowest: seconds of the slowest input.
        faults: faults with their inputs.
    """

    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    faults: list[tuple[str, bytes]] = field(default_factory=list)

    def line(self, name: str) -> str:
        rate = self.inputs / max(self.seconds, 1e-9)
        return (
            f"fuzz {name:12} {self.inputs:9,} inputs, {rate:7,.0f} a second, {self.refused:9,} refused, "
            f"slowest {1000 * self.slowest:6.1f} ms, {len(self.faults)} faults"
        )


def mutate(chance: random.Random, data: bytes, corpus: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """Return the input with a few random changes."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 5, 10))):
        place = chance.randrange(len(out) + 1)
        kind = chance.randrange(11)
        length = min(chance.choice((1, 1, 2, 4, 8, 30, 200)), len(out) - place)
        if kind == 0 and length:
            out[place] ^= 1 << chance.randrange(8)
        elif kind == 1 and length:
            out[place : place + length] = chance.randbytes(length)
        elif kind == 2:
            del out[place : place + length]
        elif kind == 3:
            out[place:place] = out[place : place + length] * chance.choice((1, 1, 2, 100))
        elif kind == 4:
            out[place:place] = chance.choice(tokens)
        elif kind == 5:
            out[place : place + length] = chance.choice(tokens)
        elif kind == 6:
            other = chance.choice(corpus)
            start = chance.randrange(len(other) + 1)
            out[place : place + length] = other[start : start + chance.choice((4, 30, 300, 5000))]
        elif kind == 7:
            size = chance.choice((1, 2, 4, 8))
            value = chance.choice(_INTERESTING) & ((1 << 8 * size) - 1)
            out[place : place + size] = value.to_bytes(size, chance.choice(("little", "big")))
        elif kind == 8:
            _number(chance, out, place)
        elif kind == 9:
            del out[place:]
        else:
            where = chance.randrange(len(out) + 1)
            piece = out[place : place + length]
            out[where : where + len(piece)] = piece
    return bytes(out[:LARGEST])


def _number(chance: random.Random, out: bytearray, place: int) -> None:
    """Replace the next number that is written in digits."""
    start = next((i for i in range(place, min(len(out), place + 200)) if 48 <= out[i] < 58), None)
    if start is not None:
        end = start
        while end < len(out) and 48 <= out[end] < 58:
            end += 1
        out[start:end] = str(chance.choice((*_INTERESTING, 10**30, 1e308, -0.0))).encode()


def reshape(chance: random.Random, value: Any) -> Any:
    """Return a JSON value with a few parts replaced, moved, duplicated or removed."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        places = list(_places(value))
        holder, key = chance.choice(places) if places else (None, None)
        kind = chance.randrange(6)
        if holder is None or (kind == 0 and chance.random() < 0.1):
            value = chance.choice(_odd())
        elif kind in (0, 1, 2):
            holder[key] = chance.choice(_odd())
        elif kind == 3:
            del holder[key]
        elif kind == 4:
            other, there = chance.choice(places)
            # A copy: a cyclic value could not be encoded.
            holder[key] = json.loads(json.dumps(other[there]))
        elif isinstance(holder, dict):
            holder[chance.choice(("", "format", "a" * 300, "../x", "\0", key))] = holder.pop(key)
        else:
            holder.insert(key, holder[key])
    return value


def _odd() -> list[Any]:
    odd = [None, True, False, 0, -1, 3, 1 << 63, 10**40, 0.5, -0.0, 1e308, math.nan, math.inf, "", "x", "../../x", "\0"]
    return [*odd, "a" * 5000, "\ud800", "1", "\x1b[2J\n", [], {}, [[]], [1, "a", None], {"a": 1}, {"": {}}, [0] * 300]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        items = holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ()
        for key, item in items:
            yield holder, key
            waiting.append(item)


def json_within(chance: random.Random, data: bytes) -> bytes:
    """For JSON, and for JSON lines."""
    try:
        lines = [json.loads(line) for line in data.splitlines()] if data.count(b"}\n{") else [json.loads(data)]
        place = chance.randrange(len(lines))
        lines[place] = reshape(chance, lines[place])
        return b"\n".join(json.dumps(line).encode() for line in lines) + b"\n"
    except (ValueError, RecursionError):
        return data


def zip_within(chance: random.Random, data: bytes) -> bytes:
    """For archives: a member is changed, and its checksum fits."""
    out = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as held, zipfile.ZipFile(out, "w") as made:
            members = {name: held.read(name) for name in held.namelist()}
            chosen = chance.choice(list(members))
            for name, content in members.items():
                changed = mutate(chance, content, list(members.values()), _TOKENS) if name == chosen else content
                made.writestr(zipfile.ZipInfo(name), changed)
    except (zipfile.BadZipFile, ValueError, IndexError, NotImplementedError):
        return data
    return out.getvalue()


def png_within(chance: random.Random, data: bytes) -> bytes:
    """Mutate a PNG and keep its chunks' checksums and compression valid."""
    if not data.startswith(b"\x89PNG"):
        return mutate(chance, data, [data], _TOKENS)
    parts, place = [], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        parts.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    chosen = chance.randrange(len(parts))
    kind, body = parts[chosen]
    body = zlib.compress(mutate(chance, zlib.decompress(body), [body], _TOKENS)) if kind == b"IDAT" else body
    body = body if kind == b"IDAT" else mutate(chance, body, [body], _TOKENS)
    parts[chosen] = chance.choice((kind, kind, b"tRNS", b"PLTE", b"iCCP", b"zTXt", b"eXIf", b"acTL")), body
    chunks = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts]
    return data[:8] + b"".join(chunks)


def fuzz(reader: Reader, count: int, seed: str) -> Found:
    """Read the corpus and mutations, ``count`` inputs in total, in a fork; an input that ends the fork is a fault."""
    found = Found()
    shared = _Shared()
    while found.inputs < count and len(found.faults) < MOST_FAULTS:
        there, here = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(there)
            try:
                _child(reader, found.inputs, count, seed, shared, here)
            finally:
                os._exit(1)
        os.close(here)
        with os.fdopen(there, "rb") as pipe:
            fault = pipe.read().decode(errors="replace")
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            fault = f"the process ended by {signal.Signals(os.WTERMSIG(status)).name}"
        inputs, refused, seconds, slowest, data = shared.read()
        found = Found(
            found.inputs + inputs,
            found.refused + refused,
            found.seconds + seconds,
            max(found.slowest, slowest),
            [*found.faults, (fault, data)] if fault or status else found.faults,
        )
    return found


class _Shared:
    """Return a fork's counts and current input when it ended."""

    _HEAD = "<QQddI"

    def __init__(self) -> None:
        self._start = struct.calcsize(self._HEAD)
        self._memory = mmap.mmap(-1, self._start + LARGEST)

    def write(self, inputs: int, refused: int, seconds: float, slowest: float, data: bytes) -> None:
        struct.pack_into(self._HEAD, self._memory, 0, inputs, refused, seconds, slowest, len(data))
        self._memory[self._start : self._start + len(data)] = data

    def read(self) -> tuple[int, int, float, float, bytes]:
        *counts, length = struct.unpack_from(self._HEAD, self._memory, 0)
        return *counts, bytes(self._memory[self._start : self._start + length])


def inputs(reader: Reader, start: int, count: int, seed: str) -> Sequence[bytes]:
    """Yield the inputs from ``start`` to ``count``; they depend only on the seed."""
    corpus = reader.corpus()
    tokens = (*_TOKENS, *reader.tokens)
    for number in range(start, count):
        chance = random.Random(f"{seed} {reader.name} {number}")
        if number < len(corpus):
            yield corpus[number]
        elif reader.within is not None and chance.random() < 0.5:
            yield reader.within(chance, chance.choice(corpus))[:LARGEST]
        else:
            yield mutate(chance, chance.choice(corpus), corpus, tokens)


def _child(reader: Reader, start: int, count: int, seed: str, shared: _Shared, pipe: int) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    faulthandler.disable()
    # C libraries print warnings about a file.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    # The default action ends the process even within C code.
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    refused, seconds, slowest = 0, 0.0, 0.0
    for done, data in enumerate(inputs(reader, start, count, seed), start=1):
        shared.write(done, refused, seconds, slowest, data)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        began = time.process_time()
        fault = ""
        try:
            reader.read(data)
        except PrunekitError as error:
            refused += 1
            fault = "" if str(error).strip() else "an error without a word"
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            fault = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        took = time.process_time() - began
        seconds, slowest = seconds + took, max(slowest, took)
        shared.write(done, refused, seconds, slowest, data)
        if fault:
            os.write(pipe, fault[:2000].encode(errors="backslashreplace"))
            os._exit(1)
    os._exit(0)
