"""Compile for GPUs that are not there, in a process of its own: `python tests/gpu.py h100 '[{"kernel": "topk", ...}]'`.

The wheels below are XLA's whole compiler for NVIDIA GPUs. They live in a folder of their own, which GPU_COMPILER names:
beside JAX they would disturb every program on a machine without a GPU. A folder of 850 MB, 260 MB to download:

    version=$(python -c "import jaxlib; print(jaxlib.__version__)")
    pip install --no-deps --target $GPU_COMPILER jax-cuda13-plugin==$version jax-cuda13-pjrt==$version \
        nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-runtime

An environment with jax[cuda13] has them too, and cuDNN, whose attention the blocks then use. Each job is a program of
bench/fit.py (`fit`, and optionally `gpus` and `weights`), or a kernel with the arguments of its function in KERNELS. A
line of JSON answers each: GiB of one GPU, the collectives and the custom calls in the program, the seconds it took; or
the compiler's error. The compiler has no GPU on which it could time algorithms, and sorts by a fallback.
"""
import json
import os
import re
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
GIB = 2 ** 30
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}      # set before jax is imported
COLLECTIVES = "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"


class Card(NamedTuple):
    """What the compiler asks of a GPU, and the bytes that programs may fill, as the CUDA driver tells them."""
    name: str
    capability: str
    multiprocessors: int
    memory: int
    bandwidth: float                                             # GB/s
    cache: int                                                   # MiB of L2
    clock: float                                                 # GHz


CARDS = {"h100": Card("NVIDIA H100 80GB HBM3", "9.0", 132, 84_942_979_072, 3352.3, 50, 1.98),
         "a100-80": Card("NVIDIA A100-SXM4-80GB", "8.0", 108, 85_100_068_864, 2039.0, 40, 1.41),
         "a100-40": Card("NVIDIA A100-SXM4-40GB", "8.0", 108, 42_331_013_120, 1555.2, 40, 1.41),
         "4090": Card("NVIDIA GeForce RTX 4090", "8.9", 128, 25_393_692_672, 1008.1, 72, 2.52),
         "3090": Card("NVIDIA GeForce RTX 3090", "8.6", 82, 25_430_786_048, 936.1, 6, 1.7),
         "l4": Card("NVIDIA L4", "8.9", 58, 23_659_151_360, 300.1, 48, 2.04),
         "t4": Card("Tesla T4", "7.5", 40, 15_828_320_256, 320.1, 4, 1.59)}
# Of each compute capability: KiB of shared memory a multiprocessor, threads there at once, float32 units
CAPABILITIES = {"7.5": (64, 1024, 64), "8.0": (164, 2048, 64), "8.6": (100, 1536, 128), "8.9": (100, 1536, 128),
                "9.0": (228, 2048, 128)}


def target(card):
    """Return XLA's description of a card, a GpuTargetConfigProto as text."""
    shared, threads, units = CAPABILITIES[card.capability]
    major, minor = card.capability.split(".")
    block = shared if card.capability == "7.5" else shared - 1   # KiB that one block may take
    newest = "feature_extension: ACCELERATED_FEATURES" if card.capability == "9.0" else ""
    return f"""gpu_device_info {{
        name: "{card.name}" device_vendor: "NVIDIA Corporation" device_address_bits: 64
        cuda_compute_capability {{ major: {major} minor: {minor} {newest} }}
        platform_version: "Compute Capability {card.capability}{'a' if newest else ''}"
        core_count: {card.multiprocessors} fpus_per_core: {units} clock_rate_ghz: {card.clock}
        threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {threads}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        shared_memory_per_core: {shared * 1024} shared_memory_per_block: 49152
        shared_memory_per_block_optin: {block * 1024}
        device_memory_size: {card.memory} l2_cache_size: {card.cache * 2 ** 20}
        memory_bandwidth: {card.bandwidth * 1e9:.0f}
        driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
        }} platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        device_description_str: "{card.name}" """


def installed():
    """Return whether the compiler is there."""
    folders = [os.environ.get("GPU_COMPILER"), *sys.path]
    return any((Path(folder) / "jax_plugins" / "xla_cuda13").is_dir() for folder in folders if folder)


def find():
    """Let JAX find the compiler in GPU_COMPILER. Call this before jax is imported: jax looks for cuDNN then."""
    os.environ |= ENVIRONMENT
    sys.path.extend([os.environ["GPU_COMPILER"]] if os.environ.get("GPU_COMPILER") else [])


