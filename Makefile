# Python 3.11 or newer; everything is installed into .venv, nothing outside it is touched.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUN = .venv/bin/python

.PHONY: quickstart test lint images screenshots benchmarks clean

# From an empty folder to a model that answers, on the demo data the repository brings along.
quickstart: export QUICKSTART_STARTED := $(shell date +%s)
quickstart: .venv/installed
	$(RUN) quickstart.py

test: .venv/installed
	$(RUN) -m pytest -q -rs -n 2 tests

# Style and the mistakes that a reader of code alone can find; `.venv/bin/ruff format` mends the style.
lint: .venv/installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check

# The diagrams of README.md, and the demo's loss curves as the last quickstart drew them.
images: .venv/installed
	$(RUN) images/draw.py model --preset minimind-v1-small --output images/structure_dense.png
	$(RUN) images/draw.py model --preset minimind-v1-moe --output images/structure_moe.png
	$(RUN) images/draw.py curves --output images/quickstart_loss.png --logs \
	  $(patsubst %,out/quickstart/logs/%_192.jsonl,pretrain single_chat_full_sft multi_chat_full_sft lora_identity dpo)

# The chat page's pictures, with the answers of the last quickstart's models; needs Chromium and a Chinese font.
screenshots: .venv/installed
	SCREENSHOTS=images $(RUN) -m pytest -q -rs tests/test_browser.py -k screenshots

benchmarks: .venv/installed
	$(RUN) benchmarks/training.py
	$(RUN) benchmarks/decoding.py
	$(RUN) benchmarks/exports.py --compile
	$(RUN) benchmarks/serving.py
	$(RUN) benchmarks/lora.py
	$(RUN) benchmarks/token_cache.py
	$(RUN) benchmarks/data_process.py

# Remade when a requirement changes. The stamp is written last, so an interrupted install starts again.
.venv/installed: requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

clean:
	rm -rf .venv dataset/.cache
	test ! -d out || find out -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
