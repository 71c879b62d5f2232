"""For any file, a reader returns or raises a PrunekitError, in bounded time and memory.

A few thousand inputs by default; ``PRUNEKIT_SOAK=N`` runs N times more than a million. Inputs that fail are written to
a temporary folder; add them to ``corpus/`` once they are fixed.
"""

import hashlib
import os
import random
import tempfile
from pathlib import Path

import pytest
from helpers.fuzz_engine import CORPUS, Found, Reader, fuzz, inputs, mutate
from helpers.fuzz_readers import Place, readers

SOAK = int(os.environ.get("PRUNEKIT_SOAK", "0"))
NAMES = [*sorted(path.name for path in CORPUS.iterdir())]


@pytest.fixture(scope="module")
def place():
    place = Place()
    yield place
    place.close()


@pytest.mark.parametrize("name", NAMES)
def test_readers(place, name, capsys):
    reader = next(one for one in readers(place) if one.name == name)
    count = SOAK * reader.long or reader.short
    found = fuzz(reader, max(count, len(reader.corpus())), f"{SOAK}")
    with capsys.disabled():
        if SOAK:
            print(f"\n{found.line(name)}", end="", flush=True)
    messages = []
    for fault, data in found.faults:
        kept = Path(tempfile.gettempdir()) / f"prunekit-fuzz-{name}-{hashlib.sha256(data).hexdigest()[:10]}"
        kept.write_bytes(data)
        messages.append(f"{fault}\n  the input is in {kept}")
    assert not messages, "\n".join(messages)


def bad(data: bytes) -> None:
    if b"raise" in data:
        raise KeyError(3)
    if b"die" in data:
        os.abort()
    while b"loop" in data:
        pass
    if b"grow" in data:
        bytearray(1 << 40)


@pytest.mark.parametrize(
    ("word", "message"), [("raise", "KeyError: 3"), ("die", "SIGABRT"), ("loop", "SIGVTALRM"), ("grow", "MemoryError")]
)
def test_engine_finds_faults(tmp_path, monkeypatch, word, message):
    monkeypatch.setattr("helpers.fuzz_engine.CORPUS", tmp_path)
    monkeypatch.setattr("helpers.fuzz_engine.SECONDS", 0.3)
    (tmp_path / "bad").mkdir()
    for number in range(8):
        (tmp_path / "bad" / f"{number}").write_bytes(word.encode() if number == 5 else b"good")
    found = fuzz(Reader("bad", bad), 8, "")
    assert [data for _, data in found.faults] == [word.encode()] and message in found.faults[0][0]
    assert found.inputs == 8


def test_inputs_are_reproducible_and_different(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.fuzz_engine.CORPUS", tmp_path)
    (tmp_path / "any").mkdir()
    (tmp_path / "any" / "a").write_bytes(b'{"a": 123}' * 9)
    reader = Reader("any", bad)
    first = list(inputs(reader, 0, 300, "x"))
    assert first == list(inputs(reader, 0, 300, "x")) and first[50:] == list(inputs(reader, 50, 300, "x"))
    assert len(set(first)) > 280 and list(inputs(reader, 1, 300, "y")) != first[1:]


def test_mutations_are_bounded():
    chance = random.Random(0)
    data = bytes(60_000)
    for _ in range(50):
        data = mutate(chance, data, [data], [b"t" * 9000])
        assert len(data) <= 1 << 16


def test_summary_line():
    assert Found(1000, 900, 2.0, 0.01).line("plan").split()[:4] == ["fuzz", "plan", "1,000", "inputs,"]
