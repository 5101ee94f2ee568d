"""Uploading an export to the Hugging Face hub. Nothing is sent unless the user asked for it by name."""

from pathlib import Path

from model.errors import UserError


def check_repository(repository):
    """Raise UserError (exit code 2) for a name that no repository of the hub can have."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {repository}: {error}", exit_code=2) from None


def push_to_hub(repository, paths, card=None, private=False):
    """Upload a folder, or files, `paths` to the model repository "owner/name", which is made if there is none; returns its
    address. card: text of the README.md, where no file has it. private: whether a new repository is. The token is the one
    of `hf auth login` or the environment's HF_TOKEN.

    Raises UserError when the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    files = [file for path in map(Path, paths) for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in files]
    if card:
        operations.append(CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=card.encode()))
    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.create_commit(repository, operations, commit_message="Export of MiniMind")
    except LocalTokenNotFoundError:
        raise UserError("--push_to_hub: no token; run hf auth login, or set HF_TOKEN") from None
    except Exception as error:  # of the hub, of its HTTP library, of the network
        line = " ".join(str(error).split())
        raise UserError(f"--push_to_hub {repository}: {line}; the export itself is complete in {paths[0]}") from None
    return str(address)
