"""SAEs that others wrote, against the libraries that wrote them; what cannot be read says why in one line."""
import copy
import dataclasses
import json
import random

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import apply
import checkpoint
import recipe
import sae
from sae import Mistake

D, F, K = 9, 31, 5


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weights(**shapes):
    """Random tensors of an SAE in SAELens' names, with more or (None) without some."""
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)} | shapes
    return {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items()) if shape}


def write(folder, cfg, arrays, name="sae_weights.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(arrays, folder / name)
    return folder


def old(**changes):
    """cfg.json as SAELens 3 to 5 wrote it."""
    return {"architecture": "standard", "d_in": D, "d_sae": F, "activation_fn_str": "relu", "activation_fn_kwargs": {},
            "apply_b_dec_to_input": True, "finetuning_scaling_factor": False, "sae_lens_training_version": "3.1.0",
            "prepend_bos": True, "model_name": "flux", "hook_name": "blocks.5.hook_resid_post", "hook_layer": 5,
            "hook_head_index": None, "dataset_path": "prompts", "context_size": 128, "normalize_activations": "none",
            "dtype": "float32", "device": "cpu"} | changes


def assert_same(folder, encoded, decoded, x):
    """Features and reconstructions of the SAE in the folder to 1e-5. decoded: of the features `encoded`."""
    params, cfg = checkpoint.load(folder)
    values, indices = sae.encode(params, cfg, x)
    found = np.zeros((len(x), cfg.features), np.float32)
    np.maximum.at(found, (np.arange(len(x))[:, None], np.asarray(indices)), np.asarray(values))
    assert ((found > 0) == (encoded > 0)).all() and (encoded > 0).any()
    out = np.asarray(sae.decode(params, cfg, values, indices))
    for ours, theirs in ((found, encoded), (out, decoded)):
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
    return cfg


def saelens(folder, x, scaler=None):
    """What SAELens makes of the folder: features, reconstructions. scaler: of its training, around them."""
    torch = pytest.importorskip("torch")
    SAE = pytest.importorskip("sae_lens").SAE
    theirs, x = SAE.load_from_disk(folder), torch.from_numpy(x)
    with torch.no_grad():
        z = theirs.encode(x if scaler is None else scaler(x))
        y = theirs.decode(z)
        return z.numpy(), (y if scaler is None else scaler.unscale(y)).numpy()


OLD = {
    "topk": {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
    "topk, renamed": {"activation_fn_str": None, "activation_fn": "topk", "activation_fn_kwargs": {"k": K}},
    "topk, as an architecture": {"architecture": "topk", "activation_fn_kwargs": {"k": K}},
    "without architecture": {"architecture": None, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
    "relu": {},
    "silent": dict.fromkeys(("architecture", "activation_fn_str", "activation_fn_kwargs", "apply_b_dec_to_input",
                             "finetuning_scaling_factor", "normalize_activations")),
    "normalization false": {"normalize_activations": False},
    "b_dec is not subtracted": {"apply_b_dec_to_input": False},
    "jumprelu": {"architecture": "jumprelu"},
    "gated": {"architecture": "gated"},
    "gated, b_dec is not subtracted": {"architecture": "gated", "apply_b_dec_to_input": False},
}


@pytest.mark.parametrize("case", OLD)
def test_saelens_before_version_6(tmp_path, case):
    cfg = {name: value for name, value in old(**OLD[case]).items() if value is not None}
    more = {"jumprelu": {"threshold": (F,)}, "gated": dict(b_gate=(F,), b_mag=(F,), r_mag=(F,), b_enc=None)}
    write(tmp_path, cfg, weights(**more.get(cfg.get("architecture"), {})))
    x = normal(64, D, seed=9)
    found = assert_same(tmp_path, *saelens(tmp_path, x), x)
    assert (found.activation, found.k) == (("topk", K) if cfg.get("activation_fn_kwargs") else ("jumprelu", F))
    assert checkpoint.load_metadata(tmp_path)["hook_name"] == "blocks.5.hook_resid_post"


def test_gated_saes_of_saelens_6(tmp_path):
    torch, sae_lens = pytest.importorskip("torch"), pytest.importorskip("sae_lens")
    torch.manual_seed(0)
    theirs = sae_lens.GatedSAE(sae_lens.GatedSAEConfig(D, F))
    for parameter in theirs.parameters():
        parameter.data = torch.randn_like(parameter)
    theirs.save_model(tmp_path)
    x = normal(64, D)
    assert_same(tmp_path, *saelens(tmp_path, x), x)


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_scales_from_finetuning_go_into_the_decoder(tmp_path, name):
    """SAELens 6 ends in an error here; until 5 it multiplied features by them before the decoder."""
    arrays = weights()
    write(tmp_path / "plain", old(), arrays)
    x, scale = normal(64, D), np.exp(normal(F))
    z, _ = saelens(tmp_path / "plain", x)
    write(tmp_path / "tuned", old(finetuning_scaling_factor=True), arrays | {name: scale})
    assert_same(tmp_path / "tuned", z, z * scale @ arrays["W_dec"] + arrays["b_dec"], x)
    write(tmp_path / "ones", old(), arrays | {name: np.ones(F, np.float32)})
    assert_same(tmp_path / "ones", z, z @ arrays["W_dec"] + arrays["b_dec"], x)
    write(tmp_path / "silent", old(), arrays | {name: scale})
    with pytest.raises(Mistake, match="finetuning_scaling_factor"):
        checkpoint.load(tmp_path / "silent")


@pytest.mark.parametrize("kind", ["expected_average_only_in", "covariance_whitening", True])
@pytest.mark.parametrize("rescale", [False, True])
def test_constant_normalization_is_folded_in(tmp_path, kind, rescale):
    """As SAELens folds it in at the end of a run, and as its training applies it."""
    torch = pytest.importorskip("torch")
    scaling = pytest.importorskip("sae_lens.training.activation_scaler")
    version = {} if kind is True else {"metadata": {"sae_lens_version": "6.54.12"}}
    write(tmp_path, {"architecture": "topk", "k": K, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
                     "normalize_activations": kind, "rescale_acts_by_decoder_norm": rescale} | version, weights())
    with pytest.raises(Mistake, match=r"activation_(scaler\.json beside it|whitening\.safetensors is missing)"):
        checkpoint.load(tmp_path)
    scaler, x = scaling.ActivationScaler(), normal(64, D) * 40 + 7
    if kind == "covariance_whitening":
        scaler.estimate_whitening(D, iter([torch.from_numpy(x)]), 1)
    else:
        scaler.estimate_scaling_factor(D, iter([torch.from_numpy(x)]), 1)
    scaler.save(str(tmp_path / "activation_scaler.json"))
    cfg = assert_same(tmp_path, *saelens(tmp_path, x, scaler), x)
    assert (cfg.activation, cfg.k) == ("topk", K)


@pytest.mark.parametrize("said", ["null", "{}", '{"scaling_factor": "2"}', '{"scaling_factor": NaN}', "[2]", "{", "0",
                                  '{"scaling_factor": null}', '{"scaling_factor": 0}', '{"scaling_factor": true}'])
def test_factors_that_are_none(tmp_path, said):
    write(tmp_path, old(normalize_activations="expected_average_only_in"), weights())
    (tmp_path / "activation_scaler.json").write_text(said)
    with pytest.raises(Mistake, match=r"activation_scaler\.json"):
        checkpoint.load(tmp_path)


def sparsify(**changes):
    """cfg.json as eai-sparsify 1.3 writes it."""
    return {"activation": "topk", "expansion_factor": 4, "normalize_decoder": True, "num_latents": F, "k": K,
            "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D} | changes


def sparsify_weights(features=F):
    return {"encoder.weight": normal(features, D, seed=1), "encoder.bias": normal(features, seed=2),
            "W_dec": normal(features, D, seed=3), "b_dec": normal(D, seed=4)}


@pytest.mark.parametrize("changes", [{}, {"num_latents": 0}, {"multi_topk": True, "normalize_decoder": False},
                                     {"activation": None, "signed": False}], ids=str)
def test_sparsify(tmp_path, changes):
    """Against its equations: topk(ReLU(linear(x - b_dec))) and their rows of W_dec, none of them normalized."""
    torch = pytest.importorskip("torch")
    cfg = {name: value for name, value in sparsify(**changes).items() if value is not None}
    arrays = sparsify_weights(F if cfg["num_latents"] else 4 * D)
    write(tmp_path, cfg, arrays, "sae.safetensors")
    x, t = normal(64, D, seed=9), {name: torch.from_numpy(value) for name, value in arrays.items()}
    pre = torch.nn.functional.linear(torch.from_numpy(x) - t["b_dec"], t["encoder.weight"], t["encoder.bias"]).relu()
    values, indices = pre.topk(K, sorted=False)
    z = torch.zeros_like(pre).scatter_(-1, indices, values)
    found = assert_same(tmp_path, z.numpy(), (z @ t["W_dec"] + t["b_dec"]).numpy(), x)
    assert (found.activation, found.k, found.d_in) == ("topk", K, D)


UNREADABLE = {
    "layer_norm": (old(normalize_activations="layer_norm"), "depends on each input"),
    "constant_norm_rescale": (old(normalize_activations="constant_norm_rescale"), "depends on each input"),
    "an activation": (old(activation_fn_str="tanh-relu"), "activation_fn is 'tanh-relu'"),
    "topk without k": (old(activation_fn_str="topk"), "k is None"),
    "skip_transcoder": (old(architecture="skip_transcoder"), "linear map beside the features"),
    "abstopk": (old(architecture="abstopk", k=3), "either sign"),
    "temporal": (old(architecture="temporal"), "tokens before"),
    "batchtopk": (old(architecture="batchtopk"), "save_inference_model"),
    "hook_z": (old(hook_name="blocks.1.attn.hook_z"), "reshape_activations is 'hook_z'"),
    "groupmax": (sparsify(activation="groupmax"), "activation is 'groupmax'.*largest of each group"),
    "transcode": (sparsify(transcode=True), "transcode is True"),
    "skip_connection": (sparsify(skip_connection=True), "linear map beside"),
    "signed": (sparsify(signed=True), "either sign"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_represented_says_why(tmp_path, case):
    cfg, message = UNREADABLE[case]
    write(tmp_path, cfg, weights())
    with pytest.raises(Mistake, match=message) as error:
        checkpoint.load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def ours(folder, **changes):
    """Written by us, but with other metadata and no digest."""
    cfg = sae.Config(d_in=D, features=F, k=K)
    checkpoint.save(folder, weights(), cfg, metadata={"layer": 5, "site": "img", "model": "nano"})
    described = json.loads((folder / "cfg.json").read_text())
    del described["metadata"]["digest"]
    described["metadata"] |= changes.pop("metadata", {})
    (folder / "cfg.json").write_text(json.dumps(described | changes))
    return folder


def test_metadata_that_says_nothing(tmp_path):
    cfg = {"architecture": "topk", "k": K, "d_in": D, "d_sae": F}
    params = [checkpoint.load(write(tmp_path, cfg | more, weights()))[0] for more in ({}, {"metadata": None})]
    assert checkpoint.load_metadata(tmp_path) == {}
    for name in params[0]:
        np.testing.assert_array_equal(params[0][name], params[1][name])


@pytest.mark.parametrize("message, about", [
    ("metadata.training is \\[1\\]; need an object", {"training": [1]}),
    ("metadata.run is 'x'; need an object", {"run": "x"}),
    ("metadata.layer is '5'; need an integer", {"layer": "5"}),
    ("metadata.layer is True; need an integer", {"layer": True}),
    ("metadata.site is 3; need a string", {"site": 3}),
    ("metadata.model is {}; need a string", {"model": {}}),
    ("groups is \\[1, 2\\]; need tuple", {"training": {"groups": [1, 2]}}),
    ("groups is 'txt'; need tuple", {"training": {"groups": "txt"}}),
    ("lr is 'fast'; need float | None", {"training": {"lr": "fast"}}),
    ("decay is \\[1\\]; need tuple", {"training": {"decay": [1]}}),
    ("k_aux = 99 of 31 features", {"training": {"k_aux": 99}}),
    ("'../../out' is no name of a group", {"training": {"groups": ["txt", "../../out"]}}),
    ("'/tmp' is no name of a group", {"training": {"groups": ["txt", "/tmp"]}}),
    ("'' is no name of a group", {"training": {"groups": ["txt", ""]}}),
    ("'..' is no name of a group", {"training": {"groups": ["..", "img"]}}),
])
def test_metadata_of_wrong_types_is_one_line(tmp_path, message, about):
    folder = ours(tmp_path / "sae", metadata=about)
    for read in (checkpoint.load, checkpoint.load_groups, checkpoint.load_metadata):
        with pytest.raises(Mistake, match=message) as error:
            read(folder)
        assert str(folder / "cfg.json") in str(error.value) and "\n" not in str(error.value)


def test_metadata_that_is_no_object(tmp_path):
    for said in ("about", [], [1], 0, 3, True):
        with pytest.raises(Mistake, match="need an object"):
            checkpoint.load(write(tmp_path, old(metadata=said), weights()))


def test_group_names_do_not_leave_the_folder(tmp_path):
    """Neither when they are written."""
    with pytest.raises(Mistake, match="no name of a group"):
        sae.Config(d_in=D, features=F, k=K, groups=("a", "../../escaped"))
    cfg = sae.Config(d_in=D, features=F, k=K, groups=("a", "b"))
    object.__setattr__(cfg, "groups", ("a", "../b"))             # as a file that says so
    with pytest.raises(Mistake, match="no name of a group"):
        dataclasses.replace(cfg)


WRONG = (None, True, "", "x", "../x", 0, -1, 1.5, 10**400, float("nan"), [], [None], ["a", 3], {}, {"k": "x"}, [[1]])


@pytest.mark.parametrize("kind", ["ours", "old", "sparsify"])
def test_any_value_anywhere_is_one_line_or_loads(tmp_path, kind):
    """Each value of cfg.json in turn replaced by each wrong one, and two at once; never another error than Mistake."""
    if kind == "ours":
        folder = ours(tmp_path, metadata={"run": {"size": 64}})
    else:
        cfg, arrays = (sparsify(), sparsify_weights()) if kind == "sparsify" else (old(), weights())
        folder = write(tmp_path, cfg, arrays, "sae.safetensors" if kind == "sparsify" else "sae_weights.safetensors")
    path, r = folder / "cfg.json", random.Random(0)
    whole, loads = json.loads(path.read_text()), 0
    places = [(name,) for name in whole] + [("metadata", name) for name in whole.get("metadata", {})] + [
        ("metadata", "training", name) for name in whole.get("metadata", {}).get("training", {})]
    tries = [[(place, value)] for place in places for value in WRONG]
    tries += [[(r.choice(places), r.choice(WRONG)) for _ in range(2)] for _ in range(100)]
    for changes in tries:
        changed = copy.deepcopy(whole)
        for place, value in changes:
            inner = changed
            for name in place[:-1]:
                inner = inner.get(name) if isinstance(inner, dict) else None
            if isinstance(inner, dict):
                inner[place[-1]] = value
        path.write_text(json.dumps(changed))
        try:
            checkpoint.load_metadata(folder)
            checkpoint.load(folder)
            loads += 1
        except Mistake as error:
            assert str(folder) in str(error) and "\n" not in str(error)
    assert 0 < loads < len(tries)


def test_init_takes_them(tmp_path):
    """train.py --init: k and activation are those of the SAE, and training begins from what it does."""
    def unit(arrays):                                            # as training keeps decoder rows
        return arrays | {"W_dec": arrays["W_dec"] / np.linalg.norm(arrays["W_dec"], axis=1, keepdims=True)}

    gated = unit(weights(b_gate=(F,), b_mag=(F,), r_mag=(F,), b_enc=None))
    write(tmp_path / "old", old(activation_fn_str="topk", activation_fn_kwargs={"k": K}), unit(weights()))
    write(tmp_path / "sparsify", sparsify(), unit(sparsify_weights()), "sae.safetensors")
    write(tmp_path / "gated", old(architecture="gated"), gated)
    for name, expected in {"old": ("topk", K, F), "sparsify": ("topk", K, F), "gated": ("jumprelu", F, F)}.items():
        found = recipe.inherited({"init": str(tmp_path / name)}, D)
        assert (found["activation"], found["k"], found["features"]) == expected
        cfg = sae.Config(d_in=D, features=F, k=found["k"], activation=found["activation"], normalization="scale")
        params, state = checkpoint.load(tmp_path / name)[0], sae.init(jax.random.key(0), cfg, normal(200, D))
        again, x = sae.fold(sae.unfold(params, cfg, state), cfg), normal(50, D, seed=3)
        np.testing.assert_allclose(apply.splice(again, cfg, x), apply.splice(params, cfg, x), atol=1e-4)
