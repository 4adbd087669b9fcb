"""Models on the Hugging Face Hub: `jevb_jax.load("hf://org/name@revision")`, and what pushes them.

A model is a repository whose root holds an export. Downloads lie in the cache of huggingface_hub,
one directory for each commit. Every file is checked against the hashes of the export each time, so
a file that is missing, cut short or of another export is never taken for a model.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jevb_jax import extras
from jevb_jax.runs import archive
from jevb_jax.runs.archive import ArchiveError

Read = TypeVar("Read")

_URL = re.compile(r"hf://([\w.-]+)/([\w.-]+?)(?:@([^@\s]+))?/?")
# Other things of the Hub than models; etils opens these (`files.to_path`).
_OTHER_KINDS = ("buckets", "datasets", "kernels", "models", "spaces")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NOT_FOR_LOADING = ".stablehlo"  # the serving form, which `load` does not read
_CARD = "README.md"


class HubError(RuntimeError):
    """The Hugging Face Hub did not give or take a model; the message says how to mend it."""


class Repository(NamedTuple):
    """A repository of a model.

    Attributes:
      name: such as "org/name".
      revision: a branch, a tag or a commit; None is the main branch.
    """

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        """The URL that `load` takes."""
        return f"hf://{self.name}" + (f"@{self.revision}" if self.revision else "")


def parse(url: object) -> Repository | None:
    """The repository that `hf://org/name` or `hf://org/name@revision` means.

    Returns:
      The repository; None for everything else, such as a path or `hf://datasets/org/name`.
    """
    found = _URL.fullmatch(url) if isinstance(url, str) else None
    if found is None or found[1] in _OTHER_KINDS:
        return None
    return Repository(f"{found[1]}/{found[2]}", found[3])


def library() -> Any:
    """huggingface_hub, imported when it is first needed."""
    with extras.explained():
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    return huggingface_hub


def download(repository: Repository) -> Path:
    """Downloads the archive form of a model, as far as the cache does not hold it.

    With `HF_HUB_OFFLINE=1` only the cache is used. Without it, a Hub that cannot be reached is an
    error, except for a commit that the cache holds: the cached copy of a branch may be outdated.

    Args:
      repository: from `parse`.

    Returns:
      The local directory of the commit. Every file of the archive form in it has its hash.

    Raises:
      HubError: the repository, the revision or an export in it does not exist, or cannot be read.
      ArchiveError: a file is not what was exported.
      ModuleNotFoundError: the extra `hub` is not installed.
    """
    hub = library()
    offline = hub.constants.HF_HUB_OFFLINE

    def fetch(name: str, revision: str | None, *, force: bool) -> Path:
        with _explained(repository, "read"):
            return Path(
                hub.hf_hub_download(
                    repository.name,
                    name,
                    revision=revision,
                    force_download=force,
                    local_files_only=offline,
                    library_name="jevb-jax",
                )
            )

    def read(name: str, revision: str | None, check: Callable[[Path], Read]) -> tuple[Path, Read]:
        path = fetch(name, revision, force=False)
        try:
            return path.parent, check(path.parent)
        except ArchiveError as error:
            if offline:
                raise ArchiveError(f"{repository}: {error}, with HF_HUB_OFFLINE unset") from error
        # Is it only the copy in the cache that is damaged?
        path = fetch(name, revision, force=True)
        try:
            return path.parent, check(path.parent)
        except ArchiveError as error:
            raise ArchiveError(f"{repository}: {error}") from error

    wanted = repository.revision or None
    commit = wanted if wanted and _COMMIT.fullmatch(wanted) else None
    if not (offline or commit):
        # If the Hub cannot be reached, `hf_hub_download` would silently take an older copy.
        with _explained(repository, "read"):
            commit = hub.HfApi().model_info(repository.name, revision=wanted, timeout=30).sha
    remedy = "the files of the repository do not belong together: push the export again"
    directory, manifest = read(
        archive.MANIFEST,
        wanted,  # by this name it is found again without a network
        lambda directory: archive.read_manifest(directory, remedy=remedy),
    )
    if commit not in (None, directory.name):
        raise HubError(f"{repository} got a new commit while it was read: load it again")
    for name in manifest["files"]:
        if not name.endswith(_NOT_FOR_LOADING):
            read(
                name,
                directory.name,
                lambda directory, name=name: archive.read_file(
                    directory, manifest, name, remedy=remedy
                ),
            )
    return directory


def upload(
    directory: Path, repository: Repository, *, card: str, private: bool = False
) -> Repository:
    """Uploads an export and its card in one commit; makes the repository if there is none.

    Args:
      directory: local directory of the export.
      repository: where to. The revision is a branch, which is made if it does not exist.
      card: text of the model card.
      private: the repository must be private.

    Returns:
      The repository with the new commit as its revision.

    Raises:
      HubError: the Hub refused, cannot be reached, or the repository is public and private was asked.
      ValueError: the repository holds something else than an export.
      ArchiveError: the directory holds no export.
      ModuleNotFoundError: the extra `hub` is not installed.
    """
    hub = library()
    manifest = archive.read_manifest(directory)
    contents: Mapping[str, Path | bytes] = {
        **{name: directory / name for name in manifest["files"]},
        archive.MANIFEST: directory / archive.MANIFEST,
        _CARD: card.encode(),
    }
    api = hub.HfApi(library_name="jevb-jax")
    with _explained(repository, "write"):
        api.create_repo(repository.name, private=private or None, exist_ok=True)
        if repository.revision:
            api.create_branch(repository.name, branch=repository.revision, exist_ok=True)
        found = api.model_info(repository.name, revision=repository.revision, timeout=30)
        if private and not found.private:
            raise HubError(
                f"{repository} exists and is public, so nothing was uploaded. Make it private in its "
                "settings on the Hub, give another name, or leave out --private"
            )
        present = {one.rfilename for one in found.siblings or ()}
        outdated = _outdated(api, repository, found.sha, present) - contents.keys()
        commit = api.create_commit(
            repository.name,
            [
                *(hub.CommitOperationDelete(name) for name in sorted(outdated)),
                *(
                    hub.CommitOperationAdd(
                        name, content if isinstance(content, bytes) else str(content)
                    )
                    for name, content in contents.items()
                ),
            ],
            commit_message=f"Export of step {manifest['step']} by jevb_jax",
            revision=repository.revision,
            parent_commit=found.sha,
        )
    return repository._replace(revision=commit.oid)


def _outdated(api: Any, repository: Repository, commit: str, present: set[str]) -> set[str]:
    """Files of an older export in the repository; an error if it holds another program's model."""
    if archive.MANIFEST in present:
        path = api.hf_hub_download(repository.name, archive.MANIFEST, revision=commit)
        older = archive.read_manifest(Path(path).parent, remedy="give another name")
        return present & set(older["files"])
    foreign = sorted(name for name in present if name.endswith(".safetensors"))
    if foreign:
        raise ValueError(
            f"{repository} holds {', '.join(foreign)} without {archive.MANIFEST}: they belong to "
            "another program. Give another name for the export"
        )
    return set()


