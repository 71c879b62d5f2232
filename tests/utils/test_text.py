from prunekit.utils.text import first_line, join_names, plural


def test_plural():
    assert [plural(count, "group") for count in (0, 1, 2)] == ["0 groups", "1 group", "2 groups"]


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
