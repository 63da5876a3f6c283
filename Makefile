# Needs Python 3.10+ and make. Everything is installed into .venv, once; `make clean` forgets it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_SHARDS := shards/synthetic

# What names no hub must not wait for one.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help demo lc25000 test lint clean

help: ## this list
	@grep -E '^[a-z0-9]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9]+): .*## /  make \1\t/'

demo: $(VENV)/demo-installed $(DEMO_SHARDS)/manifest.json ## set-up, then train and evaluate on the synthetic default data
	$(BIN)/python train.py experiment=demo overwrite=true

$(DEMO_SHARDS)/manifest.json: $(wildcard quiltnet/data/synthetic*.py) | $(VENV)/demo-installed
	$(BIN)/quiltnet shard --format synthetic --samples 2000 --size 128 --out $(DEMO_SHARDS) --overwrite

lc25000: $(VENV)/demo-installed ## LC25000: fine-tune, and compare with the start in docs/lc25000; QUILTNET_DATA names the data
	$(BIN)/quiltnet shard --format quilt1m --table $(QUILTNET_DATA)/quilt_1M_lookup.csv --images $(QUILTNET_DATA)/images \
		--subset lc25000 --out shards/lc25000 --overwrite
	$(BIN)/python train.py experiment=lc25000 run_name=lc25000_start optim.lr=1e-30 epochs=0.01 "evaluator=[]" overwrite=true
	$(BIN)/torchrun --nproc-per-node 2 train.py experiment=lc25000 run_name=lc25000 overwrite=true
	$(BIN)/python eval.py "checkpoint={start: outputs/lc25000_start, fine-tuned: outputs/lc25000}" \
		"evaluator=[zeroshot_lc25000,zeroshot_lc25000_ensemble,linear_probe_lc25000,knn_lc25000,few_shot_lc25000,truncation_lc25000,robustness_lc25000,image_retrieval_lc25000,retrieval_val]" \
		"evaluator.linear_probe_lc25000.fractions=[0.01,0.1,1]" "evaluator.linear_probe_lc25000.seeds=[0,1,2,3,4]" \
		data.val.shards=shards/lc25000/val output=docs/lc25000 overwrite=true

test: $(VENV)/test-installed ## set-up, then the tests
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/dev-installed ## set-up, then formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean: ## remove .venv and what builds leave behind; results in outputs/ stay
	rm -rf $(VENV) build dist quiltnet.egg-info .pytest_cache .ruff_cache $(DEMO_SHARDS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "QuiltNet needs Python 3.10 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# demo-installed, test-installed, dev-installed: .venv has the package (editable) with that extra of setup.py.
$(VENV)/%-installed: setup.py | $(BIN)/python
	@echo "installing QuiltNet [$*] into $(VENV); PyTorch is large, so the first time takes minutes"
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@