@contextlib.contextmanager
def _explained(repository: Repository, wish: str) -> Iterator[None]:
    """Around calls of huggingface_hub: what it raises becomes a `HubError` of two sentences."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if type(error) is RuntimeError else None  # of a file of an upload
        message = _explanation(cause or error, repository, wish)
        if message is None:
            raise
        # Not chained: its errors show addresses of storage, which are signed and open it to anyone.
        raise HubError(f"{repository}: {message}") from None


def _explanation(error: Any, repository: Repository, wish: str) -> str | None:
    """What came and how to mend it; None for an error that is not of the Hub."""
    hub = library()
    kinds = hub.errors
    where = _without_secrets(hub.constants.ENDPOINT)
    nothing = "Nothing was loaded" if wish == "read" else "Nothing was committed"
    log_in = f"Log in with an account that may {wish} it: `hf auth login`, or HF_TOKEN."
    if isinstance(error, kinds.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and nothing can be uploaded then. Unset it."
    if isinstance(error, kinds.LocalEntryNotFoundError):
        if hub.constants.HF_HUB_OFFLINE:
            return (
                f"HF_HUB_OFFLINE is set, and the cache {hub.constants.HF_HUB_CACHE} does not hold all "
                "of this revision. Load it once with a network, and unset HF_HUB_OFFLINE for that."
            )
        why = _without_secrets(str(error.__cause__ or error).splitlines()[0])
        return f"{where} did not give a file ({why}). {nothing}; try again."
    if isinstance(error, kinds.RevisionNotFoundError):
        return f"{where} has the repository, but no such revision. Give a branch, tag or commit."
    if isinstance(error, kinds.EntryNotFoundError):
        return (
            f"the repository lacks a file of an export, such as {archive.MANIFEST}. Push one with "
            "python -m jevb_jax.export --push, or give the name of a repository that holds one."
        )
    if isinstance(error, kinds.RepositoryNotFoundError) and not isinstance(
        error, kinds.GatedRepoError
    ):
        return (
            f"{where} has no such repository, or it is private and you are not logged in as someone "
            f"who may {wish} it. Check the name, or log in: `hf auth login`, or HF_TOKEN."
        )
    if isinstance(error, kinds.HfHubHTTPError):
        status = error.response.status_code
        said = _without_secrets(error.server_message or "").strip().rstrip(".")
        answer = f"{where} answered {status}" + (f" ({said})" if said else "")
        if status in (401, 403):
            return f"{answer}. {log_in}"
        return f"{answer}. {nothing}; try again later."
    if isinstance(error, kinds.HFValidationError):
        return f"this is no name of a repository: {error}. Give hf://organization/name."
    # What huggingface_hub raises for a wrong length has no number of the system, unlike a full disk.
    is_cut = type(error) is OSError and error.errno is None
    # Of hf_xet, which moves large files.
    is_of_xet = type(error) is RuntimeError or type(error).__module__ == "hf_xet"
    is_of_network = isinstance(error, kinds.HTTPError | ConnectionError | TimeoutError)
    if is_of_network or is_cut or is_of_xet:
        what = _without_secrets(f"{type(error).__name__}: {error}".splitlines()[0])
        offline = " HF_HUB_OFFLINE=1 uses the copy in the cache." if wish == "read" else ""
        return (
            f"the connection to {where} failed, or the answer was cut short ({what}). {nothing}; try "
            f"again.{offline}"
        )
    return None


def _without_secrets(text: str) -> str:
    """A text without the user's token, and addresses without passwords and signed queries."""
    token = library().get_token()
    if token:
        text = text.replace(token, "***")
    return re.sub(r"\?[^\s'\"]*", "", re.sub(r"://[^/@\s]*@", "://", text))
