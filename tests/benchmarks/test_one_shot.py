import one_shot


def test_on_a_tiny_network(capsys):
    (result,) = one_shot.main("--networks tiny-resnet --size 32 --images 4 --gate 0.02".split())
    out = capsys.readouterr().out
    assert out.count("|\n") == 3 and "tiny-resnet" in out
    assert result["macs"] < result["macs_exact"] < 1 and abs(result["target"] / 0.5 - 1) <= 0.02
    assert abs(result["gradual"] / 0.5 - 1) <= 0.02 and result["gradual_drift"] < 1e-5
    drift = result["drift"]
    assert 0 < drift["mean"] < 0.5 * drift["zero"] and 0 < drift["constant"] < 0.5 * drift["zero"]
