"""Decompression bombs and other hostile image files raise an error that names them, in bounded memory and time."""

import io
import struct
import subprocess
import zlib

import numpy as np
import pytest
from helpers.in_a_child import in_a_child
from PIL import Image

from prunekit.data.images import is_image, read_image, read_mask
from prunekit.errors import DataError

ROOM = 768 << 20  # bytes of address space beside what the process has


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, body=b"", before=(), depth=8, colour=0):
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), *before]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IDAT", zlib.compress(body, 9)) + chunk(b"IEND", b"")


def tiff(width, height, tags=(), count=1):
    """A TIFF of one strip, with what stands in its directory."""
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(273, 4, count, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, count, width * height % (1 << 32))]
    entries = sorted([*entries, *tags])
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)


def gif(width, height, frames):
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    one = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return head + one * frames + b"\x3b"


def webp(width, height):
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (width - 1).to_bytes(3, "little")
    body += (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def jpeg(width, height, scans=0):
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", progressive=bool(scans))
    data = bytearray(buffer.getvalue())
    place = data.index(b"\xff\xc2" if scans else b"\xff\xc0")
    struct.pack_into(">HH", data, place + 5, height, width)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return bytes(data[:-2]) + bytes(scan) * scans + b"\xff\xd9"


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%MARK%) (w) file closefile\nshowpage\n"
BOMBS = {
    "a PNG of 2^31 pixels a side": ("a.png", png((1 << 31) - 1, (1 << 31) - 1)),
    "one line of a hundred million": ("a.png", png(1, 100_000_000, bytes(1 << 16))),
    "a column of a hundred million": ("a.png", png(100_000_000, 1, bytes(1 << 16))),
    "a PNG of no pixels": ("a.png", png(0, 5)),
    "a PNG that unpacks to much more": ("a.png", png(20_000, 20_000, bytes(400_020_000))),
    "a PNG with a gigabyte of text": (
        "a.png",
        png(4, 4, bytes(20), [chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 27), 9))] * 8),
    ),
    "a PNG with a gigabyte of profile": (
        "a.png",
        png(4, 4, bytes(20), [chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(1 << 28), 9))]),
    ),
    "a TIFF of 2^32 pixels a side": ("a.tif", tiff((1 << 32) - 1, (1 << 32) - 1)),
    "a TIFF of 2^31 strips": ("a.tif", tiff(1000, 1000, count=1 << 31)),
    "a TIFF with 2^32 descriptions": ("a.tif", tiff(10, 10, [(270, 2, (1 << 32) - 1, 8), (700, 7, (1 << 32) - 1, 0)])),
    "a TIFF whose directories go in a circle": ("a.tif", tiff(10, 10) + struct.pack("<I", 8)),
    "a GIF of 4 billion pixels": ("a.gif", gif(65535, 65535, 1)),
    "a GIF of a hundred thousand frames": ("a.gif", gif(16000, 16000, 100_000)),
    "a WebP of 2^48 pixels": ("a.webp", webp(1 << 24, 1 << 24)),
    "a JPEG of 4 billion pixels": ("a.jpg", jpeg(65535, 65535)),
    "a JPEG of thousands of scans": ("a.jpg", jpeg(8000, 8000, 5000)),
    "a bitmap of 2^31 pixels a side": (
        "a.bmp",
        b"BM" + struct.pack("<IHHIIiiHH24x", 54, 0, 0, 54, 40, (1 << 31) - 1, (1 << 31) - 1, 1, 24),
    ),
    "a PPM of many": ("a.ppm", b"P6 1000000 1000000 255\n" + bytes(99)),
    "PostScript by the name of a photograph": ("a.jpg", POSTSCRIPT),
}
# What claims too much in these is nothing that a reader of pixels needs.
HARMLESS = ("a TIFF with 2^32 descriptions", "a TIFF whose directories go in a circle")


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bombs")
    paths = {}
    for number, (kind, (name, data)) in enumerate(BOMBS.items()):
        paths[kind] = folder / f"{number}{name}"
        paths[kind].write_bytes(data)
    sparse = folder / "sparse.webp"
    with sparse.open("wb") as file:
        file.write(webp(100, 100))
        file.truncate(1 << 40)
    return {**paths, "a terabyte": sparse}


@pytest.mark.parametrize("kind", [*BOMBS, "a terabyte"])
def test_decompression_bomb_raises_in_bounded_memory(bombs, kind):
    path = bombs[kind]

    def read():
        for one in (read_image, read_mask):
            try:
                one(path)
            except DataError as error:
                assert path.name in str(error) and "\n" not in str(error), error
            else:
                assert kind in HARMLESS, "it was read"

    assert in_a_child(read, memory=ROOM, seconds=10) < 384 << 20


def test_no_external_program_decodes_images(tmp_path, monkeypatch):
    """Ghostscript would; here it would leave a mark."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'mark'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert subprocess.run(["gs"]).returncode == 0 and (tmp_path / "mark").exists()
    (tmp_path / "mark").unlink()
    for name in ("a.jpg", "a.eps", "a.png"):
        (tmp_path / name).write_bytes(POSTSCRIPT)
        with pytest.raises(DataError, match="cannot be read as an image"):
            read_image(tmp_path / name)
    assert not is_image("a.eps") and not is_image("a.wmf") and not (tmp_path / "mark").exists()


def test_unusual_but_valid_files_are_read(tmp_path):
    """The first of many frames, long texts, many tags, an extreme shape, many scans."""
    frames = [Image.new("L", (6, 4), level) for level in (50, 200, 30)]
    for name in ("a.gif", "a.tif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert abs(int(read_image(tmp_path / name)[0, 0, 0]) - 50) < 4, name
    (tmp_path / "long.png").write_bytes(png(1, 200_000, bytes(400_000), [chunk(b"tEXt", b"k\0" + b"t" * (1 << 19))]))
    assert read_image(tmp_path / "long.png").shape == (200_000, 1, 3)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "scans.jpg", progressive=True)
    assert read_image(tmp_path / "scans.jpg").shape == (40, 40, 3)
