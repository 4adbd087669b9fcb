"""Writes tar files as the WebDataset format has them, for tests."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path


def write_shard(path: Path, samples: Sequence[dict[str, str | bytes]], form: int = -1) -> None:
    """One member `key.ending` for each entry of a sample, in order.

    Args:
      path: the tar file.
      samples: `__key__`, and the bytes of each ending.
      form: a format of `tarfile`; -1 is its default.
    """
    form = tarfile.DEFAULT_FORMAT if form < 0 else form
    with tarfile.open(path, "w", format=form) as archive:
        for sample in samples:
            for ending, content in sample.items():
                if ending == "__key__" or isinstance(content, str):
                    continue
                member = tarfile.TarInfo(f"{sample['__key__']}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
