"""Convert SAEs of other libraries to the format of `sae.py`: SAELens of any version, and EleutherAI's sparsify.

Copy `sae.py` with this file. Copy `checkpoint.py` too if you want to read whole folders:

    described = formats.described(path, read, about)             # cfg.json as SAELens 6 would have written it
    params = formats.folded(path, described, cfg, arrays)        # {name: float64 array} of an SAE on raw residuals

Operations around the weights are folded into the weights: subtracting b_dec first, decoder norms, finetuning scales,
and each `normalize_activations` whose constants SAELens saved in the folder.
"""
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

import normalize
import sae
from sae import Mistake

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
RELU = ("standard", "transcoder")  # architectures without thresholds in the file: they are 0
ARCHITECTURES = ("topk", "jumprelu", "jumprelu_transcoder", "gated", *RELU)
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"  # SAELens' files in a checkpoint
CONSTANT = ("expected_average_only_in", "covariance_whitening")  # normalize_activations by the constants in these files
# Fields about the model that SAELens wrote at the top level before version 6
MODEL_KEYS = ("model_name", "hook_name", "hook_layer", "prepend_bos", "dataset_path", "context_size")
UNREADABLE = {
    "abstopk": "its features have either sign",
    "matching_pursuit": "it finds features one after another",
    "temporal": "its features depend on the tokens before",
    **dict.fromkeys(("skip_transcoder", "jumprelu_skip_transcoder"), "it adds a linear map beside the features"),
    **dict.fromkeys(("batchtopk", "matryoshka_batchtopk"),
                    "its threshold is not fixed yet; save it as jumprelu with SAELens' save_inference_model"),
}
SPARSIFY = {  # required values in cfg.json
    "activation": ("topk", "groupmax takes the largest of each group of features, not the k largest"),
    "transcode": (False, "a TopK transcoder is not supported"),
    "skip_connection": (False, "it adds a linear map beside the features"),
    "signed": (False, "its features have either sign"),
}


def described(path: Path, read: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that SAELens 6 would add to a cfg.json written by an older version or by sparsify."""
    if "expansion_factor" in read and "d_sae" not in read:
        return _from_sparsify(path, read)
    normalized = read.get("normalize_activations") or "none"
    new = {"normalize_activations": "expected_average_only_in" if normalized is True else normalized}
    if re.match(r"[6-9]|\d\d", str(read.get("sae_lens_version") or about.get("sae_lens_version"))):
        return new
    new["metadata"] = {name: read[name] for name in MODEL_KEYS if name in read} | about
    if "hook_z" in str(read.get("hook_name", read.get("hook_point"))) and "reshape_activations" not in read:
        new["reshape_activations"] = "hook_z"
    activation = read.get("activation_fn_str", read.get("activation_fn", "relu"))
    options = read.get("activation_fn_kwargs") or {}
    if activation not in ("relu", "topk") or not isinstance(options, dict):
        raise Mistake(f"{path}: activation_fn is {activation!r} with {options!r}; need 'relu', or 'topk' with k")
    topk = activation == "topk" or read.get("architecture") == "topk"
    return new | ({"architecture": "topk", "k": options.get("k", read.get("k"))} if topk else
                  {"architecture": read.get("architecture", "standard")})


def _from_sparsify(path: Path, read: Mapping[str, Any]) -> dict[str, Any]:
    """Return these fields for a cfg.json of sparsify. Two options do not change its `encode`: normalize_decoder affects
    only training; multi_topk affects the loss and `forward`, which then returns 4 k features per token."""
    for name, (needed, why) in SPARSIFY.items():
        if read.get(name, needed) != needed:
            raise Mistake(f"{path}: {name} is {read[name]!r}; an SAE of sparsify needs {needed!r}: {why}")
    shape = [read.get(name) for name in ("d_in", "expansion_factor")]
    product = shape[0] * shape[1] if all(type(n) is int for n in shape) else None
    return {"architecture": "topk", "d_sae": read.get("num_latents") or product, "weights": "sae.safetensors",
            "normalize_activations": "none"}


def check_described(path: Path, described: Mapping[str, Any]) -> None:
    """Raise Mistake with the reason if `folded` cannot load an SAE that cfg.json describes."""
    architecture, normalized = described.get("architecture"), described["normalize_activations"]
    if architecture not in ARCHITECTURES:
        why = UNREADABLE.get(architecture) if isinstance(architecture, str) else None
        raise Mistake(f"{path}: architecture is {architecture!r}; need one of {', '.join(ARCHITECTURES)}"
                      + (f": {why}" if why else ""))
    counts = {"k": architecture == "topk", "d_out": architecture.endswith("transcoder")}
    for name in ("d_in", "d_sae", *(name for name, needed in counts.items() if needed)):
        if type(described.get(name)) is not int or described[name] < 1:
            raise Mistake(f"{path}: {name} is {described.get(name)!r}; need a positive integer")
    for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "finetuning_scaling_factor"):
        if type(described[name]) is not bool:
            raise Mistake(f"{path}: {name} is {described[name]!r}; need true or false")
    if described["reshape_activations"] != "none":
        raise Mistake(f"{path}: reshape_activations is {described['reshape_activations']!r}; need 'none'")
    if normalized not in ("none", *CONSTANT):
        raise Mistake(f"{path}: normalize_activations is {normalized!r}; need one of {', '.join(('none', *CONSTANT))}: "
                      "scaling that depends on each input cannot be folded into weights")
    if normalized != "none" and architecture.endswith("transcoder"):
        raise Mistake(f"{path}: normalize_activations is {normalized!r}; a transcoder needs 'none'")


def folded(path: Path, described: Mapping[str, Any], cfg: sae.Config,
           arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert a file's arrays to {name: float64} of an SAE on raw residuals. Raise Mistake if they do not fit."""
    p = _unwrapped(_named(path, described, cfg, arrays), described, cfg)
    normalized = described["normalize_activations"]
    return p if normalized == "none" else p | _unnormalized(path.parent, normalized, p)


def _named(path, described, cfg, arrays):
    """Check the tensors of a file. Return them in float64 with SAELens' current names."""
    new = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "finetuning_scaling_factor": "scaling_factor"}
    arrays = {new.get(name, name): value.T if name == "encoder.weight" else value for name, value in arrays.items()}
    shapes, architecture = cfg.shapes, described["architecture"]
    if "log_threshold" in arrays and architecture == "jumprelu":
        arrays["threshold"] = np.exp(arrays.pop("log_threshold").astype(np.float64))
    if architecture in (*RELU, "gated"):
        del shapes["threshold"]
    if architecture == "gated":
        del shapes["b_enc"]
        shapes |= dict.fromkeys(("b_gate", "b_mag", "r_mag"), (cfg.features,))
    if "scaling_factor" in arrays:
        shapes["scaling_factor"] = (cfg.features,)
    normalize.check_arrays(path, arrays, shapes)
    if not described["finetuning_scaling_factor"] and not np.allclose(arrays.get("scaling_factor", 1), 1):
        raise Mistake(f"{path} holds a scaling_factor, so cfg.json must say finetuning_scaling_factor: true")
    return {name: value.astype(np.float64) for name, value in arrays.items()}


