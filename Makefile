# `make` or `make help` lists the targets. Everything runs in .venv, made on first use from pyproject.toml and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
OUTPUT ?= demo-output
PYTEST_ARGS ?=

# Ray's usage report would call home.
export RAY_USAGE_STATS_ENABLED ?= 0

.DEFAULT_GOAL := help
.PHONY: help .venv demo demo-shards demo-report demo-calibrate demo-table demo-variance demo-picture train-demo train-photo-demo bench gpu-kit gpu-rehearsal answer-inputs pareto test browser soak lint clean

help: ## list the targets
	@grep -E '^[a-z.-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r name text; do printf '  %-16s %s\n' "$$name" "$$text"; done

.venv: .venv/.installed ## make the environment and install the project in it, editable, under constraints.txt

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,report,test,lint]'
	touch $@

demo: demo-shards ## answer 2,000 easy-VQA questions and 500 scenes, full and trimmed, and print both summaries
	$(BIN)/python -m demo.run --shards $(OUTPUT)/shards --output $(OUTPUT)/answers

demo-shards: .venv ## write the demo's parquet shards
	$(BIN)/python -m demo.shards --output $(OUTPUT)/shards --easy-vqa 2000 --scenes 500

demo-report: demo-shards ## answer the demo's scenes with all features, three K, half of the tower and fewer tiles, and compare them on a page (five minutes)
	set -e; for run in 'all --policy none' 'k-0.25 --k-ratio 0.25' 'k-0.15 --k-ratio 0.15' 'k-0.05 --k-ratio 0.05' \
	  'tower --policy none --tower-policy alike --tower-keep 0.53' \
	  'tower-clusters --policy clusters --keep 0.4 --tower-policy alike --tower-keep 0.53' \
	  'tiles-2 --policy none --max-tiles 2' 'tiles-1 --policy none --max-tiles 1'; do set -- $$run; name=$$1; shift; \
	  $(BIN)/python -m jobs.answer --input $(OUTPUT)/shards/scenes-test --output $(OUTPUT)/compared/$$name --model demo/model \
	  --write-kept "$$@"; done
	$(BIN)/python -m jobs.compare $(OUTPUT)/compared/* --baseline $(OUTPUT)/compared/all --price cpu=0.1 --out $(OUTPUT)/report

demo-calibrate: demo-shards ## find the smallest K that holds 90 % agreement on a sample of the demo's scenes
	$(BIN)/python -m jobs.calibrate --input $(OUTPUT)/shards/scenes-test --output $(OUTPUT)/calibration --model demo/model \
	  --target-agreement 0.9

demo-table: .venv ## measure accuracy by kind, policy and kept fraction, both models on all of their test data (half an hour; resumable)
	$(BIN)/python -m demo.table --output demo/results

demo-variance: .venv ## count the clusters that explain real photographs' features, through both models' towers (some minutes)
	$(BIN)/python -m demo.variance --output demo/results

demo-picture: .venv ## draw the kept features over held-out scenes, and scenes that merging breaks
	$(BIN)/python -m demo.picture --output demo/results/kept-features.png
	$(BIN)/python -m demo.picture --output demo/results/broken.jpg --style photo-scenes --broken 4 --k-ratio --likeness 0.9 0.7

train-demo: .venv ## train the demo model from scratch (an hour and more on CPU; resumable)
	$(BIN)/python -m demo.train --work build/demo-train --output demo/model

train-photo-demo: .venv ## train a second one from its weights, on scenes over photographs from Debian's packages (some hours on CPU; resumable)
	$(BIN)/python -m demo.photographs
	$(BIN)/python -m demo.train --work build/photo-train --output demo/photo-model --style photo-scenes --start demo/model \
	  --scenes 14000 --drills 7000 --tower-steps 2400 --language-steps 2800 --exact-steps 2400

bench: .venv ## measure the engine beside transformers' generate on this machine (three quarters of an hour on two idle cores)
	$(BIN)/python -m benchmarks.cpu --output benchmarks/results
	$(BIN)/python -m benchmarks.estimate --results benchmarks/results

gpu-kit: .venv ## prove the CUDA path on one GPU in eight minutes: correctness, the demo's answers, the 11B's size beside its roofline and generate
	$(BIN)/python -m benchmarks.gpu_kit --output benchmarks/results --minutes 8
	$(BIN)/python -m benchmarks.estimate --results benchmarks/results

gpu-rehearsal: .venv ## the same on a CPU with a tiny model: shows that every section runs, and measures nothing
	$(BIN)/python -m benchmarks.gpu_kit --device cpu --size tiny --output build/gpu-rehearsal

answer-inputs: .venv ## make the GPU kit's questions and the CPU's answers to them anew (a minute)
	$(BIN)/python -m benchmarks.gpu.answer_inputs

pareto: .venv ## measure every policy at equal held bytes, and every way through the tower end to end, and draw quality against bytes, time and images/s (an hour and a half; resumable)
	$(BIN)/python -m benchmarks.pareto --output benchmarks/results

browser: ## install Debian's Chromium, in which tests open the report, where it is missing and apt may be used
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	  || echo 'no Chromium: the tests of the report in a browser are skipped' >&2

test: .venv ## run the test suite, offline and on CPU, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

soak: .venv ## kill a job's driver and actor at random moments, on disk and S3, then put a million rows through a stand-in engine; tables of what was lost (an hour at most)
	$(BIN)/python -m benchmarks.soak --output benchmarks/results --minutes 25
	$(BIN)/python -m benchmarks.scale --output benchmarks/results --minutes 30

lint: .venv ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove the demo's output and the caches, but neither the environment nor training checkpoints
	rm -rf $(OUTPUT) .pytest_cache .ruff_cache .mypy_cache *.egg-info
