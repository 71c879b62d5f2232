import shutil

import pytest

from prunekit.native import library
from prunekit.native.library import NoKernels


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_missing_compiler_raises(place, monkeypatch):
    monkeypatch.setenv("PATH", str(place))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NoKernels, match=r"no C\+\+ compiler; install g\+\+"):
        library._load()


def test_kernels_can_be_disabled(place, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_KERNELS", "0")
    with pytest.raises(NoKernels, match="PRUNEKIT_KERNELS is 0"):
        library._load()


def test_compiler_error_is_reported(place, monkeypatch):
    fake = place / "c++"
    fake.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo fake && exit\necho 'error: no such thing' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    with pytest.raises(NoKernels, match=r"fails .*no such thing"):
        library._load()
    assert not list((place / "cache" / "kernels").iterdir())


def test_unwritable_cache_raises(place, monkeypatch):
    (place / "cache").write_text("a file")
    if not shutil.which("g++"):
        pytest.skip("no compiler")
    with pytest.raises(NoKernels, match="set PRUNEKIT_CACHE"):
        library._load()


def test_damaged_library_is_compiled_again(place, monkeypatch):
    calls = []
    good = library._compile

    def compile(compiler, source, path):
        calls.append(path)
        if len(calls) == 1:
            path.parent.mkdir(parents=True)
            path.write_bytes(b"no library")
        else:
            good(compiler, source, path)

    if not shutil.which("g++"):
        pytest.skip("no compiler")
    monkeypatch.setattr(library, "_compile", compile)
    assert library._load().norm_act_float
    assert len(calls) == 2 and [path.suffix for path in (place / "cache" / "kernels").iterdir()] == [".so"]
