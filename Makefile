# `make demo` and `make test` install what they need into .venv first; PYTHON chooses the interpreter for it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Two test workers of one thread each beat one of two, and results do not depend on the machine's cores.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help demo test lint types slow bench zoo results report clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    evaluate the shipped RT-ER model with AutoAttack and moe-adaptive, and render its report (folder demo/)"
	@echo "make test    lint, types and all tests but the slow ones"
	@echo "make lint    ruff and mypy            make types   mypy alone"
	@echo "make slow    the slow tests           make report  render reports/ from results.db"
	@echo "make bench   measure the speed against pyautoattack and torchattacks"
	@echo "make zoo     train all shipped models make results run what results.db lacks, then the report"
	@echo "make clean   delete what the other targets made, .venv excepted"

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "moebench needs Python 3.11 or newer; try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make virtual environments; try: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps stand for a finished installation: an interrupted one is done again.
$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install --quiet -e . -c constraints.txt
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install --quiet -e ".[test,postgres,parquet,ray]" -c constraints.txt
	@touch $@ $(VENV)/.runtime

demo: $(VENV)/.runtime
	@mkdir -p demo
	$(BIN)/moebench evaluate --model rt-er --attack autoattack,moe-adaptive --db demo/results.db --fresh
	$(BIN)/moebench report --db demo/results.db --out demo/reports
	@echo
	@echo "Report:  demo/reports/index.html (open it in a browser)"
	@echo "Tables:  $$(find demo/reports -name '*.tex' -o -name '*.csv' | sort | tr '\n' ' ')"
	@echo "Numbers: demo/results.db (moebench show RUN --db demo/results.db)"

test: lint
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

slow: $(VENV)/.installed
	$(TEST_ENV) $(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow an editable install whose folders have other names than its packages.
types: $(VENV)/.installed
	@rm -rf $(VENV)/types && mkdir -p $(VENV)/types/moebench
	@ln -s "$(CURDIR)"/benchmark/* "$(CURDIR)/models" "$(CURDIR)/attacks" $(VENV)/types/moebench/
	MYPYPATH=$(VENV)/types $(BIN)/mypy --strict -p moebench

report: $(VENV)/.runtime
	$(BIN)/moebench report --out reports

# Alternating timings against pyautoattack and torchattacks; close other programs first.
bench: $(VENV)/.runtime
	$(BIN)/python -m moebench.bench

# Trains every model of the registry on the digits (hours on two cores), parts before what is composed of them.
zoo: $(VENV)/.runtime
	for model in $$($(BIN)/moebench list models | awk '{print $$1}'); do \
		$(BIN)/moebench train --model $$model --dataset digits --out models/weights/digits || exit 1; done

# Runs what results.db lacks of the digits leaderboard and its findings (hours); one thread, so that the numbers do not
# depend on the cores.
SHIPPED = $$($(BIN)/moebench list models | grep -v "no weights shipped" | awk '$(1) {print $$1}')
RT_ER := wrn-st resnet18-st resnet34-st st-moe at-moe at-moe-top2 trades-moe rt-er rt-er-shared-attack rt-er-top2 rt-er-e3 rt-er-e4 rt-er-e5 rt-er-official dual-moe jtd-moe
results: export OMP_NUM_THREADS = 1
results: $(VENV)/.runtime
	$(BIN)/moebench sweep --suite v1 --datasets digits
	$(BIN)/moebench evaluate --model dual-moe --set mixing=probabilities --attack fgsm,pgd-50
	$(BIN)/moebench evaluate --model dual-moe --set mixing=probabilities --attack autoattack,moe-adaptive,universal-pgd --view whole
	set -e; for mixing in logits probabilities; do for alpha in 0.5 0.6 0.8 0.9; do \
		$(BIN)/moebench evaluate --model dual-moe --set mixing=$$mixing --set alpha=$$alpha --attack pgd-50,autoattack --view whole; \
	done; done
	set -e; for model in $(call SHIPPED,$$2 == "moe" || $$2 == "dual"); do \
		$(BIN)/moebench experts --model $$model --attack pgd-20; \
	done
	set -e; for model in $(RT_ER); do \
		$(BIN)/moebench evaluate --model $$model --attack published:rt-er,published:rt-er-autoattack --view whole; \
	done
	set -e; for model in adv-moe adv-moe-cnn; do \
		$(BIN)/moebench evaluate --model $$model --attack published:adv-moe --view whole; \
	done
	set -e; for model in v-moe v-moe-at vit vit-at; do \
		$(BIN)/moebench evaluate --model $$model --attack published:v-moe --view whole; \
	done
	set -e; for model in $(call SHIPPED,/^(block|conv)-moe/); do \
		$(BIN)/moebench evaluate --model $$model --attack published:robust-experts --view whole; \
	done
	$(BIN)/moebench report --out reports

clean:
	rm -rf build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis $(VENV)/types
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
