# make demo      the four packages, then the three commands on the embedded corpus, into demo/
# make test      the packages of the tests, then the quick tests, two at a time
# make test-all  every test, in two versions of transformers, and 40 kills of training runs
# make bench     speed and memory beside transformers and nn.Transformer (70 minutes)
# make gpu       what a GPU makes of it: equality, speed, profiles (benchmarks/README.md)
# make soak      200 kills of training runs at random moments, each resumed (about 10 minutes)

PYTHON ?= python3
BIN := "$(CURDIR)/.venv/bin"

.PHONY: demo test test-all bench gpu soak clean

.venv/four: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/ready: .venv/four tests/requirements.txt
	$(BIN)/pip install -q -r tests/requirements.txt
	touch $@

.venv-old/ready: requirements.txt tests/requirements-old.txt
	$(PYTHON) -m venv .venv-old
	.venv-old/bin/pip install -q -r tests/requirements-old.txt
	touch $@

demo: .venv/four
	rm -rf demo && mkdir demo
	cd demo && $(BIN)/torchrun ../train_encoder.py
	cd demo && $(BIN)/torchrun ../train_seq2seq.py --init enc.pt --unfreeze-at 0.5
	cd demo && $(BIN)/python ../eval.py enc.pt --langs en
	cd demo && $(BIN)/python ../eval.py seq2seq.pt --langs en

test: .venv/ready
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: test .venv-old/ready
	TRANSFORMERS_OLD="$(CURDIR)/.venv-old/bin/python" $(BIN)/python -m pytest -n 2 -m slow
	$(BIN)/python tests/soak.py --kills 40

bench: .venv/ready
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/scaling.py

gpu: .venv/ready
	$(BIN)/python benchmarks/gpu.py

soak: .venv/ready
	$(BIN)/python tests/soak.py --kills 200

clean:
	rm -rf .venv .venv-old demo sample/data
