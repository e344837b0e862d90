"""Uploading an export to the Hugging Face hub."""

import re
from pathlib import Path

from huggingface_hub import HfApi

from elm_jax.errors import UserError, one_line

WHERE = "--push_to_hub"


def check_repo(repo: str) -> None:
    """Raise UserError unless `repo` is owner/name."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(WHERE, repr(repo), "owner/name of a repository", "write it so")


def push(folder: Path, repo: str, public: bool = False) -> str:
    """Upload everything in `folder`; returns the repository's address.

    A repository that is not there is made: private, as models of patients' data should be until their terms are
    checked, unless `public`.
    Raises UserError for what the hub refuses; the folder stays as it is.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export from elm_jax")
    except Exception as error:  # of the hub, of files, and of whichever library carries the requests
        found = f"{repo}, which the hub refused ({type(error).__name__}: {one_line(str(error))[:200]})"
        fix = f"run `hf auth login`, then upload {folder} again with `hf upload {repo} {folder}`"
        raise UserError(WHERE, found, "a repository that you may write", fix) from None
    return str(address)