def _unwrapped(p, described, cfg):
    """Return the same SAE as a matrix, a bias and a threshold, then a second matrix and bias."""
    if described["architecture"] in RELU:
        p["threshold"] = np.zeros(cfg.features)
    if described["architecture"] == "gated":  # both paths share W_enc, so the gate is a threshold on the magnitude
        size = np.exp(p["r_mag"])
        p |= {"W_enc": p["W_enc"] * size, "b_enc": p["b_mag"], "threshold": p["b_mag"] - p["b_gate"] * size}
    if described["apply_b_dec_to_input"] and cfg.d_out is None:
        p["b_enc"] = p["b_enc"] - p["b_dec"] @ p["W_enc"]
    if described["rescale_acts_by_decoder_norm"] and cfg.activation == "topk":
        norm = np.maximum(np.linalg.norm(p["W_dec"], axis=1), 1e-30)
        p |= {"W_enc": p["W_enc"] * norm, "b_enc": p["b_enc"] * norm, "W_dec": p["W_dec"] / norm[:, None]}
    return p | {"W_dec": p["W_dec"] * p["scaling_factor"][:, None]} if "scaling_factor" in p else p


def _unnormalized(folder: Path, kind: str, p: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays that change so that the SAE acts on raw residuals, if training normalized them by constants.
    SAELens saves the constants in the checkpoints of a run, and folds them into the weights at the end."""
    if kind == "covariance_whitening":
        path, d = folder / WHITENING, len(p["b_dec"])
        arrays, _ = load_arrays(path)
        normalize.check_arrays(path, arrays, {"mean": (d,), "matrix": (d, d), "inverse_matrix": (d, d)})
        mean, matrix, inverse = (arrays[name].astype(np.float64) for name in ("mean", "matrix", "inverse_matrix"))
        enc = matrix @ p["W_enc"]
        return {"W_enc": enc, "b_enc": p["b_enc"] - mean @ enc, "W_dec": p["W_dec"] @ inverse,
                "b_dec": p["b_dec"] @ inverse + mean}
    scale = read_json(folder / SCALER).get("scaling_factor") if (folder / SCALER).is_file() else None
    if type(scale) not in (int, float) or not 0 < scale < np.inf:
        raise Mistake(f"{folder / CONFIG}: normalize_activations is {kind!r}, but no {SCALER} beside it gives the "
                      'factor, such as {"scaling_factor": 0.5}; without it the SAE would expect another input scale')
    return {"W_enc": p["W_enc"] * scale, "W_dec": p["W_dec"] / scale, "b_dec": p["b_dec"] / scale}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raise Mistake if the file holds no JSON object."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Mistake(f"{path} is not JSON: {error}") from None
    if not isinstance(read, dict):
        raise Mistake(f"{path} holds no JSON object")
    return read


def load_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return a safetensors file's arrays and our header ({} if other code wrote it). Raise Mistake if damaged."""
    if not path.is_file():
        raise Mistake(f"{path} is missing")
    try:
        with safetensors.safe_open(path, "np") as file:
            names, header = file.keys(), json.loads((file.metadata() or {}).get("fae", "{}"))
            return {name: file.get_tensor(name) for name in names}, header
    except Exception as error:  # of safetensors, or of numpy for types that it does not know
        raise Mistake(f"{path} is damaged: {error} ({path.stat().st_size} bytes)") from None
