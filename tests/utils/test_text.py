from pathlib import Path

from prunekit.utils.text import closest_match, did_you_mean, first_line, join_names, one_line, plural, si, suggest


def test_plural():
    assert [plural(count, "group") for count in (0, 1, 2)] == ["0 groups", "1 group", "2 groups"]


def test_si():
    known = {0: "0", 999: "999", 1234: "1.23k", 145_020: "145k", 1_516_281_872: "1.52G", 1.2e12: "1.2T", -2500: "-2.5k"}
    known |= {999_499: "999k", 999_950: "1M", 999.7: "1k", 0.25: "0.25"}
    assert {number: si(number) for number in known} == known


def test_join_names():
    assert [join_names("abcdef"[:count]) for count in (1, 2, 3, 4, 6)] == [
        "a",
        "a and b",
        "a, b and c",
        "a, b, c and 1 more",
        "a, b, c and 3 more",
    ]


def test_first_line():
    assert first_line(ValueError("\nbad shape\nsee above")) == "bad shape"
    assert first_line(KeyError()) == "KeyError"


def test_one_line():
    assert one_line(ValueError("bad\n  shape ")) == "bad shape"
    assert one_line(KeyError()) == "KeyError" and one_line(" ") == "" and one_line(3) == "3"


def test_closest_match():
    assert closest_match("epocs", ["epochs", "lr"]) == "epochs" and closest_match("zzz", ["epochs", "lr"]) is None
    assert suggest("epocs", ["epochs"]) == ", did you mean 'epochs'?" and suggest("zzz", ["epochs"]) == ";"


def test_closest_match_ignores_case():
    assert closest_match("duts-tr", ["ECSSD", "DUTS-TR"]) == "DUTS-TR"
    assert closest_match("x", ["photos", "masks"]) is None


def test_did_you_mean_names_an_existing_path(tmp_path, monkeypatch):
    (tmp_path / "data" / "DUTS-TR" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert did_you_mean(tmp_path / "dta" / "duts_tr") == f"; did you mean {tmp_path}/data/DUTS-TR?"
    assert did_you_mean(Path("data/DUTS-TR/image")) == "; did you mean data/DUTS-TR/images?"
    for unlike in (Path("qqq"), Path("data/qqq"), Path(), Path("x" * 999), Path("data/\0")):
        assert did_you_mean(unlike) == ""
