"""A small fuzzer: seeds of each format, changed at random, given to the reader of that format.

A reader may return or raise PrunekitError, and nothing else, within bounded time and memory. What once broke a reader
is kept in ``corpus/<reader>/`` and is read by every test run.
"""

from __future__ import annotations

import random
import resource
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from prunekit.errors import PrunekitError

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 20  # for one input; a reader that runs away takes for ever
MEMORY = 2 << 30  # bytes above what the process has at the start
TOKENS = [
    *(b"null", b"true", b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"1" * 400, b"9" * 20, b"0.5", b"1e-320"),
    *(b"{", b"}", b"[", b"]", b'"', b":", b",", b"\n", b"\t", b"  ", b"- ", b"#", b"|", b">", b"?", b"%", b"@", b"`"),
    *(b"[" * 3000, b'{"a":' * 1500, b"{}", b"[]", b'""', b"\\ud800", b"\\u0000", b"\xff\xfe", b"\xef\xbb\xbf"),
    *(
        b"&a ",
        b"*a",
        b"<<: *a",
        b"!!python/object/apply:os.system ['false']",
        b"!!binary x",
        b"!!int ",
        b"--- ",
        b"...",
    ),
    *(b"../../etc/passwd", b"/etc/passwd", b"\\\\host\\share", b"~", b"format", b"groups", b"=", b"a.b.c=", b"1:30:00"),
    *("é".encode(), "\u2028".encode(), "\u202e".encode(), "𝔘".encode(), b"\r", b"\x1b[2J", b"PK\x03\x04", b"\x93NUMPY"),
    *(
        b"\xff" * 8,
        b"\x00" * 8,
        b"\x80\x03",
        b"...",
        b"\x00",
        b"cos\nsystem\n",
        b"cposix\nsystem\n(S'false'\ntR.",
        b"q\x00",
        b".",
    ),
]


@dataclass
class Count:
    """What came of a reader's inputs."""

    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    failures: list[tuple[bytes, str]] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        return self.read + self.refused + len(self.failures)


def changed(seeds: list[bytes], rng: random.Random, largest: int = 200_000) -> bytes:
    """One of the seeds, with one to six changes."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(8)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[min(at, len(data) - 1)] = rng.randrange(256)
        elif kind == 2:
            del data[at : at + rng.choice((1, 2, 8, 64, 1000))]
        elif kind == 3:
            data[at:at] = data[at : at + rng.choice((1, 4, 16, 100))] * rng.choice((1, 2, 20))
        elif kind == 4:
            data[at:at] = rng.choice(TOKENS)
        elif kind == 5:
            token = rng.choice(TOKENS)
            data[at : at + len(token)] = token
        elif kind == 6:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            data[at : at + rng.randrange(60)] = other[start : start + rng.randrange(200)]
        else:
            del data[at:]
    return bytes(data[:largest])


def fuzz(reader: Callable[[bytes], object], seeds: list[bytes], count: int, seed: int = 0) -> Count:
    """Give a reader so many inputs: the seeds as they are, and changed ones."""
    rng = random.Random(seed)
    found = Count()
    with bounded():
        for number in range(count):
            data = seeds[number] if number < len(seeds) else changed(seeds, rng)
            one(reader, data, found)
            if len(found.failures) >= 20:
                break
    return found


def one(reader: Callable[[bytes], object], data: bytes, found: Count) -> None:
    began = time.perf_counter()
    signal.alarm(SECONDS)
    try:
        reader(data)
        found.read += 1
    except PrunekitError as error:
        if not str(error).strip():
            found.failures.append((data, "an error without a word"))
        else:
            found.refused += 1
    except (Exception, RecursionError, MemoryError) as error:
        found.failures.append((data, f"{type(error).__name__}: {error}"[:300]))
    finally:
        signal.alarm(0)
        found.slowest = max(found.slowest, time.perf_counter() - began)


@contextmanager
def bounded():
    """An alarm for each input raises, and so does memory beyond what is allowed."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"an input took {SECONDS} s")

    before, limits = signal.signal(signal.SIGALRM, ring), resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def kept(name: str) -> list[bytes]:
    """The inputs of the corpus for a reader."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
