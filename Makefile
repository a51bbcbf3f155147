# SPDX-License-Identifier: Apache-2.0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
BPF_SOURCES := $(shell find bpf -name '*.[ch]')
# What begins with a shell's #! line, wherever it is.
SHELL_SCRIPTS = $(shell find . \( -name .git -o -name .venv -o -name build \) -prune -o -type f \
	\( -perm -u+x -o -name '*.sh' -o -path './.ci/*' \) \
	-exec awk 'FNR == 1 && /^\#!.*[\/ ](ba|da)?sh( |$$)/ { print FILENAME } { nextfile }' {} +)

.PHONY: help setup demo test test-kernels check format bench fuzz install uninstall clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: ## install what the tool, the lab and the tests need (as root)
	tools/setup test

demo: ## start a small cluster on this machine and trace it (as root)
	tools/setup demo
	tools/demo

test: ## set up, then run every check and every test (as root)
	tools/setup test
	$(MAKE) check
	@# Real time on a busy machine can deny a test its turn. What fails twice fails; once is told.
	$(BIN)/pytest || { [ $$? = 1 ] && echo "once more, what failed:" && $(BIN)/pytest -rp --lf --lfnf=none; }

test-kernels: ## the live tests on stock kernels, in emulated guests (as root, half an hour)
	tools/setup kernels
	cd vagrant && vagrant validate --ignore-provider
	$(BIN)/python -m tests.guests.matrix

check: ## formatting, lint and types
	tools/setup test
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy --strict tracer tests
	$(if $(BPF_SOURCES),$(BIN)/clang-format --dry-run -Werror $(BPF_SOURCES))
	shellcheck $(SHELL_SCRIPTS)

format: ## format the sources, and mend what lint can mend
	tools/setup test
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format
	$(if $(BPF_SOURCES),$(BIN)/clang-format -i $(BPF_SOURCES))

bench: ## measure what tracing costs (as root)
	tools/setup test
	tools/bench

fuzz: ## run the property tests for long
	tools/setup test
	$(BIN)/pytest -m fuzz --hypothesis-profile=fuzz

install: ## install dnstrace for all users, in /opt/dnstrace (as root)
	tools/setup install

uninstall: ## remove what `make install` put there (as root)
	rm -rf /opt/dnstrace /var/cache/dnstrace
	if [ "$$(readlink /usr/local/bin/dnstrace)" = /opt/dnstrace/bin/dnstrace ]; then \
		rm /usr/local/bin/dnstrace; \
	fi

clean: ## remove all that was built, the virtual environment too
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find tracer tests -name __pycache__ -type d -exec rm -rf {} +
