"""--push_to_hub speaks to a stand-in of the hub's HTTP interface; no test leaves this machine."""

import base64
import http.server
import json
import os
import threading

import pytest

from conftest import ROOT, assert_one_line_error, run_script
from model.checkpoint import save_checkpoint
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import tokenizer_hash

SHAPE = dict(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=64)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as an upload needs; `server.files` holds what arrived, `server.refuse` a status for all."""

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        body, server = self.body(), self.server
        server.tokens.add(self.headers.get("Authorization"))
        if server.refuse:
            return self.reply(server.refuse, {"error": "no"})
        if self.path == "/api/repos/create":
            server.created = json.loads(body)
            return self.reply(200, {"url": f"{server.address}/me/tiny"})
        if self.path == "/api/validate-yaml":  # the model card's front matter
            assert "license:" in json.loads(body)["content"]
            return self.reply(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "lfs" if file["size"] > 100_000 else "regular",
                      "shouldIgnore": False} for file in json.loads(body)["files"]]  # fmt: skip
            return self.reply(200, {"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [{**item, "actions": {"upload": {"href": f"{server.address}/upload/{item['oid']}"}}}
                       for item in json.loads(body)["objects"]]  # fmt: skip
            return self.reply(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    server.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                elif item["key"] == "lfsFile":
                    server.files[item["value"]["path"]] = server.uploaded[item["value"]["oid"]]
            answer = {
                "commitUrl": f"{server.address}/me/tiny/commit/{'0' * 40}",
                "commitOid": "0" * 40,
                "pullRequestUrl": None,
                "hookOutput": "",
            }
            return self.reply(200, answer)
        self.reply(404, {"error": self.path})

    def do_PUT(self):
        self.server.uploaded[self.path.rsplit("/", 1)[1]] = self.body()
        self.reply(200)

    def do_GET(self):
        self.reply(200, {"id": "me/tiny", "sha": "0" * 40, "siblings": []})

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.files, server.uploaded, server.refuse, server.created, server.tokens = {}, {}, None, None, set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    path = tmp_path / "tiny.pth"
    model = Transformer(LMConfig(**SHAPE, vocab_size=len(tokenizer)))
    save_checkpoint(path, model, {"stage": "multi_chat/full_sft", "tokenizer_hash": tokenizer_hash(tokenizer)})
    return path


def push(hub, tmp_path, checkpoint, *words, repository="me/tiny", **environment):
    settings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    settings["HF_HOME"] = str(tmp_path / "home")
    words = ["--checkpoint", checkpoint, "--push_to_hub", repository, *words]
    return run_script("export_model.py", *words, env={**os.environ, **settings, **environment})


def is_private(hub):
    """As huggingface_hub says it since 2.0, or did before."""
    return hub.created.get("visibility") == "private" or hub.created.get("private") is True


def test_a_folder_is_uploaded_whole(hub, tmp_path, checkpoint):
    process = push(hub, tmp_path, checkpoint, "--output", tmp_path / "tiny")
    assert process.returncode == 0, process.stderr
    assert (
        hub.created["name"] == "tiny"
        and not hub.created.get("private")
        and hub.created.get("organization", "me") == "me"
    )
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    assert hub.files["model.py"] == (ROOT / "model/model.py").read_bytes()
    assert hub.tokens == {"Bearer hf_secret"} and f"{hub.address}/me/tiny" in process.stdout
    assert "hf_secret" not in process.stdout + process.stderr


def test_a_gguf_goes_with_a_model_card(hub, tmp_path, checkpoint):
    words = ["--format", "gguf", "--output", tmp_path / "chat.gguf", "--license", "cc-by-4.0", "--private"]
    process = push(hub, tmp_path, checkpoint, *words)
    assert process.returncode == 0, process.stderr
    assert set(hub.files) == {"chat.gguf", "Modelfile", "README.md"} and is_private(hub)
    assert hub.files["chat.gguf"] == (tmp_path / "chat.gguf").read_bytes()
    assert b"license: cc-by-4.0" in hub.files["README.md"] and not (tmp_path / "README.md").exists()


def test_a_refusal_is_one_line_and_leaves_the_export(hub, tmp_path, checkpoint):
    hub.refuse = 403
    process = push(hub, tmp_path, checkpoint, "--output", tmp_path / "tiny")
    assert_one_line_error(process, "--push_to_hub me/tiny", "403", "complete in")
    assert (tmp_path / "tiny/model.safetensors").exists() and "hf_secret" not in process.stderr


def test_an_address_nobody_answers_and_a_name_that_is_none(hub, tmp_path, checkpoint):
    hub.shutdown()
    hub.server_close()
    process = push(hub, tmp_path, checkpoint, "--output", tmp_path / "tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert_one_line_error(process, "--push_to_hub me/tiny", "complete in")
    words = ["--output", tmp_path / "other"]
    process = push(hub, tmp_path, checkpoint, *words, repository="a/b/c")
    assert_one_line_error(process, "--push_to_hub a/b/c", code=2)
    assert not (tmp_path / "other").exists()
