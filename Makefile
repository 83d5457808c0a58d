# Each target does all its set-up: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
LMMS := .venv-lmms

.PHONY: setup demo test test-slow test-evaluation test-lmms test-oldest record-probe probe methods lint typecheck format benchmark benchmark-7b clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	# An ordinary pair from PyPI: HF's video processors need a torchvision that fits its torch.
	$(BIN)/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1
	$(BIN)/python -m pip install --quiet -e '.[dev,torchcodec]'
	touch $@

demo: setup
	$(BIN)/spatiotoken run --config balanced

test: setup
	$(BIN)/python -m pytest -n 2

test-slow: setup
	$(BIN)/python -m pytest -m slow

# The oldest supported transformers beside the same torch; everything else is shared with the main environment.
# What the probe models answer is recorded for the newest: 5.17 counts the positions after a video otherwise.
test-oldest: setup
	test -d $(OLDEST)/transformers || $(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) \
		transformers==5.17.0 'huggingface_hub>=1.5,<2' httpx httpcore h11 anyio sniffio idna certifi
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(BIN)/python -m pytest -n 2 tests/test_invariants.py tests/test_oracle.py \
		tests/test_caches.py tests/test_report.py tests/test_tower.py tests/test_positions.py tests/test_frame_choice.py tests/test_prompts.py \
		tests/test_image_only.py tests/test_video_cache.py tests/test_devices.py tests/test_flash.py tests/test_half.py \
		tests/vision/test_exact.py tests/vision/test_tower_stage.py tests/evaluation/test_run.py tests/evaluation/test_sharing.py \
		tests/layers/test_between.py tests/attention/test_dispatch.py tests/attention/test_observe.py \
		tests/frames/test_encoders.py tests/frames/test_cache.py tests/probe/test_tiny.py tests/probe/test_checkpoints.py \
		-k "not test_methods_keep_their_accuracy and not test_frozen_answers"

# Evaluations in several processes: killed ones, `accelerate launch` and Ray.
test-evaluation: setup
	$(BIN)/python -m pytest -m 'slow or not slow' tests/evaluation/test_processes.py

# lmms-eval with what importing it and running one local task needs; all of its own would bring an older PyAV.
test-lmms: setup
	test -d $(LMMS)/lmms_eval || $(BIN)/python -m pip install --quiet --no-deps --target $(LMMS) lmms-eval==0.7.3 \
		aiohappyeyeballs aiohttp aiosignal chardet colorama DataProperty evaluate frozenlist loguru lxml mbstrdecoder \
		multidict pathvalidate portalocker propcache pytablewriter pytz sacrebleu tabledata tabulate tcolorpy \
		tenacity typepy yarl
	PYTHONPATH=$(CURDIR)/$(LMMS) $(BIN)/python -m pytest tests/evaluation/test_lmms_eval.py

# What the probe models answer, as the tests expect it: after a change that is meant to change it. Review the diff.
record-probe: setup
	$(BIN)/python -m tests.probe.recording

# The tables of README and docs/methods.md, from the registry.
methods: setup
	$(BIN)/python scripts/tables.py

# Accuracy against retention of every preset: docs/probe.md and docs/probe.png.
probe: setup
	$(BIN)/spatiotoken probe --all

lint: setup typecheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Installed as a wheel lays it out, since the type checker cannot follow `patches/` into the package.
typecheck: setup
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --target build/typecheck .
	cd build/typecheck && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: setup
	$(BIN)/python scripts/benchmark.py --suite overhead
	$(BIN)/python scripts/benchmark.py --suite reduction
	$(BIN)/python scripts/benchmark.py --suite tokens
	$(BIN)/python scripts/benchmark.py --suite frames
	$(BIN)/python scripts/benchmark.py --suite e2e
	$(BIN)/python scripts/benchmark.py --suite stages
	$(BIN)/python scripts/benchmark.py --suite memory
	$(BIN)/python scripts/benchmark.py --suite reader

# Models of the released shapes with random weights, on one GPU: docs/benchmarks/*.json, *.md and pictures.
benchmark-7b: setup
	$(BIN)/python scripts/benchmark.py --suite e2e --size 7b --save docs/benchmarks
	$(BIN)/python scripts/benchmark.py --suite stages --size 7b --save docs/benchmarks
	$(BIN)/python scripts/benchmark.py --suite memory --size 7b --save docs/benchmarks

clean:
	rm -rf $(VENV) $(OLDEST) $(LMMS) build dist *.egg-info
