"""Time what other libraries do on the same card: the peers' stages of `gpu.py`. PyTorch is imported only there."""
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import stages
from stages import Job, cell, tell


def device() -> str:
    """Return the name of PyTorch's device."""
    import torch
    return "cuda" if torch.cuda.is_available() else "cpu"


def measure(jobs: list[Job], sizes: Any) -> None:
    """Tell the time of each job, one after another."""
    import torch
    stages.measure(jobs, lambda _: torch.cuda.synchronize() if device() == "cuda" else None, sizes.rounds, together=1)


@contextmanager
def half():
    """Create new tensors on the device and in bfloat16."""
    import torch
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device()):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------- FLUX.1 and T5


def flux(sizes: Any) -> None:
    """Time diffusers' blocks, as they are and compiled one by one (`compile_repeated_blocks`)."""
    import torch
    from diffusers import FluxTransformer2DModel
    capture, whole = asdict(sizes.flux) | {"num_single_layers": 0}, asdict(sizes.flux)
    rows = [(sizes.captured(batch), batch, sizes.side) for batch in sizes.batches]
    for config, each in ((capture, rows), (whole, [(sizes.whole, 1, sizes.large)])):
        with cell("FLUX.1 and T5", each[0][0], "diffusers"), torch.no_grad():
            with half():
                model = FluxTransformer2DModel(**config).eval()
                calls = [(row, partial(model, **inputs(sizes, batch, side), return_dict=False))
                         for row, batch, side in each]
            measure([Job("FLUX.1 and T5", row, "diffusers", call) for row, call in calls], sizes)
            # Dynamic shapes would make the second batch size slower
            model.compile_repeated_blocks(fullgraph=True, dynamic=False,
                                          backend="inductor" if device() == "cuda" else "eager")
            measure([Job("FLUX.1 and T5", row, "diffusers, compiled", call) for row, call in calls], sizes)
        model = calls = None
        if device() == "cuda":
            torch.cuda.empty_cache()


def inputs(sizes: Any, batch: int, side: int) -> dict[str, Any]:
    """Return the arguments of diffusers' transformer."""
    import torch
    cfg = sizes.flux
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return {"hidden_states": torch.randn(batch, side ** 2, cfg.in_channels), "timestep": torch.ones(batch),
            "encoder_hidden_states": torch.randn(batch, sizes.text_tokens, cfg.joint_attention_dim),
            "pooled_projections": torch.randn(batch, cfg.pooled_projection_dim),
            "img_ids": torch.stack([0 * rows, rows, columns], -1).reshape(-1, 3).to(torch.bfloat16),
            "txt_ids": torch.zeros(sizes.text_tokens, 3)}


def t5(sizes: Any) -> None:
    """Time transformers' T5 encoder."""
    import torch
    from transformers import T5Config, T5EncoderModel
    with half():
        model = T5EncoderModel(T5Config(**asdict(sizes.t5))).eval()
        calls = [(batch, partial(model, torch.randint(sizes.t5.vocab_size, (batch, sizes.text_tokens))))
                 for batch in sizes.batches]
    with torch.no_grad():
        measure([Job("FLUX.1 and T5", f"T5-XXL, batch {batch}", "transformers", call) for batch, call in calls], sizes)


# ---------------------------------------------------------------- SAE


def saes(sizes: Any) -> None:
    """Time a training step of sparsify (Triton kernels; the product in bfloat16) and of a plain dense SAE in TF32, both
    with PyTorch's fused Adam. In its first steps sparsify takes no feature for dead."""
    import torch
    torch.set_float32_matmul_precision("high")                   # as sparsify's trainer does
    table, last = f"SAE step, D {sizes.width}", "as none dead"
    for size in sizes.saes:
        tokens, features, k = size
        with torch.device(device()):
            x = torch.randn(tokens, 64) @ torch.randn(64, sizes.width) / 8 + torch.randn(tokens, sizes.width) / 2
            masks = {"none dead": None, "1 % dead": torch.arange(features) % 100 == 0}
        for column, make in {"sparsify": sparsify, "dense torch, TF32": dense}.items():
            for phase, mask in masks.items():
                with cell(table, f"{sizes.sae(*size)}, {phase}", column):
                    with torch.device(device()):
                        call = make(x, features, k, mask)
                    measure([Job(table, f"{sizes.sae(*size)}, {phase}", column, call)], sizes)
                call = None
            tell(table, f"{sizes.sae(*size)}, first steps", column, last)


def sparsify(x: Any, features: int, k: int, dead: Any) -> Callable:
    """Return a step of sparsify's SparseCoder, as its Trainer does it."""
    import torch
    from sparsify import SparseCoder, SparseCoderConfig
    model = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=features, k=k), x.device, torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, fused=True)
    since = torch.zeros(features, dtype=torch.long)

    def step():
        model.set_decoder_norm_to_unit_norm()
        out = model(x, dead_mask=dead)
        (out.fvu + out.auxk_loss / 32).backward()
        model.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        fired = torch.zeros(features, dtype=torch.bool, device=x.device)
        fired[out.latent_indices.flatten()] = True
        since.add_(len(x)).masked_fill_(fired, 0)

    return step


def dense(x: Any, features: int, k: int, dead: Any) -> Callable:
    """Return a step of a TopK SAE as one writes it first in PyTorch: products with [B, F] arrays of zeros."""
    import torch
    dec = torch.nn.functional.normalize(torch.randn(features, x.shape[1]), dim=1)
    enc, b_enc, b_dec = dec.clone(), torch.zeros(features), torch.zeros(x.shape[1])
    weights = [array.requires_grad_() for array in (enc, dec, b_enc, b_dec)]
    optimizer = torch.optim.Adam(weights, lr=2e-4, fused=True)
    variation = (x - x.mean(0)).square().sum()

    def largest(pre, k):
        values, indices = pre.topk(k)
        return torch.zeros_like(pre).scatter(1, indices, values)

    def step():
        pre = torch.addmm(b_enc, x - b_dec, enc.T).relu()
        error = x - largest(pre, k) @ dec - b_dec
        loss = error.square().sum()
        if dead is not None:
            columns = dead.nonzero()[:, 0]
            aux = largest(pre[:, columns], min(512, len(columns))) @ dec[columns]
            loss = loss + (error.detach() - aux).square().sum() / 32
        (loss / variation).backward()
        with torch.no_grad():
            dec.grad -= (dec.grad * dec).sum(1, keepdim=True) * dec
            optimizer.step()
            dec.div_(dec.norm(dim=1, keepdim=True))
        optimizer.zero_grad()

    return step
