"""``tune download`` against a small Hub on this machine that speaks the real protocol."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from torchft.cli.download import is_wanted

COMMIT = "c0ffee" * 6 + "cafe"
FILES = {
    "model-00001-of-00002.safetensors": b"first" * 1000,
    "model-00002-of-00002.safetensors": b"second" * 1000,
    "model.safetensors.index.json": b"{}",
    "config.json": b'{"auto_map": {"AutoModel": "modeling.Evil"}}',
    "tokenizer.model": b"spm",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
    "LICENSE": b"BSD",
    # S10: none of these
    "modeling.py": b"open('ran', 'w')",
    "pytorch_model.bin": b"\x80pickle",
    "rng.pkl": b"\x80pickle",
    "consolidated.safetensors": b"twice the weights",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"\x80pickle",
    "training_args.pt": b"\x80pickle",
}
WANTED = set(list(FILES)[:8])


class Hub(BaseHTTPRequestHandler):
    """GET/HEAD of the two requests that the client makes: a model's file list, and a file."""

    lies = False  # about a file's sha256
    served: list[str] = []  # noqa: RUF012

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        if self.path.startswith("/api/models/org/"):
            return self.api(parts)
        if parts[:3] == ["org", "model", "resolve"] and parts[3] == COMMIT and "/".join(parts[4:]) in FILES:
            return self.file("/".join(parts[4:]))
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def api(self, parts):
        repo, rest = parts[3], parts[4:]
        if repo == "gated":
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if repo == "broken":
            return self.answer(503, b"{}")
        if repo not in ("model", "pickles", "hostile"):
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if rest and rest[-1] not in ("main", "v1", COMMIT):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        names = {"pickles": ["pytorch_model.bin"], "hostile": ["..\\evil.json", *FILES]}.get(repo, list(FILES))
        listed = [(name, FILES.get(name, b"")) for name in names]
        if "tree" in rest:
            tree = [
                {"type": "file", "path": n, "size": len(d), "oid": "0" * 40} | self.lfs(n, d, "oid") for n, d in listed
            ]
            return self.answer(200, json.dumps(tree).encode())
        siblings = [{"rfilename": n, "size": len(d), "blobId": "0" * 40} | self.lfs(n, d, "sha256") for n, d in listed]
        body = {"id": f"org/{repo}", "modelId": f"org/{repo}", "sha": COMMIT, "siblings": siblings, "tags": []}
        return self.answer(200, json.dumps(body).encode())

    def lfs(self, name, data, key):
        digest = "f" * 64 if self.lies else hashlib.sha256(data).hexdigest()
        return {"lfs": {key: digest, "size": len(data), "pointerSize": 134}} if name.endswith(".safetensors") else {}

    def file(self, name):
        if self.command == "GET":
            self.served.append(name)
        self.answer(200, FILES[name], {"ETag": hashlib.sha256(FILES[name]).hexdigest(), "X-Repo-Commit": COMMIT})

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Its address; downloads go to the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Hub, "served", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def download(python, hub, tmp_path):
    def call(*words: str, **environment: str):
        return python(
            "-m", "torchft.cli.main", "download", *words,
            **{"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "",
               "HF_HUB_DISABLE_PROGRESS_BARS": "1", "no_proxy": "*"} | environment,
        )  # fmt: skip

    return call


def test_fetches_what_is_read_and_nothing_else(download):
    done = download("org/model", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"org/model at {COMMIT}"
    assert "checkpoint_dir=model" in done.stdout
    files = {path.name for path in Path("model").iterdir() if path.is_file()}
    assert files == WANTED | {"download.json"}  # S10
    assert set(Hub.served) == WANTED
    manifest = json.loads(Path("model/download.json").read_text())
    assert manifest["commit"] == COMMIT
    assert manifest["sha256"] == {name: hashlib.sha256(FILES[name]).hexdigest() for name in sorted(WANTED)}

    Path("model/model-00002-of-00002.safetensors").unlink()  # as after an interruption
    Hub.served.clear()
    assert download("org/model", "--revision", "v1", "--output-dir", "model").returncode == 0
    assert Hub.served == ["model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["org/gated"], {}, "org/gated: this model is gated: accept its license at https://huggingface.co/org/gated"),
        (["org/nothing"], {}, "org/nothing: not on the Hub, or private: check the name at"),
        (["org/model", "--revision", "v2"], {}, "org/model: there is no revision 'v2'"),
        (["org/broken"], {}, "org/broken: the Hub answered with an error; try again later"),
        (["org/model"], {"HF_HUB_OFFLINE": "1"}, "org/model: HF_HUB_OFFLINE is set, so nothing can be downloaded"),
        (
            ["org/model"],
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "org/model: the Hub cannot be reached, check the network",
        ),
        (["org/pickles"], {}, "org/pickles has no safetensors weights"),
        (["org/hostile"], {}, "'..\\\\evil.json' (named by a file in hostile) points outside"),  # S11
        (["org/model", "--output-dir", "a_file/x"], {}, "org/model: cannot write the files: "),
    ],
)
def test_every_failure_is_one_sentence(download, words, environment, message):
    Path("a_file").touch()
    done = download(*words, HF_TOKEN="hf_canarycanarycanarycanary", **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert "canary" not in done.stderr  # S9


def test_a_file_that_differs_from_the_hubs_is_reported(download, monkeypatch):
    monkeypatch.setattr(Hub, "lies", True)
    done = download("org/model")
    assert done.returncode == 2
    assert "error: 2 problems" in done.stderr
    assert "model-00001-of-00002.safetensors differs from the Hub's: delete it and download it again" in done.stderr
    assert not Path("model/download.json").exists()


@pytest.mark.parametrize(
    "repo", ["../..", "a/b/c", "a", "/a/b", "-a/b", "a/-b", "a b/c", "a/b;id", "a/..", "$(id)/b", "a/b\n", "", "a--b/c"]
)
def test_s12_bad_names_are_refused_before_any_request(tune, repo):
    code, _, err = tune("download", repo)
    assert code == 2
    assert "is not a model of the Hub; write ORG/MODEL" in err or f"unknown option {repo!r}" in err


@pytest.mark.parametrize("revision", ["../x", "-x", "a b", "x;id", ""])
def test_s12_bad_revisions(tune, revision):
    code, _, err = tune("download", "org/model", f"--revision={revision}")
    assert code == 2
    assert "is not a branch, tag or commit" in err


def test_is_wanted():
    assert {name for name in FILES if is_wanted(name)} == WANTED
