from prunekit.deployment.bench.timing import BenchJob, measure


def test_failing_job_is_reported(tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"nothing")
    (timing,), products = measure([BenchJob("no", "onnxruntime", tmp_path / "no.onnx", 1, 8, 1)], 0.01)
    assert timing.error and not timing.milliseconds and products[1] > 0
