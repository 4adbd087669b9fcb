"""Finds the picture files of a folder, in an order that is the same everywhere."""

import dataclasses
import errno
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from jevb_jax.images.decoding import SUFFIXES


@dataclasses.dataclass
class Listing:
    """The pictures of a folder, and what is left out of them; made by `list_folder`.

    Attributes:
      files: paths of the pictures directly in the folder.
      classes: for each visible subfolder, by name, the sorted paths of the pictures below it.
      endings: number of other files for each ending.
      num_hidden: number of hidden pictures and folders.
      closed_links: links to folders that are not followed, because their target is read anyway.
      repeated_links: links to pictures that are in the folder too, so these are read twice.
    """

    files: list[str]
    classes: dict[str, list[str]]
    endings: Counter[str] = dataclasses.field(default_factory=Counter)
    num_hidden: int = 0
    closed_links: list[str] = dataclasses.field(default_factory=list)
    repeated_links: list[str] = dataclasses.field(default_factory=list)

    def remarks(self, *, has_classes: bool = True) -> list[str]:
        """What the user should know about the folder, one sentence for each fact.

        Args:
          has_classes: whether the subfolders are classes.
        """
        found = []
        if self.endings:
            kinds = ", ".join(f"{n:,} {ending}" for ending, n in self.endings.most_common(10))
            found.append(
                f"{self.endings.total():,} files are left out, because their ending is not read: {kinds}"
            )
        if self.num_hidden:
            found.append(f"{self.num_hidden:,} hidden pictures or folders are left out")
        if self.closed_links:
            found.append(
                f"{len(self.closed_links):,} links are not followed, because their folders are read "
                f"anyway or contain the link, for example {self.closed_links[0]}"
            )
        if self.repeated_links:
            found.append(
                f"{len(self.repeated_links):,} links lead to pictures that are in the set too, so these "
                f"are read twice, for example {self.repeated_links[0]}"
            )
        alike: defaultdict[str, list[str]] = defaultdict(list)
        for name in self.classes:
            alike[unicodedata.normalize("NFC", name).casefold()].append(name)
        same = [names for names in alike.values() if len(names) > 1]
        if same and has_classes:
            found.append(
                "these names differ only in case or in the encoding of accents, but are separate "
                f"classes: {same[:10]}"
            )
        return found


def list_folder(root: Path) -> Listing:
    """Finds the pictures of a folder by their endings, in an order that is the same everywhere.

    Hidden files and folders are left out. Links are followed, but no folder is read twice: a link
    is not followed if it leads into the folder itself, to one that contains it, or to a folder that
    another link has led to.

    Args:
      root: an existing folder.

    Raises:
      ValueError: a picture is a link to nothing, or no regular file (reading a pipe would wait).
    """
    real_root = os.path.realpath(root)
    listing = Listing([], {})
    entered: set[str] = set()  # real paths of outside folders that links have led to

    def is_shown(real: str) -> bool:
        path = Path(real)
        if not path.is_relative_to(real_root):
            return False
        return not any(part.startswith(".") for part in path.relative_to(real_root).parts)

    def may_enter(entry: os.DirEntry[str], real: str) -> bool:
        if is_shown(real) and not entry.is_symlink():
            return True
        if is_shown(real) or real in entered or Path(real_root).is_relative_to(real):
            listing.closed_links.append(entry.path)
            return False
        entered.add(real)
        return True

    def pictures(entries: list[os.DirEntry[str]]) -> Iterator[str]:
        for entry in entries:
            if _is(os.DirEntry.is_dir, entry):
                continue
            is_hidden, ending = entry.name.startswith("."), os.path.splitext(entry.name)[1].lower()
            if ending not in SUFFIXES:
                if not is_hidden:
                    listing.endings[ending or "without an ending"] += 1
            elif is_hidden:
                listing.num_hidden += 1
            elif not _is(os.DirEntry.is_file, entry):
                kind = "a link to nothing" if entry.is_symlink() else "no file"
                raise ValueError(f"{entry.path} is {kind}; remove it, or restore the picture")
            else:
                if entry.is_symlink() and is_shown(os.path.realpath(entry.path)):
                    listing.repeated_links.append(entry.path)
                yield entry.path

    def folders(
        entries: list[os.DirEntry[str]], real: str
    ) -> Iterator[tuple[os.DirEntry[str], str]]:
        for entry in entries:
            if not _is(os.DirEntry.is_dir, entry):
                continue
            if entry.name.startswith("."):
                listing.num_hidden += 1
                continue
            is_link = entry.is_symlink()
            target = os.path.realpath(entry.path) if is_link else os.path.join(real, entry.name)
            if may_enter(entry, target):
                yield entry, target

    def below(folder: str, real: str) -> Iterator[str]:
        # No recursion: a tree may be deeper than Python's stack.
        waiting = [(folder, real)]
        while waiting:
            path, real = waiting.pop()
            entries = _entries(path)
            yield from pictures(entries)
            waiting += [(entry.path, target) for entry, target in folders(entries, real)][::-1]

    entries = _entries(os.fspath(root))
    listing.files = list(pictures(entries))
    for entry, target in folders(entries, real_root):
        listing.classes[entry.name] = list(below(entry.path, target))
    return listing


def _is(kind: Callable[[os.DirEntry[str]], bool], entry: os.DirEntry[str]) -> bool:
    try:
        return kind(entry)
    except OSError as error:
        if error.errno == errno.ELOOP:  # a circle of links leads to nothing
            return False
        raise


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        return sorted(found, key=lambda entry: entry.name)
