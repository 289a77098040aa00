"""Launchers: they build lists of arguments and hand them to the tools that do the work; see launch/README.md.

Standard library only and no part of the installed package: run them from the root of a checkout, whose code they ship,
as `python -m launch.local`, `launch.tpu_queued`, `launch.gke_xpk` or `launch.jobset`.
"""
