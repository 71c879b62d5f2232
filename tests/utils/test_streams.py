import contextlib
import errno
import io
import os
import sys

import pytest

from prunekit.utils.streams import flush_or_discard, ignore_lost_readers


@contextlib.contextmanager
def unread():
    """A pipe that nobody reads, in place of stdout and stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield stream


def test_writing_without_a_reader_never_fails():
    with unread() as stream:
        with pytest.raises(BrokenPipeError):
            print("x", flush=True)
        with ignore_lost_readers():
            for _ in range(3):
                print("x" * 100_000, flush=True)
                print("x", file=sys.stderr)
            assert sys.stdout.encoding == stream.encoding
        assert sys.stdout is stream


def test_flush_or_discard_drops_what_nobody_reads():
    with unread() as stream:
        print("x")
        flush_or_discard()
        stream.flush()


def test_output_with_a_reader_is_written(capsys):
    with ignore_lost_readers():
        print("x")
        print("y", file=sys.stderr)
    assert tuple(capsys.readouterr()) == ("x\n", "y\n")


class Full(io.StringIO):
    def __init__(self, file):
        super().__init__()
        self.fileno = file.fileno

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_not_an_error(tmp_path):
    with (tmp_path / "out").open("w") as file, contextlib.redirect_stdout(Full(file)):
        with pytest.raises(OSError, match="No space"):
            print("x")
        with ignore_lost_readers():
            print("x", flush=True)
