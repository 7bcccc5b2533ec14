# Every command prepares what it needs (an environment and ComfyUI, kept outside the checkout) and then runs.
# COMFYUI_PATH=folder uses a ComfyUI of yours, COMFYUI_PYTHON=python its Python, PYTHON=python builds the environment.
PORT ?= 8188
ARGS ?=
CHECKPOINT ?=
PRESET ?=
PROMPTS ?=
RUN := sh tools/start.sh environment.py

.DEFAULT_GOAL := help
.PHONY: help demo check test test-all browser pictures serve bench report train-demo train-features train-adapter lock clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

demo: ## erase a concept on the demo model; pictures and report in output/demo/
	@$(RUN) demo.run $(ARGS)

check:
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) tools.typecheck

# Two runs of tests beside each other, a core each; 5: ARGS chose none of these.
both = mkdir -p output; export OMP_NUM_THREADS=1; \
	$(RUN) -m pytest $(1) $(ARGS) >output/test-beside.log 2>&1 & beside=$$!; \
	$(RUN) -m pytest $(2) $(ARGS); here=$$?; \
	wait $$beside; there=$$?; cat output/test-beside.log; \
	[ $$here -ne 5 ] || here=0; [ $$there -ne 5 ] || there=0; exit $$((here | there))
QUICK = -m "not server and not browser and not slow"

test: check ## lint, types, and the tests that need no server, browser or full-size network
	@export CONCEPT_GUARD_SHARE=$$(mktemp -d); trap 'rm -rf "$$CONCEPT_GUARD_SHARE"' EXIT; \
	$(call both,$(QUICK),$(QUICK))

test-all: check browser ## lint, types and every test; brings chromium
	@export CONCEPT_GUARD_BROWSER=required; \
	$(call both,-m "server or browser",-m "not server and not browser")

browser: ## bring what the browser tests need beside the rest: chromium, Playwright, a newer frontend
	@$(RUN) tools.browser

pictures: ## thumbnails of the templates and pictures of the help pages; needs `make browser`
	@$(RUN) demo.pictures $(ARGS)

serve: ## ComfyUI with this pack in the foreground: make serve PORT=8188
	@$(RUN) tools.serve --port $(PORT) $(ARGS)

bench: ## measure: tables in output/bench/, the kept ones in docs/measured.md
	@$(RUN) benchmarks.run $(ARGS)

report: ## a preset on a checkpoint: make report CHECKPOINT=.. PRESET=.. PROMPTS=..; without arguments, the demo's
	@$(RUN) demo.report $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") $(if $(PRESET),--preset "$(PRESET)") $(if $(PROMPTS),--prompts "$(PROMPTS)") $(ARGS)

train-demo: ## rebuild the demo data and weights from scratch
	@$(RUN) demo.train $(ARGS)

train-features: ## learn the features and the demo world's discriminators
	@$(RUN) demo.train_features $(ARGS)

train-adapter: ## learn EIUP's automatic weight on the demo model
	@$(RUN) benchmarks.train_adapter $(ARGS)

lock: ## resolve tools/requirements.in into tools/requirements.lock again
	@sh tools/start.sh run.py tools.lock

clean: ## remove what the commands wrote into the checkout
	rm -rf output .pytest_cache .ruff_cache .hypothesis
