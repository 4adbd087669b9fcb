"""Result files. Results of one set of settings never overwrite those of another."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jevb_jax.runs import files

# Sections of a config that results depend on besides the trained encoder.
SECTIONS = ("evaluation", "ood")


def result_files(workdir: Path, suffix: str) -> list[Path]:
    """Paths of the results of one evaluation. The JSON file is last: it proves completeness."""
    names = (f"results{suffix}.csv", f"report{suffix}.html", f"results{suffix}.json")
    return [workdir / name for name in names]


def rename_results(workdir: Path, suffix: str, new_suffix: str) -> None:
    """Renames the results of one evaluation.

    Args:
      workdir: directory of the run, from `files.to_path`.
      suffix: present ending of the names; "" is `results.json`.
      new_suffix: new ending of the names.
    """
    new = result_files(workdir, new_suffix)
    for path, new_path in zip(result_files(workdir, suffix), new, strict=True):
        if path.exists():
            path.replace(new_path)


def keep_other_results(workdir: Path, suffix: str, settings_sha256: str) -> None:
    """Copies results that results of other settings will replace.

    The names of the copies contain a part of the hash of their settings: `results_1a2b3c4d.json`.

    Args:
      workdir: directory of the run, from `files.to_path`.
      suffix: ending of the names of the new results.
      settings_sha256: hash of the new results' settings. Results with the same hash are not kept.
    """
    path = workdir / f"results{suffix}.json"
    if not path.exists():
        return
    found = files.read_json(path)
    # Older versions wrote no hash of the settings; a hash of the numbers is as good.
    older = found["settings_sha256"] if "settings_sha256" in found else files.json_sha256(found)
    if older == settings_sha256:
        return
    copies = result_files(workdir, f"{suffix}_{older[:8]}")
    last = copies[-1]
    if last.exists() and last.read_bytes() == path.read_bytes():
        # The copy is complete. An evaluation that was killed after it may have replaced all but the
        # JSON file, and these must not go over what was saved.
        return
    for path, copy in zip(result_files(workdir, suffix), copies, strict=True):
        if path.exists():
            files.write_bytes_atomically(copy, path.read_bytes())


def settings_sha256(config: dict[str, Any], data_changes: Sequence[str] = ()) -> str:
    """Hash of everything that results depend on besides the trained encoder.

    Args:
      config: config of the run, plain values.
      data_changes: accepted changes of the data, because other data give other results.

    Returns:
      Hexadecimal digits.
    """
    sections = {name: config[name] for name in SECTIONS if name in config}
    return files.json_sha256({**sections, "data": list(data_changes)} if data_changes else sections)


def is_own(path: Path, settings_sha256: str) -> bool:
    """Whether a path is free for these results: it is absent or has the same settings."""
    if not path.exists():
        return True
    found = files.read_json(path)
    return "settings_sha256" in found and found["settings_sha256"] == settings_sha256
