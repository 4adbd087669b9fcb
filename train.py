"""Trains or resumes a run: `python train.py --config=configs/digits.py --workdir=runs/digits`."""

from jevb_jax.command_line import entry_points

if __name__ == "__main__":
    entry_points.train()
