"""Upload a run to the Hugging Face hub: the merged network, its card, its report."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from fusion.errors import UserError, first_line, shown
from fusion.files import MODEL
from fusion.run_folder import CARD, REPORT, finished_report

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_CLIENTS = ("httpx2", "httpx")  # before them requests, whose errors are OSErrors
_LOG_IN = "log in with 'hf auth login', or set HF_TOKEN"


def push(folder: str | Path, to: str, *, private: bool = True) -> str:
    """Upload a run's network, card and report to a repository on the Hugging Face hub.

    The repository is created if it does not exist. ``report.json`` and the card contain the command
    as it was typed, with the paths in it.

    Args:
        folder: a finished run's.
        to: the repository, ``"user/name"``.
        private: whether a repository that is made is private; one that exists stays as it is.

    Returns:
        the address of the commit.

    Raises:
        UserError: the extra ``hub`` is not installed, there is no such folder or no whole run in
            it, no user is logged in, or the hub refuses.
    """
    folder = Path(folder)
    if not _REPOSITORY.fullmatch(to):
        raise UserError(f"to={shown(to)}: give the repository on the hub as user/name")
    files = _files(folder)
    hub = _huggingface_hub()
    operations = [hub.CommitOperationAdd(path.name, str(path)) for path in files]
    refusals: tuple[type[Exception], ...] = (OSError, ValueError, *_network_errors())
    api = hub.HfApi()
    if hub.get_token() is None:
        raise UserError(f"push: no user is logged in to the hub; {_LOG_IN}")
    try:
        api.create_repo(to, private=private, exist_ok=True)
        commit = api.create_commit(to, operations, commit_message=f"Upload {folder.name}")
    except refusals as error:
        raise UserError(f"push to={to}: {_answer(error)}") from error
    return str(commit.commit_url)


def _files(folder: Path) -> list[Path]:
    """Return the files to upload; the card may have been edited, the network may not."""
    if not folder.is_dir():
        raise UserError(f"push={folder}: there is no such folder; give a run's")
    if not (folder / MODEL).is_file():
        raise UserError(f"push={folder}: there is no {MODEL} in it; give the folder of a merge")
    if finished_report(folder, changed=(CARD,)) is None:
        raise UserError(
            f"push={folder}: it holds no whole run: its {REPORT} is missing, or a file is not as "
            f"it was written; run the merge again"
        )
    if not (folder / CARD).is_file():
        raise UserError(f"push={folder}: there is no {CARD} in it; run the merge again")
    return [folder / CARD, folder / MODEL, folder / REPORT]


def _answer(error: Exception) -> str:
    """Return a clause on the meaning of an error of the hub."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"the hub does not know the token; {_LOG_IN}"
    if status == 403:
        return "the token may not write there; make one with the role 'write'"
    if status is None and not isinstance(error, ValueError):
        return f"the hub cannot be reached ({shown(first_line(error), 100)}); check the network"
    return shown(" ".join(str(error).split()), 200)


def _network_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of the installed huggingface_hub's HTTP client besides OSError."""
    clients = [sys.modules[name] for name in _CLIENTS if name in sys.modules]
    return tuple(client.HTTPError for client in clients)


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub.utils
    except ModuleNotFoundError as error:
        raise UserError("push needs the extra 'hub': pip install 'fusion-cnn[hub]'") from error
    return huggingface_hub
