"""Put a trained SAE on the Hugging Face hub, with a model card that says what it is and how to load it.

Copy `sae.py`, and what it imports, with this file; it needs huggingface_hub.

    hub.check("owner/repo")                                      # before the long work: name, token, rights
    url = hub.upload("ckpt", "owner/repo", "black-forest-labs/FLUX.1-schnell")

A repo may hold SAEs of several layers and sites, each in a folder of its own as SAELens wants it:
`SAE.from_pretrained("owner/repo", "layer10-img")`. What a run needs to go on, state.safetensors, stays at home.
"""
import json
import shlex
from pathlib import Path

import sae
from sae import Mistake

COLUMNS = {"fvu_standardized": "FVU (std.)", "fvu": "FVU (raw)", "l0": "L0", "dead": "dead", "cosine": "cosine"}


def check(repo):
    """Raises ValueError, in one line, where `upload` to this repo could not work."""
    from huggingface_hub import HfApi, errors
    from huggingface_hub.utils import validate_repo_id
    try:
        owner, _ = repo.split("/")
        validate_repo_id(repo)
    except ValueError:
        raise Mistake(f"--push {repo}: it takes the id of a repo, owner/name") from None
    try:
        who = HfApi().whoami()
    except errors.LocalTokenNotFoundError:
        raise Mistake(f"--push {repo}: there is no token; log in with `hf auth login`") from None
    except Exception as error:                                   # the HTTP library of the hub client raises its own
        raise Mistake(f"--push {repo}: cannot ask the hub who you are: {line(error)}") from None
    owners = [who["name"], *(organization["name"] for organization in who.get("orgs", ()))]
    if owner not in owners:
        raise Mistake(f"--push {repo}: you may write to repos of {', '.join(owners)}")
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise Mistake(f"--push {repo}: your token may only read; log in with another by `hf auth login`")


def upload(folder, repo, base=None):
    """The SAE in the folder, written by train.py, in one commit to the repo, which is made where there is none. base:
    id of its model's repo on the hub. Returns the address. Raises ValueError for a broken SAE or a failed upload."""
    from huggingface_hub import CommitOperationAdd, HfApi
    folder = Path(folder)
    _, cfg = sae.load_groups(folder)                             # nothing damaged is put on the hub
    about, api = sae.load_metadata(folder), HfApi()
    place = place_of(folder, about)
    names = [str(Path(group, name)) for group in ("", *cfg.groups[1:]) for name in (sae.CONFIG, sae.WEIGHTS)]
    names += ["metrics.jsonl"] if (folder / "metrics.jsonl").is_file() else []
    try:
        api.create_repo(repo, exist_ok=True)
        others = {name.rsplit("/", 1)[0] for name in api.list_repo_files(repo) if name.endswith(f"/{sae.CONFIG}")}
        added = {f"{place}/{name}": folder / name for name in names}
        beside = sorted(other for other in others if f"{other}/".split("/", 1)[0] != place)
        added["README.md"] = card(folder, repo, base, place, beside).encode()
        api.create_commit(repo, [CommitOperationAdd(name, data) for name, data in added.items()],
                          commit_message=f"SAE of layer {about['layer']} ({about['site']})")
    except Exception as error:
        raise Mistake(f"cannot push to {repo}: {line(error)}") from None
    return f"{api.endpoint}/{repo}"


def place_of(folder, about):
    """The SAE's folder in its repo. Raises Mistake for metadata that train.py did not write: a path is made of them."""
    layer, site = about.get("layer"), about.get("site")
    if type(layer) is not int or layer < 0 or site not in ("img", "txt", "both"):
        raise Mistake(f"{folder / sae.CONFIG}: metadata.layer is {layer!r}, metadata.site {site!r}; need a block's "
                      "number and img, txt or both")
    if missing := [name for name in ("model", "run", "evaluation", "normalization") if not about.get(name)]:
        raise Mistake(f"{folder / sae.CONFIG}: metadata says no {', '.join(missing)}: it was not written by train.py")
    return f"layer{layer}-{site}"


def line(error):
    """What an error says, on one line."""
    return " ".join((str(error).strip() or repr(error)).split())


def card(folder, repo, base, place, others):
    """README.md of the repo. place: the SAE's folder in it; others: those that it held before."""
    from huggingface_hub import ModelCardData
    described, about = json.loads((folder / sae.CONFIG).read_text()), sae.load_metadata(folder)
    front = ModelCardData(base_model=base, library_name="saelens",
                          tags=["sparse-autoencoder", "interpretability", "fae"]).to_yaml()
    run, site = about["run"], {"img": "image tokens", "txt": "text tokens"}.get(about["site"], "text and image tokens")
    name = base or Path(about["model"]).name
    source = f"[{base}](https://huggingface.co/{base})" if base else f"`{name}`"
    revision = f", revision `{about['revision']}`" if about.get("revision") else ""
    size = " x ".join(map(str, run["size"] if isinstance(run["size"], list) else [run["size"]] * 2))
    size = f"of {size} pixels" if run["size"] else "of the model's own size"
    beside = f"\nThe repository also holds {', '.join(f'`{other}`' for other in others)}.\n" if others else ""
    return f"""---
{front}
---
# A sparse autoencoder for layer {about['layer']} of {name}

| | |
|---|---|
| model | {source}{revision} |
| layer, site | {about['layer']}, {site}: the residual stream that leaves this block |
| architecture | {described['architecture']}{f", k = {described['k']}" if 'k' in described else ''} |
| features | {described['d_sae']:,}, of {described['d_in']:,} dimensions |
| trained on | {run['steps'] * run['batch']:,} tokens of images {size}, timesteps: {run['timesteps']} |
| prompts | `{run['prompts']}` |
| normalization | {about['normalization']} |
{groups(about, place)}
{scores(about['evaluation'], "held-out" if run.get("held_out", True) else "seen prompts, new noise")}
FVU is the fraction of variance unexplained: "std." with every dimension scaled to unit variance, the space of training;
"raw" on the residuals as they are, of which a few huge directions decide it.
{beside}
## Use it

It acts on raw residuals: nothing is to be normalized first.

```python
from sae_lens import SAE                                     # SAELens 6
autoencoder = SAE.from_pretrained("{repo}", "{place}")
```

```python
import sae                                                   # sae.py and kernels.py of fae
from huggingface_hub import snapshot_download
params, cfg = sae.load(snapshot_download("{repo}") + "/{place}")
values, indices = sae.encode(params, cfg, x)                 # x [..., {described['d_in']}]
```

## Train it again

```sh
{command(run)}
```
"""


def groups(about, place):
    """The row that says which tokens the SAE is for, where each group of tokens has one."""
    first, *others = about["training"].get("groups") or [""]
    if not others:
        return ""
    return f"| for tokens | {first}; of {', '.join(f'{name}: `{place}/{name}`' for name in others)} |\n"


def scores(rows, title):
    """The closing table of a run, as Markdown."""
    heads = [key for key in COLUMNS if any(key in row for row in rows.values())]
    lines = [f"| {title} | {' | '.join(COLUMNS[key] for key in heads)} |", "|---|" + "--:|" * len(heads)]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{row[key]:.3f}' if key in row else '' for key in heads)} |")
    return "\n".join(lines) + "\n"


def command(run):
    """The command line that makes the run again, from its metadata."""
    flags = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in run.items()}
    return "python train.py " + shlex.join(f"--{name}={value}" for name, value in flags.items() if value is not None)
