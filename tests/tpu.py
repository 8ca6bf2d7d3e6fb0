"""Compile for TPUs that are not there, in a process of its own: `python tests/tpu.py v5e '[{"kernel": "nf4", ...}]'`.

The wheel libtpu, which jax[tpu] brings, is the whole TPU compiler. Each job is one kernel on one chip: its product
x [rows, in] @ w [in, out], and optionally the tiles; or, with k, a sparse product of kernels.py for `rows` tokens and
w [F, D]. A line of JSON answers each job: the tiles and the seconds it took, or the compiler's error. A third argument,
an empty folder, asks for the VLIW bundles that the compiler scheduled for one step of the grid too: cycles without
stalls for memory, for a sparse product those of each loop and of the rest of a step. It takes ten times as long, since
the compiler writes all its passes to that folder.
"""
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SPARSE = ("sparse decode", "sparse gradients")
# What must be set before jax is imported.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
               "TPU_ACCELERATOR_TYPE": "v4-8", "TPU_LOG_DIR": "disabled", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
               "JAX_ENABLE_COMPILATION_CACHE": "false"}          # a cached program schedules nothing


def run(chip, jobs, count=True):
    """Return the answers to `jobs`, one after the other. count: whether to count bundles."""
    environment = os.environ | ENVIRONMENT
    with tempfile.TemporaryDirectory() as dump:
        if count:
            environment["LIBTPU_INIT_ARGS"] = (f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
                                               "--xla_jf_emit_annotations=true --xla_jf_debug_level=2")
        process = subprocess.Popen([sys.executable, __file__, chip, json.dumps(jobs), *[dump] * count], text=True,
                                   env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        answers = [json.loads(line) for line in process.stdout if line.startswith("{")]
        errors = process.stderr.read()
    if process.wait() or len(answers) != len(jobs):
        raise RuntimeError(f"{len(answers)} of {len(jobs)} answers: {errors[-2000:]}")
    return answers


def main(chip, jobs, dump=None):
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    here = NamedSharding(Mesh(np.array(devices(TOPOLOGIES[chip])[:1]), ("x",)), PartitionSpec())
    for job in jobs:
        start, answer = time.time(), dict(job)
        try:
            function, shapes, answer["tiles"] = program(chip, **job)
            placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), shapes)
            jax.jit(function, out_shardings=here).lower(*placed).compile()
            if dump:
                answer |= loops(dump, start) if "k" in job else {"bundles": bundles(dump, start)}
        except Exception as error:
            answer["error"] = str(error).splitlines()[0][:300]
        print(json.dumps(answer | {"seconds": round(time.time() - start, 1)}), flush=True)


def devices(topology):
    """Of a topology such as v4:2x2x1, in a process with ENVIRONMENT."""
    from jax.experimental import topologies
    pairs = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}  # else its two cores are two devices
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **pairs).devices


def program(chip, kernel, rows, size, tiles=None, k=None):
    """(function, shapes of its arguments, tiles) of one kernel."""
    import jax
    import jax.numpy as jnp

    import quant
    if k:
        return sparse_program(chip, kernel, rows, size, k)
    n_in, out = size
    weight = quant.int8 if kernel == "int8" else quant.nf4
    q = weight_like(weight, n_in, out, chip)
    chosen = quant.Tiles(*tiles) if tiles else quant.plan(q, rows, kernel == "nf4 transposed")
    x = jax.ShapeDtypeStruct((rows, out if kernel.endswith("transposed") else n_in), jnp.bfloat16)
    if kernel.startswith("bfloat16"):
        w, transposed = jax.ShapeDtypeStruct((n_in, out), jnp.bfloat16), kernel.endswith("transposed")
        return partial(matmul, tiles=chosen, chip=quant.CHIPS[chip], transposed=transposed), (x, w), vars(chosen)
    function = {"nf4": quant.nf4_kernel, "nf4 transposed": quant.nf4_transposed_kernel, "int8": quant.int8_kernel}
    return partial(function[kernel], tiles=chosen), (x, q), vars(chosen)


