# The README's lines, for those who have make.
.PHONY: run test lint clean

run: .venv/installed
	.venv/bin/prunekit run recipes/csnet.yaml

test: .venv/installed
	.venv/bin/pytest

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/installed: setup.cfg constraints.txt
	python3 -m venv .venv
	.venv/bin/pip install -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
