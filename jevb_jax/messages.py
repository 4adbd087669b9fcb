"""Messages for people: text without markup, and errors that the user can mend.

The user can mend an error if this package raises it by its own `raise` statement, or if the machine
refuses something (a missing file, a full disk, no memory). All other errors are faults of the
program and keep their traceback for its developers. A `TypeError` of the package is such a fault,
too: settings are checked before, so another part of the program gave the wrong argument. Only where
images and labels are read is it about what the user has.
"""

import builtins
import dis
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.text import Text

_OWN_PACKAGES = ("jevb_jax", "configs")
_DATA = "jevb_jax.images."

# Messages of XLA's devices and of the CPU's allocator.
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "OUT_OF_MEMORY")

_WHAT_TAKES_LESS = """\
What needs less memory, the most effective first:
  train.batch_size              lower; or the same batch in parts: train.num_micro_batches
  augmentation.num_views, augmentation.num_small_crops, augmentation.image_size
                                fewer and smaller views
  model.width, model.projector_hidden_dims, model.embedding_dim, model.head_hidden_dim   smaller
  model.dtype=bfloat16          half of the memory between the layers
  train.shard_optimizer_state=True   on several devices
  input.placement=stream        the images stay off the device
  in the evaluation: evaluation.batch_size, ood.num_views, ood.num_samples, ood.max_fit_images"""


def say(console: Console, text: str) -> None:
    """Prints a text as it is, at any width: brackets and colons in a path are no markup."""
    console.print(Text(text), highlight=False, soft_wrap=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a device or of the machine is exhausted.

    Also looks at the errors that caused this error. `MemoryError` counts, and errors of XLA.
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


def _raised_in(error: BaseException) -> str:
    """The module whose `raise` statement raised the error; "" if no such statement did."""
    frames = error.__traceback__
    if frames is None:
        return ""
    while frames.tb_next is not None:
        frames = frames.tb_next
    code = frames.tb_frame.f_code.co_code
    # len(5) or min(()) in our own code ends in the same frame, but at another kind of instruction.
    is_statement = 0 <= frames.tb_lasti < len(code) and dis.opname[code[frames.tb_lasti]] in (
        "RAISE_VARARGS",
        "RERAISE",
    )
    return str(frames.tb_frame.f_globals.get("__name__", "")) if is_statement else ""


def for_person(error: BaseException, *, packages: Sequence[str] = _OWN_PACKAGES) -> str | None:
    """The message for the user about an error, or None for a fault of the program.

    Args:
      error: the error with its traceback.
      packages: modules whose `raise` statements are meant for users.
    """
    if is_out_of_memory(error):
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        return f"the memory is exhausted: {first or type(error).__name__}\n{_WHAT_TAKES_LESS}"
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, ImportError):  # an optional dependency is not installed
        is_ours = str(error.name or "").partition(".")[0] in packages
        return None if is_ours else text
    if isinstance(error, OSError):
        return text
    # AssertionError and KeyError are never meant for users.
    speaks = isinstance(error, (ValueError, TypeError, RuntimeError))
    is_builtin = type(error) is getattr(builtins, type(error).__name__, None)
    if not speaks or (is_builtin and isinstance(error, (RecursionError, NotImplementedError))):
        return None
    module = _raised_in(error)
    is_argument = type(error) is TypeError and module.startswith("jevb_jax.")
    if module.partition(".")[0] not in packages or (is_argument and not module.startswith(_DATA)):
        return None
    return text
