"""A run goes up to the Hugging Face hub, against a stand-in that answers as the hub does."""

from __future__ import annotations

import base64
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fusion.errors import UserError
from fusion.files import write_text
from fusion.model_card import push
from fusion.run_folder import RunFolder, save_report
from fusion.weights import save_safetensors

hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_a_test"


@dataclass
class Hub:
    """What the stand-in was asked to keep: the repositories made, and the files of commits."""

    made: dict[str, dict[str, object]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    validated: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    refuse: int | None = None  # the status of every answer


class StandIn(BaseHTTPRequestHandler):
    """The hub's answers that an upload needs: a repository, how to upload, a commit."""

    kept: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({"error": "no"}, self.kept.refuse or 404)

    def do_POST(self) -> None:
        kept = self.kept
        kept.tokens.add(self.headers.get("authorization"))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if kept.refuse is not None:
            return self._answer({"error": "no"}, kept.refuse)
        if self.path.endswith("/repos/create"):
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            known = name in kept.made
            kept.made.setdefault(name, asked)
            url = f"http://{self.headers['Host']}/{name}"
            return self._answer({"url": url, "id": name}, 409 if known else 200)
        if "validate-yaml" in self.path:
            kept.validated.append(json.loads(body)["content"])
            return self._answer({})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
            ]
            return self._answer({"files": modes})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                kept.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        url = f"http://{self.headers['Host']}/org/name/commit/{COMMIT}"
        return self._answer({"commitOid": COMMIT, "commitUrl": url})

    def _answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, to which ``huggingface_hub`` speaks as one that is logged in."""
    found = Hub()
    handler = type("Handler", (StandIn,), {"kept": found})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path, base) -> Path:
    """A finished run."""
    with RunFolder(tmp_path / "run").writing() as working:
        save_safetensors(working / "merged.safetensors", base.state_dict())
        write_text(working / "README.md", "---\nlibrary_name: fusion-cnn\n---\n# merged\n")
        write_text(working / "layers.csv", "layer\n")
        save_report(working, {"method": "Merge"})
    return tmp_path / "run"


def is_private(asked: dict[str, object]) -> bool:
    """Whether a private repository was asked for, in the words of this version of the client."""
    return bool(asked.get("private")) or asked.get("visibility") == "private"


def test_network_card_and_report_go_up_to_a_private_repository(folder, kept) -> None:
    address = push(folder, "org/name")
    assert address.endswith(COMMIT)
    assert is_private(kept.made["org/name"])
    assert f"Bearer {TOKEN}" in kept.tokens
    assert set(kept.files) == {"README.md", "merged.safetensors", "report.json"}
    for name, content in kept.files.items():
        assert content == (folder / name).read_bytes()


def test_the_command_uploads_and_a_second_time_what_changed(folder, kept, main_in, capsys) -> None:
    main_in(f"push={folder}", "to=org/name", "private=false")
    assert COMMIT in capsys.readouterr().out
    assert not is_private(kept.made["org/name"])
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# edited\n")
    main_in(f"push={folder}", "to=org/name")
    assert b"edited" in kept.files["README.md"]
    assert list(kept.made) == ["org/name"]


def test_what_was_changed_is_not_uploaded(folder, kept) -> None:
    (folder / "merged.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=r"holds no whole run: .* run the merge again"):
        push(folder, "org/name")
    assert not kept.made


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["push={run}"], "push needs a run's folder and a repository"),
        (["push=", "to=org/name"], "push needs a run's folder and a repository"),
        (["push={run}", "to=name"], "to=name: give the repository on the hub as user/name"),
        (["push=nowhere", "to=org/name"], "there is no such folder"),
        (["push={empty}", "to=org/name"], "there is no merged.safetensors in it"),
        (["push={run}", "to=org/name", "private=no"], "private=no: give true or false"),
        (["push={run}", "to=org/name", "privat=true"], "did you mean 'private'"),
        (["push={run}", "to=org/na..me"], "push to=org/na..me: "),
    ],
)
def test_a_mistake_is_told_in_a_sentence(arguments, said, folder, kept, main_in, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main_in(*(a.format(run=folder, empty=folder.parent) for a in arguments))
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not kept.files


def test_what_the_hub_refuses_is_told(folder, kept, monkeypatch) -> None:
    for status, said in {401: "does not know the token", 403: "role 'write'"}.items():
        kept.refuse = status
        with pytest.raises(UserError, match=said):
            push(folder, "org/name")


def test_a_hub_that_cannot_be_reached_is_told(folder, kept, monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    with pytest.raises(UserError, match=r"cannot be reached \(.+\); check the network"):
        push(folder, "org/name")


def test_nobody_is_logged_in(folder, kept, monkeypatch) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="no user is logged in to the hub; log in with 'hf auth"):
        push(folder, "org/name")
    assert not kept.made


def test_the_extra_that_is_missing_is_named(folder, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"push needs the extra 'hub': pip install 'fusion-cnn\[h"):
        push(folder, "org/name")
