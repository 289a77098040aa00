"""The memory of a process: what it held itself, and neither less nor that of its parent."""

import subprocess
import sys

import numpy as np

from memjax.evaluate.peak import peak_mib

_CHILD = "from memjax.evaluate.peak import peak_mib; print(peak_mib())"


def test_what_was_held_once_counts_after_it_is_freed():
    before = peak_mib()
    held = np.ones(64 * 2**20, np.uint8)
    during = peak_mib()
    del held
    assert during > max(before - 1, 64)  # the kernel counts pages per thread and adds them up now and then
    assert abs(peak_mib() - during) < 1


def test_a_new_process_does_not_begin_at_the_size_of_the_one_that_started_it():
    held = np.ones(256 * 2**20, np.uint8)
    child = float(subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, check=True).stdout)
    assert 1 < child < held.nbytes / 2**20 < peak_mib()
