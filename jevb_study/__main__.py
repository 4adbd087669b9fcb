"""`python -m jevb_study`."""

import sys

from jevb_study import run

if __name__ == "__main__":
    sys.exit(run.start())
