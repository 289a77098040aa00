"""Test set-up, before JAX is imported: eight simulated CPU devices, cheap compilations, shared within a run."""

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test's time is compiling, for tiny arrays: a third less of it where LLVM optimises nothing.
for flag, value in (("xla_force_host_platform_device_count", 8), ("xla_backend_optimization_level", 0)):
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}={value}".strip()
# Files that compile the same programs share them for this run, also with the processes that they start. Nothing is kept.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="memjax-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A suite that a shell started in the background ignores Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def programs_end_with_their_file():
    """Drops compiled programs after each test file: every program maps memory, and past vm.max_map_count XLA crashes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture
def bank(tmp_path):
    """A bank that an engine can answer from."""
    from memjax.bank.store import open_bank
    from tests.small_bank import BASE, TEXTS, add

    with open_bank(tmp_path / "bank", create=True, base_id=BASE.id, base_name=BASE.name) as bank:
        for seed, name in enumerate(TEXTS, start=1):
            add(bank, name, seed)
        yield bank
