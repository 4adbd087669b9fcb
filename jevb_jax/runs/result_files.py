"""Files of results, which are never overwritten by results of other settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jevb_jax.runs import files


def result_files(workdir: Path, suffix: str) -> list[Path]:
    """Where the results of one evaluation are; JSON, which tells of the others, last."""
    names = (f"results{suffix}.csv", f"report{suffix}.html", f"results{suffix}.json")
    return [workdir / name for name in names]


def rename_results(workdir: Path, suffix: str, new_suffix: str) -> None:
    """Gives the results of one evaluation other names.

    Args:
      workdir: directory of the run, of `files.to_path`.
      suffix: what the names end with now: "" is `results.json`.
      new_suffix: what the names of the new results end with.
    """
    new = result_files(workdir, new_suffix)
    for path, new_path in zip(result_files(workdir, suffix), new, strict=True):
        if path.exists():
            path.replace(new_path)


def keep_other_results(workdir: Path, suffix: str, settings_sha256: str) -> None:
    """Copies results that those of other settings are about to replace.

    The copies have a part of their settings' hash in their names: `results_1a2b3c4d.json`.

    Args:
      workdir: directory of the run, of `files.to_path`.
      suffix: what the names of the new results end with.
      settings_sha256: of the new results' settings; older ones of the same are not kept.
    """
    path = workdir / f"results{suffix}.json"
    if not path.exists():
        return
    found = files.read_json(path)
    # Older versions wrote no hash: that of the numbers does as well.
    older = found["settings_sha256"] if "settings_sha256" in found else files.json_sha256(found)
    if older == settings_sha256:
        return
    copies = result_files(workdir, f"{suffix}_{older[:8]}")
    for path, copy in zip(result_files(workdir, suffix), copies, strict=True):
        if path.exists():
            files.write_bytes_atomically(copy, path.read_bytes())


def settings_sha256(config: dict[str, Any], data_changes: Sequence[str] = ()) -> str:
    """A hash of what results depend on beside the trained encoder.

    Args:
      config: what the run was trained with, plain values.
      data_changes: accepted changes of its data: results of other data are others.

    Returns:
      Hexadecimal digits.
    """
    sections = {name: config[name] for name in ("evaluation", "ood") if name in config}
    return files.json_sha256({**sections, "data": list(data_changes)} if data_changes else sections)


def is_own(path: Path, settings_sha256: str) -> bool:
    """Whether results of these settings may be written to a path: nothing there, or the same's."""
    if not path.exists():
        return True
    found = files.read_json(path)
    return "settings_sha256" in found and found["settings_sha256"] == settings_sha256
