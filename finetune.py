"""Fine-tunes a trained encoder on labeled images; see `configs/finetune_digits.py`."""

from jevb_jax.command_line import entry_points

if __name__ == "__main__":
    entry_points.finetune()
