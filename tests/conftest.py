"""Test set-up: eight simulated CPU devices and no compilations kept on disk, both set before JAX is imported."""

import gc
import os
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
# Programs kept by other runs, some of them killed on purpose, once aborted the interpreter while they were read back.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module", autouse=True)
def programs_end_with_their_file():
    """Drops compiled programs after each test file: every program maps memory, and past vm.max_map_count XLA crashes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
