"""What people read: lines in which nothing is markup, and errors that are theirs to mend.

An error is a person's to mend where this package raises it by a statement of its own, or where the
machine says no (a file that is not there, a full disk, memory). Everything else is a fault of the
program: its frames belong to whoever mends it.
"""

import builtins
import dis
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.text import Text

_OWN_PACKAGES = ("jevb_jax", "configs")

# What XLA's devices and the CPU's allocator say.
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "OUT_OF_MEMORY")

_WHAT_TAKES_LESS = """\
What takes less memory, the most effective first:
  train.batch_size              lower; or the same batch in parts: train.num_micro_batches
  augmentation.num_small_crops, augmentation.image_size   fewer and smaller views
  model.width, model.projector_hidden_dims, model.embedding_dim, model.head_hidden_dim   smaller
  model.dtype=bfloat16          half of the memory between the layers
  train.shard_optimizer_state=True   on several devices
  input.placement=stream        the images stay off the device
  in the evaluation: evaluation.batch_size, ood.num_views, ood.num_samples, ood.max_fit_images"""


def say(console: Console, text: str) -> None:
    """Prints a text as it is, whatever the width: brackets and colons in a path are no markup.

    Args:
      console: where people read.
      text: one line or several.
    """
    console.print(Text(text), highlight=False, soft_wrap=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a device or of the machine ran out.

    Args:
      error: any; what it was raised from is looked at too.

    Returns:
      True for `MemoryError` and for XLA's errors that say so.
    """
    found: BaseException | None = error
    while found is not None:
        is_of_xla = isinstance(found, jax.errors.JaxRuntimeError)
        if isinstance(found, MemoryError) or (
            is_of_xla and any(words in str(found) for words in _OUT_OF_MEMORY)
        ):
            return True
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return False


def _is_raised_by(error: BaseException, packages: Sequence[str]) -> bool:
    """Whether the error comes from a `raise` in one of the packages, not from what they call."""
    frames = error.__traceback__
    if frames is None:
        return False
    while frames.tb_next is not None:
        frames = frames.tb_next
    package = str(frames.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    code = frames.tb_frame.f_code.co_code
    # len(5) or min(()) in one of our lines ends in the same frame, at another instruction.
    is_statement = 0 <= frames.tb_lasti < len(code) and dis.opname[code[frames.tb_lasti]] in (
        "RAISE_VARARGS",
        "RERAISE",
    )
    return package in packages and is_statement


def for_person(error: BaseException, *, packages: Sequence[str] = _OWN_PACKAGES) -> str | None:
    """What to tell the person at the keyboard of an error.

    Args:
      error: as it was caught, with its traceback.
      packages: modules whose own `raise` statements speak to people.

    Returns:
      The message, or None where frames belong: a fault of the program.
    """
    if is_out_of_memory(error):
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        return f"the memory ran out: {first or type(error).__name__}\n{_WHAT_TAKES_LESS}"
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, ImportError):  # an extra that is not installed
        is_ours = str(error.name or "").partition(".")[0] in packages
        return None if is_ours else text
    if isinstance(error, OSError):
        return text
    # An AssertionError or a KeyError never speaks to people.
    speaks = isinstance(error, (ValueError, TypeError, RuntimeError))
    is_builtin = type(error) is getattr(builtins, type(error).__name__, None)
    if not speaks or (is_builtin and isinstance(error, (RecursionError, NotImplementedError))):
        return None
    return text if _is_raised_by(error, packages) else None
