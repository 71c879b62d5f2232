from prunekit.utils.text import join_names


def test_join_names():
    assert [join_names("abcdef"[:count]) for count in (1, 2, 3, 4, 6)] == [
        "a",
        "a and b",
        "a, b and c",
        "a, b, c and 1 more",
        "a, b, c and 3 more",
    ]
