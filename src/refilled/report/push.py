"""Upload a student to the Hugging Face hub."""

import re
from pathlib import Path

from refilled.errors import RunError
from refilled.files import read_record
from refilled.network import forbidden
from refilled.runs.inference import open_classifier
from refilled.runs.result import Result

FILES = ("model.safetensors", "model.json", "README.md")
"""The files to upload. The page is not among them, because it shows test images and folders of this machine."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*"


def push(folder: Path, name: str, private: bool = False) -> str:
    """Upload the student and the model card of a finished run.

    Args:
        folder: The run's folder.
        name: Repository on the hub, ``user/name``; it is created if it does not exist.
        private: Whether a new repository is private.

    Returns:
        The address of the repository.

    Raises:
        RunError: The run is not finished, a file is missing or damaged, the name is not one, or the hub cannot be
            reached or refuses.
        ModelError: The student cannot be opened as :func:`~refilled.runs.inference.evaluate` opens it.
    """
    if not re.fullmatch(_NAME, name):
        raise RunError(f"'{name}' does not name a repository; give USER/NAME, as in me/leaf-student")
    Result.load(folder)
    if missing := [file for file in FILES if not (folder / file).exists()]:
        hint = f"write it with 'refilled report {folder}'" if missing == ["README.md"] else "the run has no student"
        raise RunError(f"{folder} lacks {', '.join(missing)}: {hint}")
    open_classifier(folder)  # what cannot be opened here would fail for those who download it
    if not read_record(folder / "README.md").strip():
        raise RunError(f"{folder / 'README.md'} is empty; write it with 'refilled report {folder}'")
    if reason := forbidden():
        raise RunError(f"{folder} was not uploaded to {name}: {reason}. Allow the network, and repeat the command")
    import httpx
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = str(api.create_repo(name, private=private, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(FILES))
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"{folder} was not uploaded to {name}: {reason}. Check the connection, HF_HUB_OFFLINE, and the token of "
            "'hf auth login'"
        ) from error
    return address
