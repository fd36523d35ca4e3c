"""Benchmarks against the programs people use today: side by side, in one run, on one machine, as ratios.

    python -m bench [nbd|convert|compress|mirror|check|all] [--quick] [--json FILE]

See ``docs/benchmarks.md`` for what is measured and how. Nothing here is part of the installed package.
"""
