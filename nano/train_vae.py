"""Train the nano model's image autoencoder: python nano/train_vae.py --work DIR --minutes 20 --out nano/vae

Renders scenes (once, into DIR/scenes), trains diffusers' `AutoencoderKL` on them within a budget of wall time, and
writes --out as a diffusers `vae/` folder: an average of the weights in bfloat16, with the scale and shift that give the
latents mean 0 and standard deviation 1. Started again with the same DIR it resumes; delete DIR/vae to begin anew.

Seeds 0…9,999 are held out and never trained on; training uses 1,000,000 and up. The loss is the error of pixels and of
their differences, and a KL term so small that it only keeps the latents bounded. The posterior is sampled and further
noise added, so that the decoder forgives the errors of a small diffusion model.

Why torch and not our own vae.py: measured on two Xeon cores with AMX (jax 0.10.2, torch 2.13), forward and backward of
block_out_channels (16, 32, 64, 96) cost these CPU seconds per 128x128 image, one thread each:
    JAX, float32                                    0.19-0.22
    torch, float32, channels_last                   0.08-0.10
    torch, bfloat16 autocast, channels_last         0.07-0.08
(one resnet block of 32 channels at 128x128 alone: JAX 0.94 s float32, 1.65 s bfloat16; torch 0.99 s and 0.85 s). Two
threads that each take half a batch keep both cores busier than torch's own threads, which wait for each other after
every operation while other jobs run. Not every CPU has bfloat16: --float32 turns it off.
"""
import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")                    # parallel over half batches instead, see above

import numpy as np
import scenes
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).parent
FIRST_SEED, SHARD, SIZE, THREADS = 1_000_000, 5_000, 128, 2
KL, EXTRA_NOISE, EDGES = 1e-4, 0.1, 0.5                          # weight, standard deviation, weight
PEAK, WARMUP, AVERAGE = 2e-3, 100, 0.998                         # learning rate, its steps, and the weights' decay
# Stages: until this part of the budget, side of the random crops, images a step. Crops make steps cheap at first.
STAGES = ((0.55, 64, 16), (1.0, SIZE, 8))


def model():
    """Small, but FLUX's layout: 8x smaller latents of 16 channels, no 1x1 convolutions around them."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96), layers_per_block=1, norm_num_groups=4, latent_channels=16,
        use_quant_conv=False, use_post_quant_conv=False, sample_size=SIZE, force_upcast=False,
    ).to(memory_format=torch.channels_last)


def images(folder, count):
    """uint8 [count, 128, 128, 3], rendered where a shard of 5,000 is not in `folder` yet or is not today's."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for start in range(FIRST_SEED, FIRST_SEED + count, SHARD):
        path = folder / f"images_{start}.npy"
        if not current(path, start):
            parts = [scenes.batch(range(i, i + 1000), SIZE).images for i in range(start, start + SHARD, 1000)]
            with open(folder / f".{path.name}", "wb") as file:
                np.save(file, np.concatenate(parts))
            os.replace(folder / f".{path.name}", path)
        shards.append(np.load(path))
    return np.concatenate(shards)[:count]


def current(path, start):
    """Whether the shard exists and its first image is what scenes.py draws now: captions would not fit another's."""
    return path.exists() and np.array_equal(np.load(path, mmap_mode="r")[0], scenes.batch([start], SIZE).images[0])


def tensor(pixels):
    """uint8 [N, H, W, 3] → float32 [N, 3, H, W] in -1…1, with the channels last in memory."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def crops(data, side, count, rng):
    """`count` random crops of `data`, half of them mirrored."""
    out = np.empty((count, side, side, 3), np.uint8)
    for i, index in enumerate(rng.integers(len(data), size=count)):
        y, x = rng.integers(SIZE - side + 1, size=2)
        out[i] = data[index, y:y + side, x:x + side][:, ::rng.choice((-1, 1))]
    return tensor(out)


def loss(vae, x, seed, bfloat16):
    """Scalar for images x [N, 3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        posterior = vae.encode(x).latent_dist
        z = posterior.sample(generator) + EXTRA_NOISE * torch.randn(posterior.mean.shape, generator=generator)
        error = vae.decode(z).sample.float() - x
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2 * (error ** 2).mean() + EDGES * edges + KL * kl


def gradients(vae, parameters, x, seed, bfloat16, pool):
    """Mean loss, and its gradient in every parameter's `.grad`: each thread computes its part of the batch."""
    def part(args):
        value = loss(vae, args[1], 1000 * seed + args[0], bfloat16)
        return value.item(), torch.autograd.grad(value, parameters)

    values, parts = zip(*pool.map(part, enumerate(x.chunk(THREADS))))
    for parameter, *grads in zip(parameters, *parts):
        parameter.grad = sum(grads) / len(grads)
    return sum(values) / len(values)


def rate(step, progress):
    """Learning rate: linear warm-up over steps, then a cosine over the budget of time."""
    return PEAK * min(1, (step + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * min(progress, 1))))


@torch.no_grad()
def psnr(vae, pixels, dtype=torch.float32):
    """Mean over images of the peak signal-to-noise ratio in dB, of reconstructions rounded to uint8."""
    vae = vae.to(dtype)
    values = []
    for i in range(0, len(pixels), 16):
        x = tensor(pixels[i:i + 16])
        y = vae.decode(vae.encode(x.to(dtype)).latent_dist.mode()).sample.float()
        y = y.clamp(-1, 1).add(1).mul(127.5).round().permute(0, 2, 3, 1).numpy()
        values.extend(10 * np.log10(255 ** 2 / ((y - pixels[i:i + 16]) ** 2).mean((1, 2, 3))))
    return float(np.mean(values))


