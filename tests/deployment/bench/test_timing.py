from pathlib import Path

from prunekit.deployment.bench.timing import BenchJob, measure


def test_failing_job_is_reported(tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"nothing")
    (timing,), products, _ = measure([BenchJob("no", "onnxruntime", tmp_path / "no.onnx", 1, 8, 1)], 0.01)
    assert timing.error and not timing.milliseconds and products[1] > 0


def test_a_stop_keeps_what_was_measured(monkeypatch):
    calls = []

    def progress(done, share):
        calls.append((done, share))
        if len(calls) == 3:
            raise KeyboardInterrupt

    class Worker:
        base_mb = 1.0

        def __init__(self, job):
            pass

        def request(self, method, **arguments):
            return {"seconds": 0.1} if method == "prepare" else {"ms": [100.0], "peak_mb": 2.0, "cores": 1.0}

        def close(self):
            pass

    monkeypatch.setattr("prunekit.deployment.bench.timing._Worker", Worker)
    jobs = [BenchJob("small", "torch", Path("a"), 1, 8, 1), BenchJob("large", "torch", Path("a"), 1, 16, 1)]
    (small, large), gflops, stopped = measure(jobs, 0.2, progress)
    assert stopped and gflops[1] > 0
    assert calls == [(0, 0.25), (1, 0.5), (1, 0.75)]
    assert small.milliseconds == [100, 100] and large.milliseconds == [100] and not (small.error or large.error)
    (small, large), _, stopped = measure(jobs, 0.1, lambda done, share: (_ for _ in ()).throw(KeyboardInterrupt))
    assert stopped and not small.error and large.error == "not measured"
