# Two environments: a lean one for captioning (no torch), and a full one for training, export and tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
LEAN := build/venv-lean
FULL := build/venv-full
# A third environment has transformers 5 and only what its tests need: parity must hold with both releases.
NEXT := build/venv-next
DOCS := build/venv-docs
# The CPU build of torch if there is no NVIDIA GPU; `make test TORCH=torch==2.13.0` overrides this.
TORCH_VERSION := 2.13.0
TORCH ?= torch==$(TORCH_VERSION)$(shell command -v nvidia-smi >/dev/null 2>&1 || echo +cpu)
IMAGES ?= examples/images
BEAMS ?= 4
WORKLOAD ?= demo
OUT ?= run.csv
# `make bench RECORD=--record` overwrites the record in benchmarks/results; by default it goes to build/benchmarks.
RECORD ?=
DEMO := build/demo

.DEFAULT_GOAL := all
.PHONY: all caption full test test-fast test-next test-families lint parity fuzz fake-gpu golden bench soak plots figures docs recipe train-smoke demo restore help clean

all: lint test  ## run lint and test

caption: $(LEAN)/.ready  ## caption the example images into run.csv (lean environment without torch; a minute)
	@echo "captioning $(IMAGES): a few seconds"
	$(LEAN)/bin/engine caption --input $(IMAGES) --beams $(BEAMS) --out $(OUT)
	@echo; head -n 6 $(OUT)

full: $(FULL)/.ready  ## create the full environment for export and training (torch, some gigabytes)

# A process of tests for each core, bound to it (tests/helpers/cores.py).
PYTEST := -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: lint $(NEXT)/.ready  ## create all environments, lint, and run all tests (with transformers 5 a short selection)
	@echo "running all tests: 9 to 22 minutes on 2 cores"
	$(FULL)/bin/python $(PYTEST) tests
	$(NEXT)/bin/python $(PYTEST) tests/parity/test_releases.py tests/unit/export \
	    tests/parity/test_generate.py -k "not equal_generate or penalties and ids or equal_generate and (1-0 or 3-3-None)"

test-fast: lint  ## lint, the unit tests and a part of the parity grid, for contributors (a few minutes)
	$(FULL)/bin/python $(PYTEST) tests/unit tests/parity/test_ladder.py

test-next: $(NEXT)/.ready  ## run the parity grid and the export tests with the newest transformers 5
	$(NEXT)/bin/python $(PYTEST) tests/parity/test_releases.py tests/unit/export tests/parity/test_generate.py \
	    tests/parity/test_export.py tests/parity/test_pairs.py tests/parity/test_git.py tests/parity/test_image_prefix.py \
	    tests/parity/test_florence.py

FAMILIES := tests/parity/test_pairs.py tests/parity/test_git.py tests/parity/test_image_prefix.py \
    tests/parity/test_florence.py tests/parity/test_attention.py
test-families: $(FULL)/.ready $(NEXT)/.ready  ## compare every family with generate over the whole grid, in both releases of transformers (40 minutes)
	FAMILIES_GRID=full $(FULL)/bin/python $(PYTEST) $(FAMILIES) tests/parity/test_torch.py tests/parity/test_convert.py
	FAMILIES_GRID=full $(NEXT)/bin/python $(PYTEST) $(FAMILIES)

FAKE_GPU := build/fake-gpu
fake-gpu: $(FULL)/.ready $(FAKE_GPU)/.ready  ## test the CUDA backend on stand-ins, without a GPU (needs gcc; downloads 260 MB)
	CUDA_INCLUDE=$(abspath $(FAKE_GPU))/headers/nvidia/cu13/include ENGINE_ORT_GPU=$(abspath $(FAKE_GPU))/runtime \
	    $(FULL)/bin/python -m pytest tests/nvidia/test_fake.py

