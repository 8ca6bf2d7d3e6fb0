"""The transformer against diffusers' FluxTransformer2DModel, in float32, on random models of awkward shapes."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.numpy import load_file, save_file

import flux

# double, single, heads, head width, rope axes, guidance, (rows, columns), text tokens, batch
CASES = [
    (1, 2, 3, 16, (4, 6, 6), False, (4, 4), 7, 2),
    (3, 1, 1, 24, (8, 8, 8), True, (3, 5), 1, 1),
    (2, 3, 5, 8, (2, 2, 4), True, (6, 2), 19, 3),
    (1, 1, 2, 32, (4, 14, 14), False, (1, 7), 32, 1),
    (2, 0, 3, 16, (4, 6, 6), False, (2, 2), 5, 2),
]


def random_transformer(case, seed=0, joint=20, pooled=12, channels=8):
    double, single, heads, width, axes, guidance = case[:6]
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        in_channels=channels, num_layers=double, num_single_layers=single, attention_head_dim=width,
        num_attention_heads=heads, joint_attention_dim=joint, pooled_projection_dim=pooled, guidance_embeds=guidance,
        axes_dims_rope=axes).eval()
    with torch.no_grad():                                        # random norms and biases too: defaults hide mistakes
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def random_inputs(case, seed=0, joint=20, pooled=12, channels=8):
    guidance, (rows, columns), T, B = case[5:]
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    return {"latents": draw(B, rows * columns, channels), "text": draw(B, T, joint), "pooled": draw(B, pooled),
            "timestep": rng.random(B, dtype=np.float32),
            "guidance": 1 + 4 * rng.random(B, dtype=np.float32) if guidance else None}


def theirs(model, inputs, grid):
    ids = torch.zeros(*grid, 3)
    ids[..., 1] += torch.arange(grid[0])[:, None]
    ids[..., 2] += torch.arange(grid[1])[None]
    x = {k: None if v is None else torch.from_numpy(v) for k, v in inputs.items()}
    with torch.no_grad():
        return model(hidden_states=x["latents"], encoder_hidden_states=x["text"], pooled_projections=x["pooled"],
                     timestep=x["timestep"], guidance=x["guidance"], img_ids=ids.reshape(-1, 3),
                     txt_ids=torch.zeros(x["text"].shape[1], 3)).sample.numpy()


def error(a, b):
    return np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("case", CASES)
def test_velocity_matches_diffusers(case, tmp_path):
    model, inputs = random_transformer(case), random_inputs(case)
    model.save_pretrained(tmp_path)
    cfg, params = flux.load_transformer(tmp_path, dtype=jnp.float32)
    ours = jax.jit(flux.velocity, static_argnames=("cfg", "grid"))(params, cfg, **inputs, grid=case[6])
    assert error(ours, theirs(model, inputs, case[6])) <= 1e-4
