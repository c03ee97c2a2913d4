"""Folders of models as repositories of the Hub, in one commit: its readers have the old model or
the new one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ldm.formats import card, integrity
from ldm.formats.recognised import INDEX, told
from ldm.storage.checkpoint import MANIFEST, problem

_PUBLISHED = (
    INDEX, "config.json", "*/*.json", "*/*.txt", "*/*.model", "*.safetensors", "*/*.safetensors",
    card.NAME, card.SHEET, "LICENSE*",
)  # fmt: skip
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


class Published:
    """``push_to_hub`` of a pipeline, from a folder that is complete."""

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Writes the pipeline as a folder, and uploads that as the repository ``repo_id``; a model
        card that is there already stays. The arguments are those of diffusers.

        Returns:
            the address of the commit.

        Raises:
            OSError: there is no network, no token, or no permission; the message is one line.
            ValueError: the pipeline cannot be saved.
        """
        how = {"safe_serialization": safe_serialization, "variant": variant}
        told = {"commit_message": commit_message, "private": private, "token": token,
                "create_pr": create_pr, "subfolder": subfolder}  # fmt: skip
        with TemporaryDirectory() as folder:
            return self.pushed(Path(folder) / "pipeline", {"repo_id": repo_id, **how, **told})

    def pushed(self, folder: str | os.PathLike[str], asked: dict[str, Any]) -> str:
        """The address of the commit of ``folder``, which is written first; ``asked`` are keywords
        of ``save_pretrained`` and of ``push_to_hub``.
        """
        named = asked.pop("repo_id", None) or Path(folder).name
        keys = ("commit_message", "private", "token", "create_pr", "subfolder")
        told = {key: asked.pop(key) for key in keys if key in asked}
        self.save_pretrained(folder, **asked)  # type: ignore[attr-defined]
        if not (Path(folder) / card.NAME).exists():
            card.write(Path(folder), name=named.rpartition("/")[2])
            told["keep"] = card.NAME
        return upload(Path(folder), named, **told)


def complete(folder: Path) -> None:
    """Looks whether ``folder`` is a whole model.

    Raises:
        OSError: it is none, or a file of it is missing or is not what was written.
        ValueError: something in it is damaged.
    """
    if card.kind_of(folder) is None:
        raise OSError(told(folder) or f"{folder} is no model")
    if (folder / MANIFEST).is_file() and (wrong := problem(folder)):
        raise OSError(f"{folder} is not complete: {wrong}")
    if (folder / INDEX).is_file():
        integrity.check(folder, {}, pickled=False)


def published(folder: Path) -> list[Path]:
    """Files of a model that go to the Hub: not the state of a run beside them, nor hidden ones."""
    found = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if not file.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        depth = len(name.parts)
        fits = (p for p in _PUBLISHED if p.count("/") == depth - 1 and fnmatch(str(name), p))
        if name.parts[0] != "training" and next(fits, None):
            found.append(file)
    return found


def upload(
    folder: Path,
    repository: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
    keep: str | None = None,
) -> str:
    """The address of a commit of all that is ``published`` of ``folder``.

    Args:
        folder: a model, looked at before anything is sent.
        repository: OWNER/NAME, or NAME of whom the token is of; made if it is not there.
        commit_message: by default "Upload a model".
        private: whether a repository that is made is seen by its owner alone.
        token: by default that of `hf auth login`, or HF_TOKEN.
        create_pr: ask the owner, in place of a commit to the branch main.
        subfolder: of the repository, in place of all of it.
        keep: a name in it that stays as it is, if it is there.

    Raises:
        OSError: ``folder`` is not complete, or the Hub cannot be reached or refuses; the message is
            one line.
    """
    complete(folder)
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if token is None and get_token() is None:
        raise OSError(f"{repository}: there is no token of the Hub: {_LOGIN}")
    hub, inside = HfApi(token=token), f"{subfolder.rstrip('/')}/" if subfolder else ""
    try:
        name = hub.create_repo(repository, private=private, exist_ok=True).repo_id
        stays = [keep] if keep and hub.file_exists(name, keep) else []
        files = {f"{inside}{f.relative_to(folder).as_posix()}": f for f in published(folder)}
        commit = hub.create_commit(
            name,
            _added(CommitOperationAdd, files, stays),
            commit_message=commit_message or "Upload a model",
            create_pr=create_pr,
        )
    except Exception as error:  # of the connection, of the Hub, of the name: in many classes
        raise OSError(f"{repository}: {_line(error)}") from error
    return str(commit.pr_url if create_pr else commit.commit_url)


def _added(add: Any, files: dict[str, Path], stays: Sequence[str]) -> list[Any]:
    return [add(name, file) for name, file in files.items() if name not in stays]


def _line(error: Exception) -> str:
    """Why nothing was uploaded, and what to do."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    line = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids the network: unset it to upload"
    if status in (401, 403):
        return f"the Hub refuses the token ({status}): {_LOGIN}"
    if isinstance(error, (HfHubHTTPError, ValueError)):
        return f"the Hub does not take it: {line}"
    return f"the Hub cannot be reached ({line}): nothing was uploaded, the same command tries again"
