"""--push against a local stand-in of the Hugging Face hub, to which the real client speaks over HTTP."""
import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from huggingface_hub import constants

import checkpoint
import flux
import sae
import train

RUN = {"model": "schnell", "layer": 10, "site": "img", "features": 96, "k": 5, "steps": 7, "batch": 32,
       "prompts": "p.txt", "prompt_field": None, "prompt_batch": 2, "seeds_per_prompt": 1, "timesteps": 1,
       "buffer": 64, "size": 64, "text_tokens": 16, "lr": 1e-3, "seed": 0, "dtype": "float32"}
SCORES = {"fvu_standardized": 0.125, "fvu": 0.0625, "l0": 5.0, "dead": 0.01, "cosine": 0.9, "variance_explained": 0.8}
SHARES = {"position": 0.1, "prompt": 0.6, "noise": 0.05, "both": 0.25, "varying": 90, "follow_prompt": 70,
          "follow_prompt_or_image": 80}


class Hub(ThreadingHTTPServer):
    """Repos in memory: what create_repo, create_commit (with git LFS) and downloads ask of the hub."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.who = {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}
        self.repos, self.blobs, self.commits, self.full = {}, {}, [], False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, content=b"", code=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def log_message(self, *_):
        pass

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == "Bearer hf_ours"
            return self.answer(hub.who) if known else self.answer({"error": "Invalid token"}, 401)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+)?", path):
            names = hub.repos.get(match[1])
            found = {"id": match[1], "sha": "0" * 40, "siblings": [{"rfilename": name} for name in names or ()]}
            return self.answer(found) if names is not None else self.missing("Repo")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path):
            content = hub.repos.get(match[1], {}).get(match[2])
            return self.missing("Entry") if content is None else self.answer(
                content, ETag=f'"{hash(content):x}"', X_Repo_Commit="0" * 40)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/.*", path):
            return self.answer([{"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                                for name, content in hub.repos[match[1]].items()])
        return self.missing("Entry")

    do_HEAD = do_GET

    def missing(self, what):
        self.answer({"error": "not found"}, 404, X_Error_Code=f"{what}NotFound")

    def do_POST(self):
        hub, path, body = self.server, self.path.split("?")[0], self.body()
        if self.headers.get("Authorization") != "Bearer hf_ours":
            return self.answer({"error": "Invalid token"}, 401)
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return self.answer({"warnings": [], "errors": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            code = 409 if repo in hub.repos else 200
            hub.repos.setdefault(repo, {})
            return self.answer({"url": f"{hub.address}/{repo}"}, code)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            return self.answer({"files": [{"path": file["path"], "shouldIgnore": False, "uploadMode": (
                "lfs" if file["path"].endswith(".safetensors") else "regular")} for file in json.loads(body)["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            if hub.full:
                return self.answer({"error": "storage quota\nexceeded"}, 403)
            upload = lambda oid: {"upload": {"href": f"{hub.address}/blob/{oid}", "header": {}}}
            return self.answer({"transfer": "basic", "objects": [item | {"actions": upload(item["oid"])}
                                                                 for item in json.loads(body)["objects"]]})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            header, *entries = (json.loads(line) for line in body.splitlines())
            for entry in entries:
                value = entry["value"]
                content = base64.b64decode(value["content"]) if entry["key"] == "file" else hub.blobs[value["oid"]]
                hub.repos[match[1]][value["path"]] = content
            hub.commits.append((header["value"]["summary"], [entry["key"] for entry in entries]))
            return self.answer({"commitUrl": f"{hub.address}/{match[1]}/commit/1", "commitOid": "1" * 40})
        return self.missing("Entry")

    def do_PUT(self):
        self.server.blobs[self.path.rsplit("/", 1)[1]] = self.body()
        self.answer()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub of this machine's own, known to the client, which holds a token for it."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    files = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield hub
    hub.shutdown()
    hub.server_close()


def made(folder, removed=0, **changes):
    """As the end of a run leaves it."""
    run, cfg = RUN | changes, sae.Config(d_in=24, features=96, k=5, removed=removed)
    x = np.random.default_rng(0).standard_normal((200, 24), np.float32)
    without = np.eye(removed, 24) if removed else None
    state = sae.init(jax.random.key(run["layer"]), cfg, x, without=without)._replace(step=np.int32(run["steps"]))
    about = {name: run[name] for name in ("model", "layer", "site", "seed")} | {
        "revision": None, "normalization": "per dimension", "run": run | {"quant": "none"},
        "evaluation": {"SAE": SCORES | {"variance": SHARES}, "PCA, 5 components": {"fvu_standardized": 0.5, "l0": 5.0}}}
    train.save(folder, state, cfg, about)
    (folder / "metrics.jsonl").write_text('{"step": 7}\n')
    return folder


def test_what_is_uploaded(server, tmp_path):
    """One commit for a site; another SAE goes beside the first, a new one of the same site takes its place."""
    first, second = made(tmp_path / "a"), made(tmp_path / "b", layer=37, site="both")
    assert checkpoint.push(first, "me/saes", "black-forest-labs/FLUX.1-schnell") == f"{server.address}/me/saes"
    held = server.repos["me/saes"]
    files = (checkpoint.CONFIG, checkpoint.WEIGHTS, "metrics.jsonl")
    expected = {f"layer10-img/{name}": (first / name).read_bytes() for name in files}
    assert {name: content for name, content in held.items() if name != "README.md"} == expected
    assert server.commits == [("SAE of layer 10 (img)", ["file", "lfsFile", "file", "file"])]
    assert "also holds" not in held["README.md"].decode()
    checkpoint.push(second, "me/saes")
    assert len(server.commits) == 2 and held.keys() > expected.keys() and "layer37-both/cfg.json" in held
    assert "also holds `layer10-img`." in held["README.md"].decode()


def test_groups_of_tokens_go_along_and_init_takes_them_from_there(server, tmp_path, nano, monkeypatch):
    cfg = sae.Config(d_in=128, features=256, k=5, groups=("txt", "img"), activation="batchtopk")
    x = np.random.default_rng(0).standard_normal((200, 128), np.float32)
    state = sae.init(jax.random.key(0), cfg, x, np.arange(200) % 2)._replace(step=np.int32(7))
    about = {"model": "nano", "layer": 3, "site": "both", "normalization": "std", "evaluation": {"SAE": SCORES},
             "run": RUN | {"site": "both"}}
    train.save(tmp_path / "a", state, cfg, about)
    checkpoint.push(tmp_path / "a", "me/saes")
    held = server.repos["me/saes"]
    assert held["layer3-both/img/cfg.json"] == (tmp_path / "a" / "img" / "cfg.json").read_bytes()
    assert "| token groups | txt: `layer3-both`, img: `layer3-both/img` |" in held["README.md"].decode()
    checkpoint.push(tmp_path / "a", "me/saes")
    assert "also holds" not in held["README.md"].decode()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = train.begun_from("me/saes/layer3-both/img")
    assert checkpoint.load_metadata(folder)["group"] == "img" and checkpoint.load(folder)[1] == cfg
    run = train.defaults("nano", nano, flux.read_config(nano)[1], {"init": "me/saes/layer3-both/img"})
    assert (run.features, run.k, run.activation) == (256, 5, "batchtopk")
    with pytest.raises(ValueError, match="no repo me/nothing"):
        train.begun_from("me/nothing")


@pytest.mark.parametrize("changes", [{"site": "../../x"}, {"site": "img/.."}, {"layer": -1}, {"layer": None},
                                     {"site": None}], ids=str)
def test_places_of_no_model_are_not_made(server, tmp_path, changes):
    """A folder in the repo is named after them."""
    with pytest.raises(sae.Mistake, match=r"cfg\.json: metadata\.layer is .*; need a block's number and img"):
        checkpoint.push(foreign(tmp_path / "a", {"layer": 3, "site": "img"} | changes), "me/saes")
    assert not server.repos


def foreign(folder, metadata):
    cfg = sae.Config(d_in=24, features=96, k=5)
    x = np.random.default_rng(0).standard_normal((200, 24), np.float32)
    checkpoint.save(folder, sae.fold(sae.init(jax.random.key(0), cfg, x), cfg), cfg, metadata=metadata)
    return folder


def test_saes_of_others_are_not_pushed(server, tmp_path):
    """Their card would have nothing to say."""
    with pytest.raises(sae.Mistake, match="says no model, run, evaluation, normalization: it was not"):
        checkpoint.push(foreign(tmp_path / "a", {"layer": 3, "site": "img"}), "me/saes")
    assert not server.repos


def test_the_card(server, tmp_path):
    folder = made(tmp_path / "a", prompts="a file's name.txt")
    checkpoint.push(folder, "lab/saes", "black-forest-labs/FLUX.1-schnell")
    _, front, text = server.repos["lab/saes"]["README.md"].decode().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["base_model"] == "black-forest-labs/FLUX.1-schnell" and front["library_name"] == "saelens"
    assert "sparse-autoencoder" in front["tags"] and "license" not in front
    for fact in ("layer 10", "image tokens", "k = 5", "96, of 24 dimensions", "224 tokens",
                 "| SAE | 0.125 | 0.062 | 5.000 |", "PCA, 5 components | 0.500 |",
                 'SAE.from_pretrained("lab/saes", "layer10-img")', "per dimension",
                 "position 10 %, prompt 60 %, noise 5 %, both 25 %, mean over features; 70 of 90 features"):
        assert fact in text, fact
    assert "removed" not in text
    given = dict(flag[2:].split("=", 1) for flag in shlex.split(re.search(r"python train.py (.*)", text)[1]))
    run = RUN | {"quant": "none", "prompts": "a file's name.txt"}
    assert given == {name: str(value) for name, value in run.items() if value is not None}


def test_an_sae_without_the_input_says_so_and_brings_what_was_removed(server, tmp_path):
    folder = made(tmp_path / "a", removed=3)
    checkpoint.push(folder, "me/saes")
    held = server.repos["me/saes"]
    assert held["layer10-img/removed.safetensors"] == (folder / checkpoint.REMOVED).read_bytes()
    card = held["README.md"].decode()
    assert "the 3 directions that hold the model's input" in card and "apply.removed" in card


READER = """
import json, sys
import numpy as np, sae_lens, huggingface_hub
sys.path.insert(0, {root!r})
import checkpoint
theirs = sae_lens.SAE.from_pretrained("me/saes", "layer10-img")
params, cfg = checkpoint.load(huggingface_hub.snapshot_download("me/saes") + "/layer10-img")
print(json.dumps([type(theirs).__name__, cfg.features, bool((theirs.W_dec.detach().numpy() == params["W_dec"]).all())]))
"""


def test_others_load_it_as_the_card_says(server, tmp_path):
    pytest.importorskip("sae_lens")
    checkpoint.push(made(tmp_path / "a"), "me/saes")
    environment = os.environ | {"HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                                "HF_HOME": str(tmp_path / "home")}
    code = READER.format(root=str(Path(sae.__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["TopKSAE", 96, True]


@pytest.mark.parametrize("repo, message", [
    ("saes", "it takes the id of a repo, owner/name"), ("a/b/c", "owner/name"), ("me/", "owner/name"),
    ("me/a--b", "owner/name"), ("True", "owner/name"), ("you/saes", "you may write to repos of me, lab")])
def test_repos_that_cannot_be(server, repo, message):
    with pytest.raises(ValueError, match=f"--push {repo}: .*{message}"):
        checkpoint.check_push(repo)
    assert not server.repos


def test_tokens_that_will_not_do(server, monkeypatch):
    checkpoint.check_push("me/saes")
    checkpoint.check_push("lab/saes")
    server.who["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(ValueError, match="your token may only read"):
        checkpoint.check_push("me/saes")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match=r"cannot ask the hub who you are: Invalid user token[^\n]*$"):
        checkpoint.check_push("me/saes")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="there is no token; log in with `hf auth login`"):
        checkpoint.check_push("me/saes")
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"cannot ask the hub who you are: [^\n]*$"):
        checkpoint.check_push("me/saes")


# ---------------------------------------------------------------- train.py --push


TINY = {"layer": 2, "features": 256, "k": 8, "steps": 6, "batch": 64, "prompt_batch": 2, "seeds_per_prompt": 2,
        "buffer": 256, "size": 64, "text_tokens": 16, "save_every": 2, "activation": "topk", "without": "nothing"}


def test_train_pushes_at_the_end_and_a_finished_run_at_once(nano, server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    server.full = True
    with pytest.raises(ValueError, match=r"cannot push to me/nano: [^\n]*quota exceeded[^\n]*; the checkpoint is "
                       r"complete, try again with: python train.py --resume --out ckpt --push me/nano$"):
        train.main(model=str(nano), push="me/nano", **TINY)
    server.full = False
    before = {path.name: path.read_bytes() for path in Path("ckpt").iterdir()}
    monkeypatch.setattr(flux, "load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    train.main(resume=True, push="me/nano")
    assert f"pushed: {server.address}/me/nano" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in Path("ckpt").iterdir()} == before
    held = server.repos["me/nano"]
    assert held.keys() == {"README.md", *(f"layer2-img/{name}" for name in before if name != checkpoint.STATE)}
    assert "base_model" not in held["README.md"].decode() and "layer 2 of nano" in held["README.md"].decode()
    shutil.copytree("ckpt", "damaged")
    weights = bytearray(before[checkpoint.WEIGHTS])
    weights[-1] ^= 1
    Path("damaged", checkpoint.WEIGHTS).write_bytes(weights)
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors is damaged"):
        train.main(resume=True, push="me/nano", out="damaged")
    with pytest.raises(pytest.fail.Exception, match="the model was loaded"):     # more steps: not finished
        train.main(resume=True, push="me/nano", steps=8)


def test_a_push_that_cannot_be_ends_before_any_work(nano, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flux, "load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    for push in ("nano", "you/nano"):
        with pytest.raises(ValueError, match=f"--push {push}"):
            train.main(model=str(nano), push=push, **TINY)
    assert not list(tmp_path.iterdir()) and not server.repos
