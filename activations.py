"""Run the model on prompts, and shuffle one layer's activations into batches for SAE training.

Copy it with `data.py`, `shard.py` and what these import. `run` is a `recipe.Run`:

    stream = activations.Activations(run, model, data.stream("captions.txt"))
    if stream.ready(step):
        x = stream.batch(step)                                   # [batch, D]; a step always gets the same batch
"""
import collections
import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import data
import flux
import shard
from data import DRAWN, TABLE
from weights import Mistake


class Activations:
    """Give batches of shuffled activations [batch, columns], one per step. A step always gets the same batch.

    Memory holds two chunks: training steps read one while forward passes fill the other. Each pass is sent before the
    result of the pass before it is fetched, so the accelerator works while the host tokenizes, copies and shuffles.
    The step number and the prompts alone decide which passes run before a step, so that several hosts send the same
    programs in the same order. Without padding, passes give different numbers of tokens: the last pass fills the chunk,
    and its remaining tokens are dropped. run: a `recipe.Run`. mesh: several devices, as for `train.train`.
    """

    def __init__(self, run, model: flux.Model, prompts: Iterator[str], mesh: Mesh | None = None):
        self.run, self.model, self.prompts, self.mesh = run, model, prompts, mesh
        self.grid = flux.token_grid(model, run.size)
        lengths = {"img": self.grid[0] * self.grid[1], "txt": run.text_tokens}
        images, tokens = run.prompt_batch * run.seeds_per_prompt, sum(lengths[s] for s in flux.SITES[run.site])
        self.all_taken = run.padding or run.site == "img"
        self.forward_tokens = run.timesteps * images * tokens
        self.forwards = -(-max(run.buffer, run.batch) // self.forward_tokens)          # per chunk; more without padding
        self.tokens = self.forwards * self.forward_tokens        # per chunk
        self.batches = self.tokens // run.batch
        self.chunks = -(-run.steps // self.batches)
        self.layers = [run.layer] + ([run.transcoder] if run.transcoder is not None else [])
        parts = flux.token_groups(run.site, run.timesteps, run.text_tokens)
        self.groups = tuple(name for name, *_ in parts) if len(parts) > 1 else ()
        pattern = np.zeros((run.timesteps, images, tokens), np.int32)
        for g, (_, t, part) in enumerate(parts):
            pattern[t, :, part] = g
        self.pattern = pattern.reshape(-1)                       # group of each token of a pass
        self.rows = np.empty((2, self.tokens, len(self.layers) * model.cfg.width), jnp.dtype(run.dtype))
        self.group = np.zeros((2, self.tokens), np.int32)        # group of each token in rows
        self.flatten = jax.jit(partial(flat_and_finite, dtype=self.rows.dtype),
                               out_shardings=shard.everywhere(mesh) if mesh else None)
        self.stored, self.passes = 0, None                       # tokens stored so far; a generator that stores more
        self.starts = {}                                         # chunk → number of its first prompt

    def seek(self, chunk: int, first: int | None = None) -> None:
        """Start at a chunk, whose first prompt has the number `first` (required if the run leaves padding out)."""
        first = chunk * self.forwards * self.run.prompt_batch if first is None else first
        collections.deque(itertools.islice(self.prompts, first), 0)
        self.starts = {chunk: first}
        self.stored, self.passes = chunk * self.tokens, self._fetched(self._sent(chunk, first))

    def ready(self, step: int, stop: Callable = lambda: False, bar: Any = None) -> bool:
        """Fetch the tokens of `step` and its share of the next chunk. Return False if stop() became true first.
        Ask for steps in rising order, because the prompts are a stream. bar: a tqdm bar that shows the progress."""
        if self.passes is None:
            self.seek(step // self.batches)
        wanted = min(self.tokens + step * self.tokens // self.batches, self.chunks * self.tokens)
        while self.stored < wanted:
            if stop():
                return False
            if bar and self.stored < (step // self.batches + 1) * self.tokens:
                bar.set_description(f"harvest {self.stored % self.tokens / self.tokens:.0%}")
            self.stored += next(self.passes)
        return True

    def batch(self, step: int) -> np.ndarray:
        """Return the activations [batch, columns] of a step that is `ready`."""
        return self.rows[self.places(step)]

    def groups_of(self, places: tuple[int, np.ndarray]) -> np.ndarray | None:
        """Return the groups of the tokens at these places, or None if there is only one group."""
        return self.group[places] if self.groups else None

    def places(self, step: int) -> tuple[int, np.ndarray]:
        """Return the index into `rows` of the tokens of a step."""
        first = step % self.batches * self.run.batch
        half, order = self.order(step // self.batches)
        return half, order[first:first + self.run.batch]

    def order(self, chunk: int) -> tuple[int, np.ndarray]:
        """Return (half of `rows`, places there [tokens]) of a chunk, in training order."""
        return chunk % 2, shuffled(self.run.seed, chunk, self.tokens)

    def place(self, step: int) -> dict[str, np.ndarray]:
        """Return what a checkpoint before this step must keep for `seek`."""
        return {"position": np.array(self.starts[step // self.batches])}

    def _sent(self, chunk, first):
        """Send the passes of this chunk and the following ones. Yield (places in rows, tokens to take, result of
        `send`). first: the number of the chunk's first prompt."""
        for number in range(chunk, self.chunks):
            self.starts[number], done = first, 0
            while done < self.tokens:
                some = list(itertools.islice(self.prompts, self.run.prompt_batch))
                taken, count = self.tokens_of(some, self.tokens - done)
                sent = self.send(some, first * self.run.seeds_per_prompt, TABLE, f"for step {number * self.batches} on")
                yield (number % 2, slice(done, done + count)), taken, sent
                first, done = first + len(some), done + count
        self.starts[self.chunks] = first                         # for a run that is extended

    def _fetched(self, passes):
        """Store the results of `_sent`, and yield the number of tokens of each pass."""
        for (places, taken, sent), _ in pairwise(itertools.chain(passes, [None])):
            rows = self.fetch(sent)[taken]
            self.rows[places], self.group[places] = rows, self.pattern[taken]
            yield len(rows)

    def tokens_of(self, prompts: list[str], room: int) -> tuple[slice | np.ndarray, int]:
        """Return (which tokens of a pass to take, how many): the first ones, at most `room`."""
        if self.all_taken:
            return slice(room), min(room, self.forward_tokens)
        real = data.real_tokens(self.model, prompts, self.run.site, self.run.text_tokens, self.grid[0] * self.grid[1])
        real = real.repeat(self.run.seeds_per_prompt, 0)
        taken = np.flatnonzero(np.broadcast_to(real, (self.run.timesteps, *real.shape)))[:room]
        return taken, len(taken)

    def start(self, prompts: list[str], first: int, crossed: bool = False) -> flux.Start:
        """Return the `flux.Start` of a pass. Its noises have the numbers `first`, first + 1, …; if `crossed`, every
        prompt has the same ones."""
        run, (rows, columns), seeds = self.run, self.grid, self.run.seeds_per_prompt
        levels = flux.sigmas(self.model.scheduler, run.timesteps, rows * columns)
        numbers = np.tile(np.arange(seeds), len(prompts)) if crossed else np.arange(len(prompts) * seeds)
        return data.beginning(self.model, prompts, numbers, levels, self.grid, run.seed, run.text_tokens, first)

    def send(self, prompts: list[str], first: int, end: int = DRAWN, purpose: str = "that were asked for",
             crossed: bool = False) -> tuple:
        """Start a forward pass over prompts without waiting. Give the result to `fetch`, which waits.

        first, crossed: as in `start`. Raise Mistake if a noise reaches the number `end`: other tools use those.
        """
        images = len(prompts) * self.run.seeds_per_prompt
        if first + images > end:
            raise Mistake(f"noise number {first + images:,} is too large for activations {purpose}, the last one is "
                          f"{end - 1:,}: reduce --steps or --seeds_per_prompt")
        return self._send(prompts, self.start(prompts, first, crossed), purpose)

    def _send(self, prompts, start, purpose):
        acts = [flux.capture(self.model, start, layer=layer, site=self.run.site) for layer in self.layers]
        acts, finite = shard.wait(self.mesh, self.flatten(acts))
        acts.copy_to_host_async()
        return prompts, purpose, acts, finite

    def crossed(self, prompts: list[str], seeds: int, first: int) -> Iterator[np.ndarray]:
        """Yield the activations [seeds, S, columns] of each prompt, all from the same noises, for `variance.Sums`. S:
        all positions of an image, timestep by timestep; those of padding are zero if the run leaves padding out.

        first: the number of the first noise."""
        run, size = self.run, self.run.prompt_batch
        each, tokens = run.seeds_per_prompt, self.forward_tokens // (run.timesteps * size * run.seeds_per_prompt)
        for i in range(0, len(prompts), size):
            some = (prompts[i:i + size] * size)[:size]           # one shape, one compile
            sent = [self.send(some, first + j, DRAWN, "of the analysis of variance", crossed=True)
                    for j in range(0, seeds, each)]
            rows = [self.fetch(one).reshape(run.timesteps, size, each, tokens, -1) for one in sent]
            rows = np.concatenate(rows, 2)[:, :, :seeds]
            rows = rows.transpose(1, 2, 0, 3, 4)                 # prompt, seed, timestep, token
            if not self.all_taken:
                real = data.real_tokens(self.model, some, run.site, run.text_tokens, self.grid[0] * self.grid[1])
                rows = rows * real[:, None, None, :, None]
            yield from rows.reshape(size, seeds, run.timesteps * tokens, -1)[:len(prompts) - i]

    def with_inputs(self, prompts: Iterator[str], count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (activations [n, columns], the latents [n, C] that the same image tokens read) of passes over
        `prompts`, up to `count` tokens."""
        whole = jax.jit(lambda x: x, out_shardings=shard.everywhere(self.mesh)) if self.mesh else lambda x: x
        for i in range(-(-count // self.forward_tokens)):
            some = list(itertools.islice(prompts, self.run.prompt_batch))
            start = self.start(some, i * self.run.prompt_batch * self.run.seeds_per_prompt)
            sent = self._send(some, start, "of the input's subspace")
            latents = np.asarray(shard.wait(self.mesh, whole(flux.inputs(self.model, start))), np.float32)
            yield self.fetch(sent), latents.reshape(-1, latents.shape[-1])

    def fetch(self, sent: tuple) -> np.ndarray:
        """Return the activations [forward_tokens, columns] of a pass. Raise Mistake with the prompt for NaN or Inf."""
        prompts, purpose, acts, finite = sent
        if not (finite := np.asarray(finite)).all():
            prompt = prompts[int(np.argmin(finite)) // self.run.seeds_per_prompt]
            raise Mistake(f"activations {purpose} hold NaN or Inf for the prompt {prompt!r}; no step used them")
        return np.asarray(acts)


@lru_cache(2)
def shuffled(seed: int, chunk: int, tokens: int) -> np.ndarray:
    """Return the places of a chunk's tokens in training order."""
    return np.random.default_rng((seed, chunk)).permutation(tokens)


def flat_and_finite(acts: list[jax.Array], dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """Join activations [timesteps, images, N, D] of each layer. Return (rows [..., layers x D], whether each image's
    values are all finite [images])."""
    acts = jnp.concatenate(acts, -1).astype(dtype)
    return acts.reshape(-1, acts.shape[-1]), jnp.isfinite(acts).all((0, 2, 3))
