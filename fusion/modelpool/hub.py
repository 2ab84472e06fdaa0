"""Checkpoints on the Hugging Face hub: ``hf://org/name/file``, fetched once into its cache."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.errors import UserError, first_line, shown
from fusion.modelpool.bare import TIMM
from fusion.modelpool.trusted import require_trusted

SCHEME = "hf://"

_PATH = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:/([^\s?#]+))?")
_USUAL = ("model.safetensors", "pytorch_model.bin")
_CONFIG = "config.json"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the hub.

    Attributes:
        repo: ``"org/name"``.
        file: its path in the repository; None for the file with the weights.
        revision: branch, tag or commit; None for the main branch.
        offline: use only the cache; None follows ``HF_HUB_OFFLINE``.
    """

    repo: str
    file: str | None = None
    revision: str | None = None
    offline: bool | None = None

    def fetch(self) -> Path:
        """Return the path of the file in the hub's cache, fetching it first if necessary.

        Without a name it is ``model.safetensors``, else ``pytorch_model.bin``, else the only
        ``.safetensors`` file.

        Raises:
            UserError: huggingface_hub is not installed, there is no such repository, revision or
                file, or it is available neither from the cache nor from the network.
        """
        for name in _USUAL if self.file is None else (self.file,):
            if path := self._fetched(name):
                return path
        if self.file is not None:
            raise UserError(f"{self}: the repository has no file '{shown(self.file)}'")
        names = sorted(name for name in self._listed() if name.endswith(".safetensors"))
        if len(names) == 1 and (path := self._fetched(names[0])):
            return path
        found = f"several ({', '.join(map(shown, names[:3]))}, …)" if names else "none"
        raise UserError(
            f"{self}: the repository has no {' or '.join(_USUAL)}, and of .safetensors files "
            f"{found}; name the file, {SCHEME}{self.repo}/FILE"
        )

    def timm_architecture(self, *, size: int, trusted: Sequence[str]) -> dict[str, Any] | None:
        """Return the network of timm that the repository's ``config.json`` describes, or None.

        It is data from a file: :func:`fusion.modelpool.trusted.require_trusted` checks it.

        Args:
            size: of the weights in bytes.
            trusted: further targets that the user allows.

        Raises:
            UserError: the file is no JSON object, or requests anything but plain options.
        """
        path = self._fetched(_CONFIG)
        if path is None:
            return None
        try:
            config = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self}: its {_CONFIG} is not JSON; give `architecture`") from error
        if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
            return None
        spec = {**_timm_options(config), "_target_": TIMM, "model_name": config["architecture"]}
        name = f"{SCHEME}{self.repo}/{_CONFIG}"
        return require_trusted(spec, path=name, size=size, trusted=trusted)

    def _fetched(self, name: str) -> Path | None:
        """Return the path of a file in the cache, or None where the repository lacks it."""
        hub = _huggingface_hub()
        try:
            path = hub.hf_hub_download(
                self.repo, name, revision=self.revision, local_files_only=self._is_offline
            )
        except hub.utils.LocalEntryNotFoundError as error:
            if self._is_offline and self.file is None:
                return None  # another name may be there; the listing says what is missing
            raise self._unreachable(name, error.__cause__) from error
        except hub.utils.EntryNotFoundError:
            return None
        except (OSError, ValueError) as error:  # answers of the hub, and invalid names
            raise UserError(f"{self}: {self._answer(error)}") from error
        return Path(path)

    def _listed(self) -> list[str]:
        hub = _huggingface_hub()
        try:
            if not self._is_offline:
                names: list[str] = hub.HfApi().list_repo_files(self.repo, revision=self.revision)
                return names
            cached = hub.scan_cache_dir().repos
        except hub.utils.CacheNotFound as error:
            raise self._unreachable("any file") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{self}: {self._answer(error)}") from error
        wanted = self.revision or "main"
        names = [
            str(file.file_path.relative_to(revision.snapshot_path))
            for repo in cached
            if repo.repo_id == self.repo and repo.repo_type == "model"
            for revision in repo.revisions
            if wanted in (revision.commit_hash, *revision.refs)
            for file in revision.files
        ]
        if not names:
            raise self._unreachable("any file")
        return names

    @property
    def _is_offline(self) -> bool:
        return _huggingface_hub().constants.HF_HUB_OFFLINE or bool(self.offline)

    def _unreachable(self, name: str, cause: BaseException | None = None) -> UserError:
        if self._is_offline:
            return UserError(
                f"{self}: {name} is not in the cache, and offline forbids to fetch it; run once "
                f"without offline=true and HF_HUB_OFFLINE"
            )
        why = f" ({shown(first_line(cause), 100)})" if cause else ""
        return UserError(
            f"{self}: {name} is not in the cache, and the hub cannot be reached{why}; check the "
            f"network"
        )

    def _answer(self, error: Exception) -> str:
        """Return a clause on the meaning of an error of the hub."""
        utils = _huggingface_hub().utils
        if isinstance(error, utils.GatedRepoError):
            return "the repository is gated; accept its conditions and log in with 'hf auth login'"
        if isinstance(error, utils.RepositoryNotFoundError):
            return (
                "there is no such repository, or it is private; check the name, or log in with "
                "'hf auth login'"
            )
        if isinstance(error, utils.RevisionNotFoundError):
            return f"the repository has no revision '{shown(str(self.revision))}'"
        return shown(first_line(error), 200)

    def __str__(self) -> str:
        return f"'{SCHEME}{self.repo}{f'/{self.file}' if self.file else ''}'"


def hub_file(
    path: object, *, revision: str | None = None, offline: bool | None = None
) -> HubFile | None:
    """Return the file on the hub that ``path`` names, or None for any other path.

    Raises:
        UserError: it begins with ``hf://`` and is no such path, or ``revision`` or ``offline``
            were given for a path that does not.
    """
    if not isinstance(path, str) or not path.startswith(SCHEME):
        if revision is not None or offline is not None:
            raise UserError(
                f"checkpoint '{path}': revision and offline belong to files on the hub, whose path "
                f"begins with {SCHEME}"
            )
        return None
    match = _PATH.fullmatch(path.rstrip("/"))
    if match is None:
        raise UserError(f"'{path}' is no path on the hub; give {SCHEME}ORGANISATION/NAME[/FILE]")
    return HubFile(match[1], match[2], revision, offline)


def _timm_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return the options of ``timm.create_model`` in a repository's ``config.json``.

    As in timm, the options of a network are in ``model_args``, and the rest is taken from
    ``pretrained_cfg``.
    """
    described = config.get("pretrained_cfg", config)
    described = described if isinstance(described, dict) else {}
    args = config.get("model_args") or {}
    options: dict[str, Any] = {}
    for name in ("num_classes", "global_pool"):
        value = config.get(name, described.get(name))
        if value is not None:
            options[name] = value
    sizes = described.get("input_size")
    if isinstance(sizes, list) and len(sizes) == 3:
        options |= {"in_chans": sizes[0]} if sizes[0] != 3 else {}
        options |= {"img_size": sizes[1:]} if described.get("fixed_input_size") else {}
    return {**options, **(args if isinstance(args, dict) else {"model_args": args})}


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub.utils
    except ModuleNotFoundError as error:
        raise UserError(
            f"paths that begin with {SCHEME} need the extra 'hub'; "
            f"install it with pip install 'fusion-cnn[hub]'"
        ) from error
    return huggingface_hub
