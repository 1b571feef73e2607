"""Push an exported folder to the Hugging Face Hub, into a repository that is new or empty, private unless asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsetrain.counted import counted
from sparsetrain.errors import CheckpointError, first_line

OF_THE_HUB = frozenset({".gitattributes", "README.md"})
"""Files that a repository may have when it is made on the website."""


def check_name(repository: str) -> None:
    """Refuse what is no name of a repository, without asking the Hub.

    Raises:
        CheckpointError: names what is wrong.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise CheckpointError(f"--push {repository}: {first_line(error).rstrip('.')}; give ORG/NAME") from error
    if "/" not in repository:
        raise CheckpointError(f"--push {repository} does not say whose it is; give ORG/NAME")


def open_repository(repository: str, *, public: bool) -> None:
    """Make the repository of a model, before anything is exported; one that is empty is taken as it is.

    Raises:
        CheckpointError: nobody is logged in, it holds files, more may see it than asked for, or the Hub refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if get_token() is None:
        raise CheckpointError(
            f"--push {repository}: nobody is logged in to the Hub; run hf auth login, or set HF_TOKEN"
        )
    api = HfApi(library_name="sparsetrain")
    with _answers(f"--push {repository}"):
        try:
            found = api.model_info(repository)
        except RepositoryNotFoundError:
            api.create_repo(repository, private=not public)
            return
    held = sorted({each.rfilename for each in found.siblings or ()} - OF_THE_HUB)
    if held:
        raise CheckpointError(
            f"--push {repository}: it exists and holds {held[0]}; old files would stay, so give another name"
        )
    if bool(found.private) == public:
        seen, flag = ("private", "leave --public out") if public else ("public", "add --public")
        raise CheckpointError(f"--push {repository}: it exists and is {seen}; {flag}, or give another name")


def upload(folder: Path, repository: str) -> str:
    """Upload all files of a folder in one commit; returns the address of the repository.

    Raises:
        CheckpointError: the Hub or the network refuses; the folder stays, and the message says how to push it.
    """
    from huggingface_hub import HfApi, constants

    with _answers(
        f"{folder} is complete, but it was not pushed to {repository}", f"; then hf upload {repository} {folder} ."
    ):
        HfApi(library_name="sparsetrain").upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Export of a sparsetrain run"
        )
    return f"{constants.ENDPOINT}/{repository}"


def listing(folder: Path) -> Iterator[str]:
    """What a push of a folder would send, a line for each file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        yield f"  {path.stat().st_size:>15,}  {path.relative_to(folder)}"
    yield f"  {sum(path.stat().st_size for path in files):>15,}  bytes in {counted(len(files), 'file')}"


@contextmanager
def _answers(what: str, then: str = "") -> Iterator[None]:
    """Say what was asked of the Hub when it, or the way to it, fails."""
    try:
        yield
    # Of its HTTP library, which is not the same in every version.
    except Exception as error:
        fix = "check the login (hf auth whoami), its rights there, and the network"
        raise CheckpointError(f"{what}: {type(error).__name__}: {first_line(error)}; {fix}{then}") from error
