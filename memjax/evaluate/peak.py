"""The most memory this process has held; standard library only, since a light process is not measured with JAX in it."""

import resource
import sys
from pathlib import Path


def peak_mib() -> float:
    """The largest resident size of this process so far, in MiB, and not that of the process it was forked from."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts the parent's memory into a new process's resource usage
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
