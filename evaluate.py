"""Evaluates a run's checkpoint: `python evaluate.py --workdir=runs/digits`.

`--data=configs/transfer.py:digits` evaluates the run's encoder on other labeled data.
"""

from jevb_jax.command_line import entry_points

if __name__ == "__main__":
    entry_points.evaluate()
