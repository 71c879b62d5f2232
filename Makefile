# The commands of the README, and the long tests.
.PHONY: run test slow soak lint clean

run: .venv/installed
	.venv/bin/prunekit run recipes/csnet.yaml

test: .venv/installed
	.venv/bin/pytest

slow: .venv/installed
	.venv/bin/pytest -m slow

soak: .venv/installed
	PRUNEKIT_SOAK=1 OMP_NUM_THREADS=1 .venv/bin/pytest -s -m "slow or not slow" tests/robustness tests/utils/test_distributed.py tests/fuzz

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/installed: setup.cfg constraints.txt
	python3 -m venv .venv
	.venv/bin/pip install -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
