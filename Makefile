# Everything runs in its own virtual environment, made on first use and kept up to date with pyproject.toml.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_FLAGS ?= -n 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
DEMO := out/demo.family

# The quantisers of bench-frontier, and bench-structure's peer, pin versions of each other's packages, so that each needs an environment of its own.
PEER_VENVS := build/peers
PEER_autoround := auto-round==0.16.1
PEER_gptqmodel := gptqmodel==7.6.0
PEER_llmcompressor := llmcompressor==0.14.0.1
PEER_hqq := hqq==0.2.8.post1
PEER_torchpruning := torch-pruning==1.6.1

export OMP_NUM_THREADS ?= 2

.PHONY: demo test check llamacpp picture bench-ablation bench-allocation bench-device bench-effort bench-family bench-formats bench-frontier bench-kill bench-latency bench-scale bench-scores bench-structure bench-train-once bench-zoo peers clean
.NOTPARALLEL:

demo: $(VENV)/.installed  ## One run over the embedded model; then two sizes and a transformers folder out of it.
	$(BIN)/anyfit fit -o $(DEMO) --force
	$(BIN)/anyfit show $(DEMO) --budget 30%
	$(BIN)/anyfit export $(DEMO) --budget 30% -o out/demo-30.gguf --force
	$(BIN)/anyfit export $(DEMO) --budget 45% -o out/demo-45.gguf --force
	$(BIN)/anyfit extract $(DEMO) --budget 30% -o out/demo-30 --force
	@echo
	@echo "Look at:  $(DEMO)/report.html      the frontier, and what each layer gets at any size"
	@echo "          out/demo-30.gguf, out/demo-45.gguf    for llama.cpp, each with its model card"
	@echo "          out/demo-30                           for transformers"
	@echo "Try:      $(BIN)/anyfit export $(DEMO) --budget '3.5 bits' -o out/mine.gguf"

test: $(VENV)/.dev  ## The whole suite but for the tests marked slow.
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

check: $(VENV)/.dev  ## Style, types, and the layers of docs/architecture.md.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy --explicit-package-bases $(foreach code,arg-type assignment dict-item import-not-found index misc override union-attr var-annotated,--disable-error-code $(code)) benchmarks/*.py
	$(BIN)/lint-imports --no-logo

llamacpp: $(VENV)/.llamacpp  ## llama.cpp itself, compiled here: its checks are skipped without it.

picture: $(VENV)/.installed  ## docs/frontier.png out of the demo's family.
	$(BIN)/python -c 'from pathlib import Path; from anyfit import Family; from anyfit.report.plots import frontier_png; frontier_png(Family.open("$(DEMO)"), Path("docs/frontier.png"))'

bench-ablation: $(VENV)/.installed  ## What each part brings, from plain rounding on. ASSETS=FOLDER adds models.
	$(BIN)/python benchmarks/ablation.py $(if $(ASSETS),--assets "$(ASSETS)")

bench-allocation: $(VENV)/.installed  ## Who gets the bits: uniform, exact, evolution; the time of a whole frontier.
	$(BIN)/python benchmarks/allocation.py

bench-device: $(VENV)/.installed  ## A graphics processor against the processors: same results, time, memory. Needs one, and TORCH=torch for it.
	$(BIN)/python -m pip -qq install peft
	$(BIN)/python benchmarks/device.py

bench-effort: $(VENV)/.installed  ## Low, normal and high effort: time, and quality at equal budgets.
	$(BIN)/python benchmarks/effort.py

bench-family: $(VENV)/.llamacpp  ## The main job twice, then many budgets: time, exact sizes, equal bytes.
	$(BIN)/python benchmarks/family.py

bench-formats: $(VENV)/.llamacpp  ## Uniform formats against llama.cpp's own quantiser. ASSETS=FOLDER adds models.
	$(BIN)/python benchmarks/formats.py $(if $(ASSETS),--assets "$(ASSETS)")

bench-frontier: $(VENV)/.llamacpp $(if $(PEERS),,peers)  ## Every size against the peers. ASSETS=FOLDER adds models, PEERS=FOLDER has their environments.
	$(BIN)/python benchmarks/frontier.py --environments $(or $(PEERS),$(PEER_VENVS)) $(if $(ASSETS),--assets "$(ASSETS)")

bench-kill: $(VENV)/.installed  ## A hundred kills and some full disks: the same bytes in the end.
	$(BIN)/python benchmarks/kill.py

bench-latency: $(VENV)/.dev $(VENV)/.llamacpp  ## Latencies of smaller networks, predicted from a table and found, in ONNX Runtime, llama.cpp and torch.
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/latency.py

bench-scale: $(VENV)/.installed $(if $(PEERS),,peers)  ## Memory, time and disk of large networks; five formats against the peers' one.
	$(BIN)/python benchmarks/scale.py --environments $(or $(PEERS),$(PEER_VENVS))

bench-scores: $(VENV)/.installed  ## Predicted against measured loss over random configs.
	$(BIN)/python benchmarks/scores.py

bench-structure: $(VENV)/.dev $(if $(MINILM),$(if $(PEERS),,$(PEER_VENVS)/torchpruning/.installed))  ## Heads and channels taken out: exactness, quality, speed. MINILM=FOLDER ASSETS=FOLDER adds an encoder.
	@status=0; \
	$(BIN)/python benchmarks/structure.py || status=1; \
	$(if $(MINILM),$(BIN)/python benchmarks/structure.py --minilm "$(MINILM)" --assets "$(ASSETS)" --environments $(or $(PEERS),$(PEER_VENVS)) || status=1;) \
	exit $$status

bench-train-once: $(VENV)/.installed  ## One run that trains every size, against a run for each. ASSETS=FOLDER adds Double Rounding.
	$(BIN)/python benchmarks/train_once.py $(if $(ASSETS),--assets "$(ASSETS)")

bench-zoo: $(VENV)/.installed  ## What plain rounding costs the embedded model.
	$(BIN)/python benchmarks/zoo.py

peers: $(foreach peer,autoround gptqmodel llmcompressor hqq,$(PEER_VENVS)/$(peer)/.installed)  ## The environments of bench-frontier's peers.

clean:  ## The environment, the caches and everything that was made.
	rm -rf $(VENV) out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find anyfit benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml
	@echo "Installing into $(VENV), once. It takes a minute or two."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install "$(TORCH)"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@$(PIP) install --editable '.[dev]'
	@touch $@

$(VENV)/.llamacpp: $(VENV)/.installed
	@echo "Compiling llama.cpp, once. It takes some ten minutes."
	@CMAKE_ARGS=-DGGML_NATIVE=ON CMAKE_BUILD_PARALLEL_LEVEL=2 $(PIP) install --editable '.[llamacpp]'
	@touch $@

# The constraint keeps a peer from replacing torch by a newer one. transformers and the rest come before it, as it may need them to install.
$(PEER_VENVS)/%/.installed:
	@echo "Installing $(PEER_$*), once."
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@echo "$(TORCH)" > $(@D)/constraints.txt
	@$(@D)/bin/python -m pip -qq --disable-pip-version-check install "$(TORCH)"
	@$(@D)/bin/python -m pip -qq --disable-pip-version-check install -c $(@D)/constraints.txt transformers accelerate safetensors datasets
	@$(@D)/bin/python -m pip -qq --disable-pip-version-check install -c $(@D)/constraints.txt $(PEER_$*)
	@touch $@