def save_state(path, vae, average, optimizer, step, seconds):
    """Everything a resumed run needs, in one safetensors file that appears complete."""
    state = {f"weights/{name}": value for name, value in vae.state_dict().items()}
    state |= {f"average/{name}": value for name, value in average.state_dict().items()}
    for name, parameter in vae.named_parameters():
        state |= {f"{key}/{name}": value for key, value in optimizer.state[parameter].items()}
    temporary = path.with_name(f".{path.name}")
    save_file({name: value.contiguous() for name, value in state.items()}, temporary,
              metadata={"step": str(step), "seconds": str(seconds)})
    os.replace(temporary, path)


def load_state(path, vae, average, optimizer):
    """The inverse of `save_state`; returns step and seconds, zeros where there is no file yet."""
    if not path.exists():
        return 0, 0.0
    with safe_open(path, "pt") as file:
        parts = {}
        for name in file.keys():                                 # noqa: SIM118 (not a dict)
            key, _, name_of = name.partition("/")
            parts.setdefault(key, {})[name_of] = file.get_tensor(name)
        vae.load_state_dict(parts.pop("weights"))
        average.load_state_dict(parts.pop("average"))
        for name, parameter in vae.named_parameters():
            optimizer.state[parameter] = {key: values[name] for key, values in parts.items()}
        return int(file.metadata()["step"]), float(file.metadata()["seconds"])


def train(work, data, held_out, minutes, bfloat16):
    """Train until the budget is used up, writing state and log every two minutes; returns the averaged model."""
    torch.manual_seed(0)
    vae, average = model(), model()
    average.load_state_dict(vae.state_dict())
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=PEAK, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    step, spent = load_state(work / "state.safetensors", vae, average, optimizer)
    started, saved, recent = time.time() - spent, time.time(), []
    with ThreadPoolExecutor(THREADS) as pool:
        while (progress := (time.time() - started) / (60 * minutes)) < 1:
            _, side, count = next(stage for stage in STAGES if progress <= stage[0])
            x = crops(data, side, count, np.random.default_rng((1, step)))
            recent.append(gradients(vae, parameters, x, step, bfloat16, pool))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.param_groups[0]["lr"] = rate(step, progress)
            optimizer.step()
            step += 1
            decay = min(AVERAGE, step / (step + 10))             # at first the average follows closely
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), parameters, 1 - decay)
            if time.time() - saved > 120:
                save_state(work / "state.safetensors", vae, average, optimizer, step, time.time() - started)
                log(work, f"{time.time() - started:6.0f} s  step {step}  side {side}  loss {np.mean(recent):.4f}  "
                          f"held-out PSNR {psnr(average, held_out[:48]):.2f}")
                saved, recent = time.time(), []
    save_state(work / "state.safetensors", vae, average, optimizer, step, time.time() - started)
    log(work, f"{time.time() - started:6.0f} s  step {step}  trained")
    return average


@torch.no_grad()
def export(vae, pixels, out):
    """Write the diffusers folder; scale and shift come from the latents of `pixels`. Returns them."""
    vae = vae.to(torch.bfloat16).float()                         # the weights that the file will hold
    latents = torch.cat([vae.encode(tensor(pixels[i:i + 16])).latent_dist.mode() for i in range(0, len(pixels), 16)])
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(scaling_factor=round(scale, 4), shift_factor=round(shift, 4))
    vae.to(torch.bfloat16).save_pretrained(out)
    return scale, shift, latents


def log(work, line):
    print(line, flush=True)
    with open(work / "log.txt", "a") as file:
        file.write(line + "\n")


def report(work, average, data, held_out, out):
    """Export, then measure what was written, in both dtypes, and how the latents look to a diffusion model."""
    before = psnr(average, held_out)
    scale, shift, latents = export(average, data[:1000], out)
    file = out / "diffusion_pytorch_model.safetensors"
    log(work, f"exported {out}: {file.stat().st_size / 1e6:.2f} MB, scaling_factor {scale:.4f}, "
              f"shift_factor {shift:.4f}")
    written = AutoencoderKL.from_pretrained(out)
    log(work, f"held-out PSNR over {len(held_out)} scenes: {before:.2f} dB as trained, "
              f"{psnr(written, held_out):.2f} dB as written, "
              f"{psnr(written, held_out, torch.bfloat16):.2f} dB in bfloat16 arithmetic")
    spread = latents.std((0, 2, 3)) * scale
    near = latents * scale - shift * scale
    smooth = (near.diff(dim=3) ** 2).mean().item() / 2
    log(work, f"latents: channels' standard deviations {spread.min():.2f}…{spread.max():.2f}, largest value "
              f"{near.abs().max():.1f}, correlation of neighbours {1 - smooth:.2f}")


def main(work=HERE / "work", out=HERE / "vae", minutes=20.0, count=20_000, bfloat16=True):
    """Render, train (or resume) and export; returns nothing, `work`/vae/log.txt says how it went."""
    work, out = Path(work), Path(out)
    (work / "vae").mkdir(parents=True, exist_ok=True)
    held_out = scenes.batch(range(256), SIZE).images
    data = images(work / "scenes", count)
    average = train(work / "vae", data, held_out, minutes, bfloat16)
    report(work / "vae", average, data, held_out, out)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for scenes, state and log")
    parser.add_argument("--out", type=Path, default=HERE / "vae", help="the diffusers folder to write")
    parser.add_argument("--minutes", type=float, default=20, help="training time; rendering comes on top")
    parser.add_argument("--images", type=int, default=20_000, dest="count", help="scenes to render and train on")
    parser.add_argument("--float32", action="store_false", dest="bfloat16", help="do not train in bfloat16")
    return vars(parser.parse_args())


if __name__ == "__main__":
    main(**arguments())