def sparse_program(chip, kernel, B, size, k):
    """Of entries in order: sorting them is another program, which takes longer to compile."""
    import jax
    import jax.numpy as jnp

    import kernels_tpu
    (F, D), how = size, kernels_tpu.cut(kernels_tpu.CHIPS[chip], B, size[1])
    n = -(-B * k // kernels_tpu.ENTRIES) * kernels_tpu.ENTRIES
    make = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    entries = kernels_tpu.Entries(make(n, dtype=jnp.int32), make(n, dtype=jnp.int32), make(n))
    if kernel == SPARSE[0]:
        return lambda e, rows: kernels_tpu.spmm(e, rows, (B, k), how), (entries, make(F, D)), how._asdict()

    def gradients(e, x, rows):
        return kernels_tpu.outer(e, x, rows, F, k, how)

    return gradients, (entries, make(B, D), make(F, D)), how._asdict()


def weight_like(quantize, n_in, out, chip):
    """A quantized weight's shapes, from a narrow one: quantizing a large one would take longer than compiling."""
    import jax
    import numpy as np
    narrow = quantize(np.zeros((n_in, 1), np.float32), dtype="bfloat16", chip=chip)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*leaf.shape[:-1], out), leaf.dtype), narrow)


def matmul(x, w, tiles, chip, transposed=False):
    """The plain bfloat16 product x @ w, or with w transposed, in the same tiles of w: to compare with."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    import quant

    def kernel(a, b, y, total):
        quant.start_total(total)
        total[...] += jax.lax.dot_general(a[...], b[...], (((1,), (1 if transposed else 0,)), ((), ())),
                                          preferred_element_type=jnp.float32)
        quant.write_total(y, total)

    (rows, inner), outer, across, along = x.shape, w.shape[1], tiles.columns, tiles.depth
    if transposed:
        outer, across, along = w.shape[0], along, across
    return pl.pallas_call(
        kernel, grid=(pl.cdiv(rows, tiles.rows), pl.cdiv(outer, across), inner // along),
        in_specs=[pl.BlockSpec((tiles.rows, along), lambda i, j, k: (i, k)),
                  pl.BlockSpec((tiles.depth, tiles.columns), lambda i, j, k: (j, k) if transposed else (k, j))],
        **quant.output(rows, outer, tiles.rows, across, jnp.bfloat16, jnp.float32, chip, False),
    )(x, w)


def bundles(dump, since):
    """Of the largest program compiled since then, as the compiler's own analysis of its final schedule counts them."""
    counts = [re.search(r"total scheduled bundles:\s+(\d+)", Path(file).read_text())
              for file in glob.glob(f"{dump}/*schedule-analysis_final_bundles*") if os.path.getmtime(file) >= since - 1]
    return max(int(count[1]) for count in counts if count)


def loops(dump, since):
    """{"loops": bundles in the body of each loop of a step, in order, "step": bundles of all else in a step} of the
    kernel compiled since then, as its final schedule shows them: `>` marks a bundle's depth, LB the first of a loop."""
    files = [file for file in glob.glob(f"{dump}/*final_bundles.txt")
             if os.path.getmtime(file) >= since - 1 and not re.search("schedule-analysis|-TLP-|<late|fusion", file)]
    text = max((Path(file).read_text() for file in files), key=lambda text: text.count(": >"))
    found, step, depth = [], 0, 0
    for label, marks, empty in re.findall(r"^ *(?:0x[0-9a-f]+|0) +([A-Z]{2})? *: (>*) *(\{\})?", text, re.MULTILINE):
        depth = depth if empty and not marks else len(marks)     # empty ones carry no marks
        if label == "LB" and depth == 2:
            found.append(0)
        if depth == 1:
            step += 1
        elif depth > 1:
            found[-1] += 1
    return {"loops": found, "step": step}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1], json.loads(sys.argv[2]), *sys.argv[3:])
