"""Write a FLUX.1-schnell with random weights: python bench/synthetic.py FOLDER

It has the official shapes, names and files (34 GB, bfloat16), and nano's tokenizers padded to the official sizes. Use
it to measure time and memory at full size without the real weights. Remove the folder when done.
"""
import json
import random
import shutil
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np

import flux
import mmdit
import text
import vae
import weights

SHARDS = {"transformer": 1e10, "text_encoder_2": 5e9, "text_encoder": 5e9}      # maximum bytes per file
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 1024,
       "scaling_factor": 0.3611, "shift_factor": 0.1159}


def main(folder: str) -> None:
    """Write the pipeline into an empty or new folder."""
    folder, nano = Path(folder), ROOT / "nano"
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty; give a new folder")
    shutil.copytree(nano, folder, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("*.safetensors", "*.py", "*.jpg", "*.md", "__pycache__"))
    t5, clip = text.T5Config(), text.CLIPConfig()
    tokenizers(folder, t5.vocab_size, clip.vocab_size)
    rewrite(folder / "scheduler" / "scheduler_config.json",
            weights.read_json(nano / "scheduler" / "scheduler_config.json") | {"shift": 1.0})
    parts = {"transformer": (flux.Config(), mmdit.table(flux.Config())), "text_encoder_2": (t5, text.t5_table(t5)),
             "text_encoder": (clip, text.clip_table(clip))}
    for part, (cfg, tensors) in parts.items():
        rewrite(folder / part / "config.json", weights.read_json(folder / part / "config.json") | vars(cfg))
        write(folder / part, tensors, "diffusion_pytorch_model" if part == "transformer" else "model")
    rewrite(folder / "vae" / "config.json", weights.read_json(folder / "vae" / "config.json") | VAE)
    cfg = vae.config(folder / "vae")
    vae.save(folder / "vae", vae.init(jax.random.key(0), cfg), cfg)
    print(f"{sum(file.stat().st_size for file in folder.rglob('*')) / 1e9:.1f} GB in {folder}")


def tokenizers(folder: Path, t5_pieces: int = 32128, clip_pieces: int = 49408) -> None:
    """Write nano's tokenizers, padded to these sizes with random pieces, into a pipeline's folder."""
    rng = random.Random(0)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(ROOT / "nano" / name, folder / name, dirs_exist_ok=True)
    settings = weights.read_json(folder / "tokenizer_2" / "tokenizer_config.json")
    rewrite(folder / "tokenizer_2" / "tokenizer_config.json", settings | {"model_max_length": 256})
    file = folder / "tokenizer_2" / "tokenizer.json"
    t5 = weights.read_json(file)
    pieces = {piece: score for piece, score in t5["model"]["vocab"] if not piece.startswith("<extra")}
    extra = {piece: score for piece, score in t5["model"]["vocab"] if piece.startswith("<extra")}
    while len(pieces) + len(extra) < t5_pieces:
        word = "".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 9)))
        pieces.setdefault(rng.choice(["", "\u2581"]) + word, -10 - 5 * rng.random())
    t5["model"]["vocab"] = list(map(list, (pieces | extra).items()))
    ids = {piece: i for i, (piece, _) in enumerate(t5["model"]["vocab"])}
    t5["added_tokens"] = [token | {"id": ids[token["content"]]} for token in t5["added_tokens"]]
    rewrite(file, t5)
    folder = folder / "tokenizer"
    *words, start, end = weights.read_json(folder / "vocab.json")
    words, starts, merges = dict.fromkeys(words), [w for w in words if w.isascii() and not w.endswith("</w>")], []
    while len(words) + 2 < clip_pieces:
        pair = rng.choice(starts), rng.choice(starts) + rng.choice(["", "</w>"])
        if len("".join(pair)) < 12 and "".join(pair) not in words:
            merges.append(" ".join(pair))
            words["".join(pair)] = None
            starts += [] if pair[1].endswith("</w>") else ["".join(pair)]
            words.setdefault(pair[1])
    rewrite(folder / "vocab.json", {word: i for i, word in enumerate([*words, start, end])})
    with open(folder / "merges.txt", "a", encoding="utf-8") as out:
        out.write("".join(f"{merge}\n" for merge in merges))


def rewrite(file: Path, settings: dict) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def write(folder: Path, tensors: dict, stem: str) -> None:
    """Write the tensors as one safetensors file, or as numbered files with an index. Never hold a file in memory."""
    noise = np.random.default_rng(0).standard_normal(2 ** 26, dtype=np.float32)
    entries = [(name.format(layer), tensor.file_shape(width), tensor.mean, tensor.std)
               for tensor in jax.tree.leaves(tensors) for layer in tensor.numbers
               for name, width in tensor.parts.items()]
    shards, room = [[]], SHARDS[folder.name]
    for entry in entries:
        size = 2 * int(np.prod(entry[1]))
        if size > room:
            shards.append([])
            room = SHARDS[folder.name]
        shards[-1].append(entry)
        room -= size
    index = {}
    for i, shard in enumerate(shards):
        number = f"-{i + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = folder / f"{stem}{number}.safetensors"
        header, start = {}, 0
        for name, shape, *_ in shard:
            end = start + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            index[name], start = file.name, end
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        with open(file, "wb") as out:
            out.write(len(head).to_bytes(8, "little") + head)
            for name, shape, mean, std in shard:
                left, first = int(np.prod(shape)), zlib.crc32(name.encode()) % 1000
                while left:
                    piece = noise[first:first + left]
                    out.write((mean + (std or 0.02) * piece).astype(jnp.bfloat16).tobytes())
                    left, first = left - len(piece), 0
        print(file, flush=True)
    if len(shards) > 1:
        rewrite(folder / f"{stem}.safetensors.index.json",
                {"metadata": {"total_size": sum(2 * int(np.prod(e[1])) for e in entries)}, "weight_map": index})


if __name__ == "__main__":
    main(*sys.argv[1:])
