# make demo    sets everything up, lets a policy move a simulated arm for DURATION seconds, on a page of this machine
#              (BAG=build/demo_bag: a bag; DURATION=0: until Ctrl-C; PORT=8600: always there; VIEW=--no-page: in the terminal)
# make test    sets everything up and runs every check and test, colcon's included
# make faults  repeats a hundred times what needs a process; make soak: an hour with faults; make fuzz: 10^6 cases
# make fuzz-cpp  wrong programs for the engine, under sanitizers (CASES_CPP of them)
# make build   the virtual environment and the engine alone; make clean removes both

DURATION ?= 60
PORT ?= 0
VIEW ?=
MINUTES ?= 60
CASES ?= 1000000
CASES_CPP ?= 1000000
POLICY ?= vla_infer/demo/policy
CONTRACT ?= so101
# Empty: the demonstration drives a simulated arm.
BAG ?=
# Code for 8.0 runs on 8.6 and 8.9 too, and its PTX on what is newer; 9.0a is Hopper's own.
CUDA ?= AUTO
CUDA_ARCHS ?= 80;90a-real
TESTS ?=
BUILD_TESTS := $(addprefix test/test_,cuda.py cli.py engine.py policy.py verify.py)
# Only the reference executor needs it; `make test TORCH=` goes without, and its tests say what they lack.
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
IN_VENV := PATH="$(BIN):$$PATH"
BUILD := $(CURDIR)/build
PIP := $(IN_VENV) python -m pip install --quiet --disable-pip-version-check
ENGINE_SOURCES := $(shell find cuda_src -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# A sourced ROS decides the Python and lends its packages; else the first of 3.11, 3.12 and 3.10 that runs.
FITS := 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'
ROS_SOURCED := $(shell python3 -c 'import rclpy' 2>/dev/null && echo yes)
ifeq ($(ROS_SOURCED),yes)
PYTHON ?= python3
VENV_FLAGS := --system-site-packages
else
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do \
	$$p -c $(FITS) 2>/dev/null && echo $$p && break; done)
endif

.PHONY: demo test build lint pytest colcon faults soak fuzz fuzz-cpp clean
.DELETE_ON_ERROR:

demo: build $(BAG)
	$(IN_VENV) python -m vla_infer.demo --policy $(POLICY) --contract $(CONTRACT) $(if $(BAG),--bag $(BAG)) \
		--duration $(DURATION) --port $(PORT) $(VIEW) --profile config/fastdds.xml --log $(BUILD)/demo.log

# colcon runs every test on what it installed, a build without CUDA; of the build in the tree, which may have it, only
# what depends on that is run again. Five minutes of the soak pass beside the tests; it ends early when they fail, and
# they fail when it does.
test: build $(VENV)/.test
	@mkdir -p $(BUILD)
	@$(IN_VENV) nice timeout -k 60 900 python test/soak.py --minutes 5 --rate 5 >$(BUILD)/soak.log 2>&1 & soak=$$!; \
	trap 'kill $$soak 2>/dev/null' EXIT; trap 'exit 130' INT TERM; \
	$(MAKE) --no-print-directory lint colcon pytest TESTS="$(BUILD_TESTS)" || exit; \
	echo "soak of five minutes:"; wait $$soak; ended=$$?; cat $(BUILD)/soak.log; exit $$ended

build: $(VENV)/.engine

lint: $(VENV)/.test
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) mypy
	$(IN_VENV) clang-format --dry-run -Werror $(ENGINE_SOURCES)

pytest: build $(VENV)/.test
	$(IN_VENV) python -m pytest $(TESTS)

faults: build $(VENV)/.test
	$(IN_VENV) python -m pytest -s test/faults --fault-trials 100

soak: build $(VENV)/.test
	$(IN_VENV) python test/soak.py --minutes $(MINUTES)

fuzz: build $(VENV)/.test
	$(IN_VENV) python test/fuzz.py --cases $(CASES) --processes $$(nproc)

fuzz-cpp: $(VENV)/.run
	$(IN_VENV) cmake -S cuda_src -B $(BUILD)/fuzz -G Ninja -DVLA_CUDA=OFF -DPython_EXECUTABLE=$(BIN)/python \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(IN_VENV) cmake --build $(BUILD)/fuzz --target fuzz_program --parallel
	$(BUILD)/fuzz/fuzz_program $(CASES_CPP)

# The plain build is from scratch and without CUDA; the one with links shares the objects of `make build`.
colcon: build $(VENV)/.test
	rm -rf $(BUILD)/colcon
	@mkdir -p $(BUILD)/colcon
	printf '[build_ext]\ncuda = OFF\n' > $(BUILD)/colcon/plain.cfg
	$(IN_VENV) DIST_EXTRA_CONFIG=$(BUILD)/colcon/plain.cfg \
		colcon --log-base $(BUILD)/colcon/log build --paths $(CURDIR) \
		--build-base $(BUILD)/colcon/build --install-base $(BUILD)/colcon/install
	$(IN_VENV) colcon --log-base $(BUILD)/colcon/log test --paths $(CURDIR) \
		--build-base $(BUILD)/colcon/build --install-base $(BUILD)/colcon/install \
		--event-handlers console_direct+ --return-code-on-test-failure
	$(IN_VENV) colcon --log-base $(BUILD)/colcon/log test-result --test-result-base $(BUILD)/colcon/build --verbose
	$(IN_VENV) DIST_EXTRA_CONFIG=$(BUILD)/dist.cfg \
		colcon --log-base $(BUILD)/colcon/log build --symlink-install --paths $(CURDIR) \
		--build-base $(BUILD)/colcon/build-links --install-base $(BUILD)/colcon/install-links
	. $(BUILD)/colcon/install-links/setup.sh && cd / && \
		$(BIN)/python -c 'import vla_infer._engine as e; print("symlink install:", e.__file__)'

clean:
	rm -rf build $(VENV) vla_infer/*.so *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

build/demo_bag: | $(VENV)/.engine
	$(IN_VENV) python -m vla_infer.tools.make_bag $@

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10 to 3.12 found; name one with PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c $(FITS) || { echo "make: PYTHON=$(PYTHON): expected Python 3.10 to 3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	touch $@

$(VENV)/.run: requirements/build.txt requirements/run.txt requirements/ros.txt | $(VENV)/.made
	$(PIP) -r requirements/build.txt -r requirements/run.txt \
		$$($(BIN)/python -c 'import rclpy' 2>/dev/null || echo -r requirements/ros.txt)
	touch $@

$(VENV)/.test: requirements/test.txt | $(VENV)/.run
	$(PIP) -r requirements/test.txt -r requirements/build.txt $(TORCH)
	touch $@

$(BUILD)/dist.cfg: Makefile
	@mkdir -p $(@D)
	printf '[build_ext]\ncuda = $(CUDA)\ncuda_archs = $(CUDA_ARCHS)\ncmake_dir = $(BUILD)/engine\n' > $@

$(VENV)/.engine: setup.py pyproject.toml cuda_src/CMakeLists.txt $(ENGINE_SOURCES) $(BUILD)/dist.cfg | $(VENV)/.run
	$(IN_VENV) DIST_EXTRA_CONFIG=$(BUILD)/dist.cfg python setup.py --quiet build_ext --inplace
	DIST_EXTRA_CONFIG=$(BUILD)/dist.cfg $(PIP) --no-deps --no-build-isolation --editable .
	touch $@
