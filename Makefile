# Python 3.11 or newer; everything is installed into .venv, nothing outside it is touched.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUN = .venv/bin/python

.PHONY: quickstart test images benchmarks clean

# From an empty folder to a model that answers, on the demo data the repository brings along.
quickstart: export QUICKSTART_STARTED := $(shell date +%s)
quickstart: .venv/installed
	$(RUN) quickstart.py

test: .venv/installed
	$(RUN) -m pytest -q tests

# The pictures of README.md; the loss curves are drawn from out/logs.
images: .venv/installed
	$(RUN) images/draw_models.py

benchmarks: .venv/installed
	$(RUN) benchmarks/training.py
	$(RUN) benchmarks/decoding.py
	$(RUN) benchmarks/token_cache.py
	$(RUN) benchmarks/data_process.py

# Remade when a requirement changes. The stamp is written last, so an interrupted install starts again.
.venv/installed: requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

clean:
	rm -rf .venv out dataset/.cache
