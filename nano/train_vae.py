"""Train the image autoencoder of the nano family: python nano/train_vae.py --work DIR --minutes 20 --out nano/vae

It renders scenes with all cores (once, into DIR/scenes), trains diffusers' `AutoencoderKL` on them for a given time,
and writes --out as a diffusers `vae/` folder. The weights are a moving average in bfloat16; scale and shift give the
latents mean 0 and standard deviation 1. A second run with the same DIR resumes; delete DIR/vae to begin anew.

Seeds 0 to 9,999 are held out; training uses seeds from 1,000,000 on. The loss is the error of pixels and of their
differences, and a small KL term that keeps the latents bounded. Most of an image is flat, and corners are what a viewer
sees: pixels near edges of the true image count WEIGHT times as much, and each crop is the one with the most edges of
CANDIDATES random ones. The posterior is sampled and more noise is added, so that the decoder tolerates the errors of a
small diffusion model.

Why torch and not our own vae.py: measured on two Xeon cores with AMX (jax 0.10.2, torch 2.13), forward and backward of
block_out_channels (16, 32, 64, 96) take these CPU seconds per 128x128 image, with one thread each:
    JAX, float32                                    0.19-0.22
    torch, float32, channels_last                   0.08-0.10
    torch, bfloat16 autocast, channels_last         0.07-0.08
(one resnet block of 32 channels at 128x128 alone: JAX 0.94 s float32, 1.65 s bfloat16; torch 0.99 s and 0.85 s). On a
CPU, threads that each take a part of the batch keep the cores busier than torch's own threads, which wait for each
other after every operation. A GPU takes one batch of 128. Not every CPU has bfloat16: --float32 turns it off.
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
FIRST_SEED, SHARD, SIZE, CHANNELS = 1_000_000, 5_000, 128, 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THREADS, TIMES = (os.cpu_count() or 1, 1) if DEVICE == "cpu" else (1, 8)         # a GPU's batches are TIMES as large
KL, EXTRA_NOISE, EDGES = 1e-4, 0.05, 0.5                         # weight, standard deviation, weight
WEIGHT, CANDIDATES = 8, 3
PEAK, WARMUP, AVERAGE = 2e-3, 100, 0.998                         # learning rate, its steps, and the weights' decay
# Stages: until this part of the budget, side of the random crops, images a step. Crops make steps cheap at first.
STAGES = ((0.55, 64, 16), (1.0, SIZE, 8))


def model():
    """FLUX's layout, but small: 8 times smaller latents of CHANNELS channels, no 1x1 convolutions around them."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96), layers_per_block=1, norm_num_groups=4, latent_channels=CHANNELS,
        use_quant_conv=False, use_post_quant_conv=False, sample_size=SIZE, force_upcast=False,
    ).to(DEVICE, memory_format=torch.channels_last)


def shards(folder, count):
    """Files of images uint8 [5000, 128, 128, 3] of `count` scenes or more, rendered where they are missing or old."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"images_{start}.npy" for start in range(FIRST_SEED, FIRST_SEED + count, SHARD)]
    for path, start in zip(paths, range(FIRST_SEED, FIRST_SEED + count, SHARD)):
        if not current(path, start):
            images = scenes.batch(range(start, start + SHARD), SIZE, os.cpu_count()).images
            with open(folder / f".{path.name}", "wb") as file:
                np.save(file, images)
            os.replace(folder / f".{path.name}", path)
    return paths


def current(path, start):
    """Whether the shard exists and its first image is what scenes.py draws now: captions would not fit another's."""
    return path.exists() and np.array_equal(np.load(path, mmap_mode="r")[0], scenes.batch([start], SIZE).images[0])


def tensor(pixels):
    """uint8 [N, H, W, 3] → float32 [N, 3, H, W] in -1…1, with the channels last in memory."""
    return torch.from_numpy(pixels).to(DEVICE).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def crops(data, side, count, rng):
    """`count` crops of `data`, each the one with the most edges of some random ones, half of them mirrored."""
    out = np.empty((count, side, side, 3), np.uint8)
    for i, indices in enumerate(rng.integers(len(data), size=(count, 1 if side == SIZE else CANDIDATES))):
        places = [(index, *rng.integers(SIZE - side + 1, size=2)) for index in indices]
        some = [data[index, y:y + side, x:x + side] for index, y, x in places]
        best = max(some, key=lambda crop: np.abs(np.diff(crop[::2, ::2, 1].astype(np.int16), axis=1)).sum())
        out[i] = best[:, ::rng.choice((-1, 1))]
    return tensor(out)


def near_edges(x):
    """Weights [N, 1, H, W] of the pixels of images x [N, 3, H, W]: WEIGHT within two pixels of an edge, else 1."""
    down, across = x.diff(dim=2, prepend=x[:, :, :1]), x.diff(dim=3, prepend=x[..., :1])
    steep = (down.abs() + across.abs()).sum(1, keepdim=True) > 0.15
    return 1 + (WEIGHT - 1) * torch.nn.functional.max_pool2d(steep.float(), 5, 1, 2)


def loss(vae, x, seed, bfloat16):
    """Scalar for images x [N, 3, H, W]."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=bfloat16):
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=DEVICE)
        z = posterior.sample(generator) + EXTRA_NOISE * noise
        error = vae.decode(z).sample.float() - x
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    weight = near_edges(x)
    return (weight * (error.abs() + 2 * error ** 2)).mean() / weight.mean() + EDGES * edges + KL * kl


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
        y = y.clamp(-1, 1).add(1).mul(127.5).round().permute(0, 2, 3, 1).cpu().numpy()
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
            parts.setdefault(key, {})[name_of] = file.get_tensor(name).to(DEVICE)
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
            x = crops(data, side, TIMES * count, np.random.default_rng((1, step)))
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


def latents(folder, work, count):
    """Files in work/latents of packed latents [5000, 64, 4 CHANNELS] float16, as a flow model sees them, of `count`
    scenes or more. Each shard of images is encoded once."""
    vae = AutoencoderKL.from_pretrained(folder).to(DEVICE, memory_format=torch.channels_last)

    @torch.no_grad()                                             # holds for a thread alone
    def encoded(pixels):
        with torch.autocast(DEVICE, torch.bfloat16):
            z = vae.encode(tensor(pixels)).latent_dist.mode().float()
        z = (z - vae.config.shift_factor) * vae.config.scaling_factor
        n, c, h, w = z.shape
        z = z.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)
        return z.half().cpu().numpy()

    targets = []
    for path in shards(work / "scenes", count):
        target = work / "latents" / path.name
        if not target.exists() or target.stat().st_mtime < path.stat().st_mtime:   # of other images by now
            images = np.load(path)
            with ThreadPoolExecutor(THREADS) as pool:
                part = np.concatenate(list(pool.map(encoded, np.array_split(images, len(images) // 50))))
            target.parent.mkdir(exist_ok=True)
            np.save(target, part)
            log(work / "vae", f"{target.name}: latents of standard deviation {part.astype(np.float32).std():.3f}")
        targets.append(target)
    return targets


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
    data = np.concatenate([np.load(path) for path in shards(work / "scenes", count)])[:count]
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
