# Two commands set everything up on a fresh machine with Python 3.11+:
#   make demo   the main job on a real trained network
#   make test   linters, types, layers and the tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := build/demo

.PHONY: demo test gpu check format clean

demo: $(READY)
	mkdir -p $(DEMO)
	$(BIN)/parnet-export fuse --ckpt examples/digits/digits.pth.tar --out $(DEMO)/digits.fused.safetensors \
		--mean 0.305 --std 0.324 --crop 1 --interpolation bilinear --labels examples/digits/labels.txt
	$(BIN)/parnet-export split-streams $(DEMO)/digits.fused.safetensors --batch dynamic --out $(DEMO)/digits.bundle
	$(BIN)/parnet-export inspect $(DEMO)/digits.bundle --svg $(DEMO)/stream_graph.svg
	$(BIN)/parnet-export verify $(DEMO)/digits.bundle --ckpt examples/digits/digits.pth.tar
	$(BIN)/python examples/digits/evaluate.py --ckpt examples/digits/digits.pth.tar \
		--fused $(DEMO)/digits.fused.safetensors --bundle $(DEMO)/digits.bundle
	$(BIN)/python examples/digits/pictures.py $(DEMO)/pictures
	$(BIN)/parnet-export classify $(DEMO)/pictures/*.png --bundle $(DEMO)/digits.bundle --top 2
	$(BIN)/parnet-bench latency $(DEMO)/digits.bundle --devices cpu \
		--ckpt examples/digits/digits.pth.tar --baseline resnet18 --output $(DEMO)/latency.json
	@echo "The stream graph is drawn in $(DEMO)/stream_graph.svg"

test: check
	$(BIN)/pytest -n 2 -m "not slow and not gpu"

# On a machine with a GPU: the tests that need one, then what engines there take. PY is any
# Python that has torch for CUDA and the dependencies of pyproject.toml, such as PY=python3; by
# default that of .venv, if it is there. Packages elsewhere are found by PYTHONPATH.
# What fails keeps nothing after it from being tried, and makes the whole fail at the end.
OUT ?= build/gpu
gpu: PY ?= $(or $(wildcard $(BIN)/python),$(PYTHON))
gpu: BENCH = $(PY) -c "from parnet_bench.cli import main; main()"
gpu: export PYTHONPATH := .:engines:bench$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu:
	mkdir -p $(OUT)
	$(PY) -c "import msgspec, onnx_ir, onnxscript, psutil, pytest, safetensors, scipy, torch, typer"
	@failed=; \
	try() { what=$$1; shift; echo "== $$what"; "$$@" || failed="$$failed $$what"; }; \
	try tests $(PY) -m pytest -m gpu --junit-xml=$(OUT)/tests.xml; \
	try selftest $(BENCH) selftest --devices 0 --output $(OUT)/selftest.json; \
	try selftest-fp16 $(BENCH) selftest --devices 0 --precision fp16 \
		--output $(OUT)/selftest-fp16.json; \
	try engines $(BENCH) engines --devices 0 --output $(OUT)/engines.json; \
	test -z "$$failed" || { echo "failed:$$failed; results are in $(OUT)" >&2; exit 1; }

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The marker is newer than what it was made from, so a changed dependency installs again.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable '.[cpu]'
	touch $@

clean:
	rm -rf build dist $(VENV)