lint: $(FULL)/.ready  ## check style, types and the import rules between packages
	$(FULL)/bin/ruff check .
	$(FULL)/bin/ruff format --check .
	$(FULL)/bin/mypy
	$(FULL)/bin/lint-imports
	if [ -x $(FULL)/bin/hadolint ]; then $(FULL)/bin/hadolint docker/*.Dockerfile; fi

fuzz: $(FULL)/.ready  ## fuzz all file readers with damaged files for minutes (the tests do it for seconds)
	HYPOTHESIS_PROFILE=long $(FULL)/bin/python -m pytest tests/unit/engine/inputs/test_fuzz.py tests/unit/engine/run/test_journal.py \
	    tests/unit/engine/checkpoints/test_weights.py

golden: $(LEAN)/.ready  ## replay PyTorch's captions recorded in the demo bundle (no torch)
	$(LEAN)/bin/engine verify

parity: restore  ## compare the demo bundle with Hugging Face's generate on the example images
	$(FULL)/bin/python -m export.parity --checkpoint $(DEMO)/restored --bundle engine/assets/demo \
	    --images examples/images --beams 1,3,4,5,10 --out build/parity.json

bench: $(FULL)/.ready  ## compare the speed of the engine, generate, the usual ONNX loop and OpenVINO (WORKLOAD=base|large|demo)
	$(FULL)/bin/python -m benchmarks.throughput --workload $(WORKLOAD) --beams $(BEAMS) $(RECORD)

soak: $(FULL)/.ready  ## check speed and memory over a run of 17,237 generated images (half an hour on 2 cores)
	$(FULL)/bin/python -m benchmarks.soak $(RECORD)

plots: $(FULL)/.ready  ## draw the plots from the records in benchmarks/results
	$(FULL)/bin/python -m benchmarks.plots

figures: $(FULL)/.ready  ## update the tables of README.md and docs/ from records and commands
	$(FULL)/bin/python -m benchmarks.figures
	$(FULL)/bin/python -m docs.scripts.reference

docs: $(DOCS)/.ready  ## build the documentation site in build/site (small environment); warnings are errors
	$(DOCS)/bin/python -m mkdocs build --strict --quiet
	@echo "open build/site/index.html; for the search run: python3 -m http.server --directory build/site"

recipe: $(FULL)/.ready  ## caption the examples, score (BERTScore by a small proxy), write and check a submission, make a report
	@mkdir -p build/recipe
	$(FULL)/bin/engine caption --input examples/images --beams $(BEAMS) --out build/recipe/run.csv \
	    --n-best $(BEAMS) --n-best-out build/recipe/run.jsonl --timings-out build/recipe/timings.csv
	$(FULL)/bin/python -m train small-bert --out build/small-bert
	$(FULL)/bin/engine score --profile imageclef2024 --run build/recipe/run.csv --references examples/captions.csv \
	    --images examples/images --weights bertscore=build/small-bert \
	    --out build/recipe/scores.json --per-image build/recipe/per_image.csv
	$(FULL)/bin/engine submit --format imageclef2026 --run build/recipe/run.csv --manifest examples/captions.csv \
	    --out build/recipe/submission.zip
	$(FULL)/bin/engine check build/recipe/submission.zip --format imageclef2026 --manifest examples/captions.csv
	$(FULL)/bin/engine report --run build/recipe/run.csv --images examples/images --references examples/captions.csv \
	    --scores build/recipe/per_image.csv --n-best build/recipe/run.jsonl \
	    --columns build/recipe/timings.csv --out build/recipe/report

SMOKE := build/smoke
EXAMPLES ?= examples
MODEL ?= $(DEMO)/restored
train-smoke: restore  ## fine-tune the demo checkpoint on the example pairs, export, caption, score, check parity
	$(FULL)/bin/python -m train finetune --recipe smoke --model $(MODEL) --data $(EXAMPLES) --out $(SMOKE)/run
	$(FULL)/bin/python -m export --checkpoint $(SMOKE)/run/best --out $(SMOKE)/bundle
	$(FULL)/bin/engine caption --bundle $(SMOKE)/bundle --input $(EXAMPLES)/images --beams $(BEAMS) --out $(SMOKE)/run.csv
	$(FULL)/bin/engine score --run $(SMOKE)/run.csv --references $(EXAMPLES)/captions.csv --out $(SMOKE)/scores.json
	$(FULL)/bin/python -m export.parity --checkpoint $(SMOKE)/run/best --bundle $(SMOKE)/bundle \
	    --images $(EXAMPLES)/images --beams 1,4 --out $(SMOKE)/parity.json

restore: $(FULL)/.ready
	$(FULL)/bin/python -m export.restore --bundle engine/assets/demo --out $(DEMO)/restored

demo: $(FULL)/.ready  ## train the demo checkpoint again from packaged assets and export it (about an hour on 2 cores)
	$(FULL)/bin/python -m train demo --out $(DEMO)/checkpoint --work $(DEMO)
	$(FULL)/bin/python -m export --checkpoint $(DEMO)/checkpoint --out $(DEMO)/bundle

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

clean:  ## remove the environments and all build outputs
	rm -rf build run.csv

$(LEAN)/.ready: pyproject.toml
	@tools/environment.sh "$(PYTHON)" $(@D) "about 50 MB to download, less than a minute" --editable '.[cpu]'
	@touch $@

$(FULL)/.ready: pyproject.toml
	@tools/environment.sh "$(PYTHON)" $(@D) "torch and all test dependencies, gigabytes to download, some minutes" \
	    --torch '$(TORCH)' torch==$(TORCH_VERSION) --editable '.[cpu]' --group test --group lint
	@touch $@

$(DOCS)/.ready: pyproject.toml
	@tools/environment.sh "$(PYTHON)" $(@D) "20 MB to download, less than a minute" --group docs
	@touch $@

$(NEXT)/.ready: pyproject.toml
	@tools/environment.sh "$(PYTHON)" $(@D) "torch and transformers 5, a gigabyte to download, some minutes" \
	    --torch '$(TORCH)' torch==$(TORCH_VERSION) --editable '.[cpu]' --group next
	@touch $@

# CUDA's headers and the GPU build of ONNX Runtime. They are not installed: it would overwrite the CPU build.
FAKE_GPU_WHEELS := onnxruntime-gpu==1.31.1 nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.5.37
$(FAKE_GPU)/.ready:
	$(PYTHON) -m pip download -q --no-deps --dest $(@D)/wheels $(FAKE_GPU_WHEELS)
	for wheel in $(@D)/wheels/nvidia*.whl; do $(PYTHON) -m zipfile -e $$wheel $(@D)/headers; done
	$(PYTHON) -m zipfile -e $(@D)/wheels/onnxruntime*.whl $(@D)/runtime
	@touch $@
