"""Uploading an export to the Hugging Face hub. Nothing is sent unless the user asked for it by name."""

from pathlib import Path

from model.errors import UserError


def push_to_hub(repository, paths, card=None):
    """Upload a folder, or files, `paths` to the model repository "owner/name", which is made if there is none; returns its
    address. card: text of the README.md, where no file has it. The token is the one of `hf auth login` or the environment's HF_TOKEN.

    Raises UserError when the hub cannot be reached or refuses.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    files = [file for path in map(Path, paths) for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in files]
    if card:
        operations.append(CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=card.encode()))
    hub = HfApi()
    try:
        address = hub.create_repo(repository, exist_ok=True)
        hub.create_commit(repository, operations, commit_message="Export of MiniMind")
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {repository}: {error}", exit_code=2) from None
    except LocalTokenNotFoundError:
        raise UserError("--push_to_hub: no token; run hf auth login, or set HF_TOKEN") from None
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled) as error:
        line = " ".join(str(error).split())
        raise UserError(f"--push_to_hub {repository}: {line}; the export itself is complete in {paths[0]}") from None
    return str(address)
