# make run: the main job.  make test: the tests.  Both make .venv when it is not there.
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
OUT ?= run
SEEDS ?= 0 1 2
SCALE ?= laptop
STUDIES := task-arithmetic-baselines adamerging atlas tall-masks twin-merging self-positioning logit-fusion \
  z-loss comp-sum-losses contrastive-behaviour preference-logic frugal small-scale-proxies \
  mtl-baselines sam-mtl uni-perceiver-v2 controllable-mtl dtrn task-expert \
  genie ernie-tiny d-pruner dual-head-kd continual-baselines fpf power-law-rehearsal mos multi-lane tame ibcl prompt-src
EXAMPLES := multitask_real label_noise preference_hh z_loss_words frugal_lm stability_lm dtrn_adult \
  genie_resnet ernie_tiny_text d_pruner_domains dual_head_images continual_real mos_intents multi_lane_glyphs tame_stream \
  ibcl_preferences prompt_src_intents
export PYTHONDONTWRITEBYTECODE = 1

.PHONY: run test lint bench studies examples clean

.venv/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: install one, or make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

run: .venv/.ready
	$(BIN)/allrounder run --out $(OUT)

test: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: .venv/.ready
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/pyright src

bench: .venv/.ready .venv-peers/.ready
	$(BIN)/python benchmarks/run_all.py

.venv-peers/.ready: benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet "torch==2.13.0"
	.venv-peers/bin/python -m pip install --quiet --requirement benchmarks/peers.txt
	.venv-peers/bin/python -m pip install --quiet --no-deps "LibMTL==1.1.5"  # asks for torchvision, which its rules do not need
	@touch $@

# A claim that does not hold is a result (exit 1); a study that cannot run (exit 2) is a failure.
studies: .venv/.ready
	@for slug in $(STUDIES); do for seed in $(SEEDS); do \
	  echo "$$slug, seed $$seed"; \
	  $(BIN)/allrounder study $$slug --scale $(SCALE) --seed $$seed --json > docs/results/study_$${slug}_seed$$seed.json; \
	  test $$? -le 1 || exit 2; \
	done; done

# Real data: ALLROUNDER_DATA is the folder of the data sets.
examples: .venv/.ready
	@for name in $(EXAMPLES); do \
	  $(BIN)/python examples/$$name.py --json docs/results/real_$$name.json || exit 1; \
	done

clean:
	rm -rf .venv .venv-peers run
