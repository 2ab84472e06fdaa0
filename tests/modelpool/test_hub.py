"""Checkpoints on the Hugging Face hub, against a stand-in that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

from fusion.errors import UserError
from fusion.modelpool import Checkpoint
from fusion.modelpool.fingerprint import digest_tensors
from fusion.modelpool.hub import HubFile, hub_file
from fusion.weights import save_safetensors

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPEC = {"_target_": "fusion.models.CifarResNet", "depth": 8, "width": 0.5, "in_channels": 1}

# What a process of its own says of some members: a digest of the weights, or the mistake. The
# variables of the hub are read when its package is imported.
PROGRAM = """
import json, sys
from fusion.errors import UserError
from fusion.modelpool import BaseModelPool, Checkpoint
from fusion.modelpool.fingerprint import digest_tensors
for options in json.load(sys.stdin):
    member = Checkpoint(**options)
    try:
        BaseModelPool({"m": member}).preflight()
        print(digest_tensors(member.build().state_dict()), member.path)
    except UserError as error:
        print(error)
"""


class StandIn(BaseHTTPRequestHandler):
    """The two answers of the hub that a download needs: the list of files, and a file."""

    root: Path

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_list = parts[:2] == ["api", "models"]
        repo = self.root / "/".join(parts[2:4] if is_list else parts[:2])
        if not repo.is_dir():
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        revision = parts[5] if is_list else parts[3]
        if revision not in ("main", COMMIT):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if is_list:
            files = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                for file in repo.iterdir()
            ]
            return self._send(200, json.dumps(files).encode(), {"X-Repo-Commit": COMMIT})
        file = repo / "/".join(parts[4:])
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = file.read_bytes()
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self._send(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT}, with_body)

    def _send(
        self, code: int, body: bytes, headers: dict[str, str], with_body: bool = True
    ) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    """The folder whose ``org/name`` folders are the repositories."""
    root = tmp_path / "repositories"
    root.mkdir()
    handler = type("Handler", (StandIn,), {"root": root})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (root / "endpoint").write_text(f"http://127.0.0.1:{server.server_port}")
    yield root
    server.shutdown()
    server.server_close()


@pytest.fixture
def told(hub: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """What a process says of some members, one line for each."""

    def ask(*members: dict[str, object], **environment: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input=json.dumps(members),
            capture_output=True,
            text=True,
            check=True,
            env=os.environ
            | {
                "HF_ENDPOINT": (hub / "endpoint").read_text(),
                "HF_HOME": str(tmp_path / "cache"),
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
            }
            | environment,
        )
        return done.stdout.splitlines()

    return ask


def repository(hub: Path, name: str) -> Path:
    folder = hub / "org" / name
    folder.mkdir(parents=True)
    return folder


def test_weights_are_fetched_found_and_kept(hub, told, base) -> None:
    timm = pytest.importorskip("timm")
    state = base.state_dict()
    save_safetensors(repository(hub, "usual") / "model.safetensors", state)
    torch.save({"never": "read"}, hub / "org/usual/pytorch_model.bin")
    torch.save(state, repository(hub, "old") / "pytorch_model.bin")
    save_safetensors(repository(hub, "own") / "weights.safetensors", state)
    for name in ("a.safetensors", "b.safetensors"):
        save_safetensors(repository(hub, name[0]) / "x.safetensors", state)
        (hub / "org" / name[0] / "x.safetensors").rename(hub / "org" / "a" / name)
    network = timm.create_model("resnet10t", num_classes=3)
    timm.models.save_for_hf(network, repository(hub, "timm"), model_config={"num_classes": 3})
    evil = repository(hub, "evil")
    torch.save(state, evil / "pytorch_model.bin")
    config = {"architecture": "resnet10t", "model_args": {"checkpoint_path": "/etc/passwd"}}
    (evil / "config.json").write_text(json.dumps(config))
    hidden = repository(hub, "hidden")
    torch.save(state, hidden / "pytorch_model.bin")
    (hidden / "config.json").write_text('{"architecture": "hf-hub:org/usual"}')

    def at(path: str, **options: object) -> dict[str, object]:
        return {"path": f"hf://{path}", "architecture": SPEC, **options}

    members = [
        at("org/usual"), at("org/old"), at("org/own"), at("org/a/b.safetensors"),
        at("org/usual", revision=COMMIT), at("org/timm", architecture=None),
        at("org/old", offline=True),
    ]  # fmt: skip
    mistakes = {
        "none; name": at("org/b"),
        "several (a.safetensors, b.safetensors": at("org/a"),
        "no file 'x.pt'": at("org/usual/x.pt"),
        "no such repository, or it is private": at("org/nowhere"),
        "no revision 'old'": at("org/usual", revision="old"),
        "does not say which architecture": at("org/usual", architecture=None),
        "asks for the architecture 'timm.create_model', with 'checkpoint_path'": at(
            "org/evil", architecture=None
        ),
        "with the model_name 'hf-hub:org/usual'": at("org/hidden", architecture=None),
        "not in the cache, and offline forbids": at("org/new", offline=True),
    }
    lines = told(*members, *mistakes.values())
    ours, theirs = digest_tensors(state), digest_tensors(network.state_dict())
    assert [line.split()[0] for line in lines[:7]] == [*[ours] * 5, theirs, ours]
    assert len(lines) == len(members) + len(mistakes)
    for said, line in zip(mistakes, lines[7:], strict=True):
        assert said in line
        assert "hf://org/" in line

    (hub / "endpoint").write_text("http://127.0.0.1:9")  # nobody answers there
    kept = [at("org/usual"), at("org/own")]
    missing = [at("org/new"), at("org/usual/other.pt")]
    lines = told(*kept, *missing, HF_HUB_OFFLINE="1")
    assert [line.split()[0] for line in lines[:2]] == [ours, ours]
    for line in lines[2:]:
        assert "is not in the cache, and offline forbids to fetch it" in line


def test_no_network_and_nothing_kept_is_told(monkeypatch) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> str:
        raise huggingface_hub.utils.LocalEntryNotFoundError("an essay") from OSError("refused")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"y.pt is not in the cache, and .* reached \(refused\)"):
        Checkpoint("hf://org/x/y.pt", SPEC).build()


def test_the_extra_that_is_missing_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'fusion-cnn\[hub\]'"):
        Checkpoint("hf://org/name", SPEC).build()


def test_paths_on_the_hub_and_others(tmp_path) -> None:
    assert hub_file(str(tmp_path / "m.pt")) is None
    assert hub_file("hf://o/n") == HubFile("o/n")
    assert hub_file("hf://o/n.m-1/a/b.pt", revision="r") == HubFile("o/n.m-1", "a/b.pt", "r")
    for wrong in ("hf://", "hf://o", "hf://o//f", "hf://o/n?x", "hf://o/n/a b"):
        with pytest.raises(UserError, match="is no path on the hub; give hf://"):
            Checkpoint(wrong, SPEC)
    for options in ({"revision": "main"}, {"offline": True}):
        with pytest.raises(UserError, match="belong to files on the hub"):
            Checkpoint("m.pt", SPEC, **options)
