"""Tells a file that is damaged from a file that could not be reached."""

import re

# Libraries that read object stores. Their errors are about the connection, a permission or a quota;
# where a file is missing they raise FileNotFoundError.
_OF_STORES = (
    *("aiohttp.", "botocore.", "gcsfs.", "google.api_core.", "google.auth.", "google.cloud."),
    *("requests.", "s3fs.", "urllib3."),
)
# How TensorStore and XLA begin the text of such errors. They raise ValueError and RuntimeError.
_STATUS = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|ABORTED"
    r"|CANCELLED): "
)
# These do say something about the files.
_OF_FILES = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def is_of_access(error: BaseException) -> bool:
    """Whether an error of reading says nothing about the file that was read.

    True for lost connections, timeouts, missing permissions, quotas, errors of the disk, and
    exhausted memory. The causes of the error count too. What cannot be told apart counts as damage.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, (OSError, MemoryError)) and not isinstance(found, _OF_FILES):
            return True
        is_of_store = f"{type(found).__module__}.".startswith(_OF_STORES)
        if (is_of_store and not isinstance(found, _OF_FILES)) or _STATUS.search(str(found)):
            return True
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return False
