"""The archive form of a model: weights as safetensors, and a JSON file that describes them.

`model.json` holds the config, the shape and type of every array, the names of arrays that are stored
in 8 bits (`eight_bits`), and the SHA-256 of every other file and of itself. It is written last, so a
directory that holds it is complete. Nothing is pickled.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import numpy as safetensors

from jevb_jax.runs import eight_bits, files

FORMAT = 1
MANIFEST = "model.json"
WEIGHTS = "model.safetensors"
WRAPPED = "wrapped_detector"  # entry of a detector whose encoder is not ours
_EXPORT_AGAIN = "export the run again"


class ArchiveError(RuntimeError):
    """An exported model is damaged, incomplete, or not what was written."""


def is_archive(directory: Path) -> bool:
    """Whether a directory holds an exported model."""
    return (directory / MANIFEST).exists()


def check_free(directory: Path, *, kind: str) -> None:
    """Raises an error if writing an archive would destroy something else.

    Args:
      directory: where the archive will be; it need not exist.
      kind: "export", "detector" or "wrapped detector". An older archive of the same kind may be
        replaced.

    Raises:
      ValueError: the directory holds a run, or a model of another kind.
      ArchiveError: the directory holds a damaged archive, whose kind is unknown.
    """
    if (directory / "config.json").exists():
        raise ValueError(f"{directory} holds a run: give another directory for the {kind}")
    if not is_archive(directory):
        found = sorted(path.name for path in directory.glob("*.safetensors"))
        if found:
            raise ValueError(
                f"{directory} holds {', '.join(found)} without {MANIFEST}. They belong to another "
                "program, or to a model whose writing was interrupted. Remove them, or give another "
                f"directory for the {kind}"
            )
        return
    manifest = read_manifest(directory)
    found = "export"
    for name, of in (
        ("finetuned", "fine-tuned classifier"),
        ("detector", "detector"),
        (WRAPPED, "wrapped detector"),
    ):
        if name in manifest:
            found = of
    if found != kind:
        raise ValueError(
            f"{directory} holds a model ({found}): give another directory for the {kind}"
        )


def write_archive(
    directory: Path,
    *,
    arrays: Mapping[str, np.ndarray],
    manifest: Mapping[str, Any],
    extra_files: Mapping[str, bytes],
) -> None:
    """Writes a model, and its manifest last.

    Args:
      directory: created if it does not exist. An older model in it is replaced; if there is no
        space for the new one, the older model stays whole.
      arrays: weights by name. Those of 8 bits (`eight_bits`) are stored in a quarter of the bytes.
      manifest: JSON values. The entries about files and arrays are added here.
      extra_files: contents of other files by name.
    """
    whole = {
        **manifest,
        "arrays": {
            name: {"shape": list(array.shape), "dtype": str(array.dtype)}
            for name, array in arrays.items()
        },
    }
    stored, packed = eight_bits.pack(arrays)
    if packed:
        whole["packed"] = packed
    contents = {WEIGHTS: safetensors.save(stored), **extra_files}
    write_described(directory, contents, whole, manifest_name=MANIFEST)


def write_described(
    directory: Path,
    contents: Mapping[str, bytes],
    manifest: Mapping[str, Any],
    *,
    manifest_name: str,
) -> None:
    """Writes files, and last the manifest with their hashes and its own.

    Args:
      directory: created if it does not exist. Older files of these names are replaced together.
      contents: contents of the files by name.
      manifest: JSON values. The format and the entries about files are added here.
      manifest_name: name of the manifest.
    """
    directory.mkdir(parents=True, exist_ok=True)
    whole = {
        **manifest,
        "format": FORMAT,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        },
    }
    whole["manifest_sha256"] = files.json_sha256(whole)
    written = {**contents, manifest_name: files.indented_json(whole).encode()}
    files.write_together(directory, written, last=manifest_name)


def arrays_sha256(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the names, types, shapes and bits of arrays, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def read_manifest(
    directory: Path, name: str = MANIFEST, *, remedy: str = _EXPORT_AGAIN
) -> dict[str, Any]:
    """Reads the JSON values that describe an exported model, or other files with hashes.

    Args:
      directory: directory of the files.
      name: name of the manifest.
      remedy: what the user can do if it is damaged, for messages.

    Raises:
      ArchiveError: there is no manifest, it was changed, or it is of another version.
    """
    path = directory / name
    if not path.exists():
        raise ArchiveError(f"{directory} holds no {name}; {remedy}")
    try:
        manifest = files.read_json(path)
        asked = manifest.pop("manifest_sha256")
    except (ValueError, KeyError, AttributeError) as error:
        raise ArchiveError(f"{path} is damaged ({error!r}); {remedy}") from error
    if files.json_sha256(manifest) != asked:
        raise ArchiveError(f"{path} is not what was written (SHA-256); {remedy}")
    if manifest["format"] != FORMAT:
        raise ArchiveError(f"{path} has format {manifest['format']}, this version reads {FORMAT}")
    return manifest


def read_file(
    directory: Path,
    manifest: Mapping[str, Any],
    name: str,
    *,
    remedy: str = "copy or export it again",
) -> bytes:
    """Reads one file of an exported model and checks its hash.

    Args:
      directory: directory of the model.
      manifest: from `read_manifest`.
      name: name of the file.
      remedy: what the user can do if it is missing or damaged, for messages.

    Raises:
      ArchiveError: the file is missing, not part of the model, or not what was written.
    """
    if name not in manifest["files"]:
        raise ArchiveError(f"{directory} was exported with {list(manifest['files'])}, not {name}")
    asked = manifest["files"][name]
    path = directory / name
    if not path.exists():
        raise ArchiveError(f"{path} is missing; {remedy}")
    content = path.read_bytes()
    if len(content) != asked["bytes"] or hashlib.sha256(content).hexdigest() != asked["sha256"]:
        raise ArchiveError(
            f"{path} is not what was written: {len(content):,} bytes, expected {asked['bytes']:,} "
            f"with SHA-256 {asked['sha256'][:12]}...; {remedy}"
        )
    return content


def read_arrays(directory: Path, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Reads the weights of an exported model, by name, and checks their hash.

    Raises:
      ArchiveError: the file is missing, or not what was written.
    """
    stored = safetensors.load(read_file(directory, manifest, WEIGHTS))
    return eight_bits.unpack(stored, manifest.get("packed", []))
