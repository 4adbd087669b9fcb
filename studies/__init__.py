"""Our studies, and what reads their runs: `jevb-study studies/NAME.py --out=DIR`."""