@lru_cache
def devices(name, count=1):
    """Return so many GPUs of a card in CARDS, after `find`."""
    from jax.experimental import topologies
    if not installed():
        raise RuntimeError("no compiler for GPUs: set GPU_COMPILER, as tests/gpu.py says")
    return topologies.get_topology_desc(platform="cuda", topology_name=name, topology=f"1x1x{count}",
                                        target_config=target(CARDS[name])).devices


def run(name, jobs):
    """Return the answers to `jobs`, one after the other."""
    process = subprocess.Popen([sys.executable, __file__, name, json.dumps(jobs)], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    said, errors = process.communicate()
    answers = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    if process.returncode or len(answers) != len(jobs):
        raise RuntimeError(f"{len(answers)} of {len(jobs)} answers: {errors[-2000:]}")
    return answers


def main(name, jobs):
    for job in jobs:
        start, answer = time.time(), dict(job)
        try:
            answer |= described(compiled(*program(name, **job)))
        except Exception as error:
            answer["error"] = str(error).splitlines()[0][:300]
        print(json.dumps(answer | {"seconds": round(time.time() - start, 1)}), flush=True)


def compiled(function, arguments, donated=()):
    """Compile a function for the GPUs on which `arguments`, shapes with shardings, are."""
    import jax
    device = next(iter(jax.tree.leaves(arguments)[0].sharding.device_set))
    with jax.default_device(device):                             # from jax 0.11 on, Pallas asks it for the GPU's kind
        lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
    return lowered.compile()


def described(program):
    """Return GiB of one GPU, how often each collective stands in a compiled program, and its custom calls."""
    text, memory = program.as_text(), program.memory_analysis()
    calls = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in COLLECTIVES}
    return {"arguments": memory.argument_size_in_bytes / GIB, "temporaries": memory.temp_size_in_bytes / GIB,
            "outputs": (memory.output_size_in_bytes - memory.alias_size_in_bytes) / GIB,
            "collectives": {kind: count for kind, count in calls.items() if count},
            "calls": sorted(set(re.findall(r'custom_call_target="([^"]+)"', text)))}


def program(name, kernel=None, fit=None, gpus=1, weights="nf4", **options):
    """Return (function, shapes of its arguments, numbers of the donated ones) of a job."""
    import jax
    from jax.sharding import SingleDeviceSharding
    if fit:
        return fitted(name, fit, gpus, weights)
    function, shapes = KERNELS[kernel](**options)
    here = SingleDeviceSharding(devices(name)[0])
    return function, jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), shapes), ()


def fitted(name, label, gpus, weights):
    """Return what `program` does, for the first program of bench/fit.py whose label starts so."""
    import fit
    *_, function, arguments = next(fit.chosen(f"{name}-{gpus}:{weights}:{label}"))
    return function, arguments, fit.donated(function)


# ---------------------------------------------------------------- kernels: {name: function(...) → (function, shapes)}



def topk(B, F, k):
    import jax
    import jax.numpy as jnp

    import kernels_gpu
    return lambda x: kernels_gpu.topk(x, k), (jax.ShapeDtypeStruct((B, F), jnp.float32),)


def spmm(B, F, D, k):
    import jax
    import jax.numpy as jnp

    import kernels_gpu
    make = jax.ShapeDtypeStruct
    return (lambda values, indices, rows: kernels_gpu.spmm(values, indices, rows, kernels_gpu.cut(B, F, D)),
            (make((B, k), jnp.float32), make((B, k), jnp.int32), make((F, D), jnp.float32)))


def outer(B, F, D, k):
    """With sddmm, and with the sort before it."""
    import jax
    import jax.numpy as jnp

    import kernels_gpu

    def gradients(values, indices, x, rows):
        return kernels_gpu.outer(kernels_gpu.sorted_entries(indices, F), values, x, rows, F, kernels_gpu.cut(B, F, D))

    make = jax.ShapeDtypeStruct
    return gradients, (make((B, k), jnp.float32), make((B, k), jnp.int32), make((B, D), jnp.float32),
                       make((F, D), jnp.float32))


KERNELS = {"topk": topk, "spmm": spmm, "outer": outer}


if __name__ == "__main__":
    find()
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
    main(sys.argv[1], json.loads(sys.argv[2]))
