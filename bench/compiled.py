"""Kernels compiled for a GPU that is not here: how long it takes, how large they are, and for which GPU their code is.

    python -m bench.compiled [--capability 10.0] [products] [triton] [flashinfer] [mixture]

Nothing is run: this says that a GPU could load them, not that they are right on it. `products` are our CUDA C++ ones,
`triton` all kernels in Triton and Gluon, as decode steps of Llama-3.1-8B's shape and of a rank of GLM-5.2 launch them;
`flashinfer` are quantizing, FP4 products and attention of prompts, `mixture` is FlashInfer's fused mixture: hours of a
core. nvcc has to be there (CUDA_HOME); FLASHINFER_EXTRA_CFLAGS, FLASHINFER_EXTRA_CUDAFLAGS and
FLASHINFER_EXTRA_LDFLAGS say where headers and libraries are that it does not find, MAX_JOBS how many of it run.
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import provenance

KINDS = ("products", "triton", "flashinfer", "mixture")
# What is compiled: seconds, and where its code is.
Made = tuple[str, float, Path]


def products(capability: tuple[int, int], directory: Path) -> Iterator[Made]:
    from shared.engine.kernels import build

    for name in (name for name in build.CUDA_LIBRARIES if build.cuda_sources(name, capability)):
        started = time.monotonic()
        path = build.cuda_library(directory, build.cuda_compiler(), capability, name)
        yield f"{name}.cu", time.monotonic() - started, path


def triton(capability: tuple[int, int], directory: Path) -> Iterator[Made]:
    os.environ["TRITON_CACHE_DIR"] = str(directory / "cache")  # so that all are compiled
    from bench import compiled_triton

    for name, seconds, code in compiled_triton.kernels(capability):
        path = directory / f"{name}.cubin"
        path.write_bytes(code)
        yield name, seconds, path


def flashinfer(capability: tuple[int, int], _: Path) -> Iterator[Made]:
    with _flashinfer_for(capability):
        import torch
        from flashinfer.jit.attention import gen_batch_prefill_module
        from flashinfer.jit.fp4_quantization import gen_fp4_quantization_sm100_module
        from flashinfer.jit.gemm import gen_gemm_sm100_module_cutlass_fp4

        bf16 = torch.bfloat16
        yield _built(gen_fp4_quantization_sm100_module)
        yield _built(gen_gemm_sm100_module_cutlass_fp4)
        wanted = ("fa2", bf16, bf16, bf16, torch.int32, 128, 128, 0, False, False, False)
        yield _built(lambda: gen_batch_prefill_module(*wanted))


def mixture(capability: tuple[int, int], _: Path) -> Iterator[Made]:
    with _flashinfer_for(capability):
        from flashinfer.jit.fused_moe import gen_cutlass_fused_moe_sm100_module

        yield _built(gen_cutlass_fused_moe_sm100_module)


@contextmanager
def _flashinfer_for(capability: tuple[int, int]) -> Iterator[None]:
    """FlashInfer reads it when it is imported."""
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = f"{capability[0]}.{capability[1]}a"
    yield


def _built(generate: Callable[[], Any]) -> Made:
    started, module = time.monotonic(), generate()
    module.build()
    path = Path(module.get_library_path())
    return path.stem, time.monotonic() - started, path


def architectures(path: Path) -> str:
    """Whose machine code is in a file."""
    try:
        from triton import knobs

        tool = knobs.nvidia.cuobjdump.path
    except ImportError:
        tool = shutil.which("cuobjdump")
    if tool is None:
        return "no cuobjdump here"
    # A library's parts say it in their dump (their names leave out what is specific to one), code alone by its name.
    for option, said in (("--dump-elf", r"^arch = (\w+)"), ("--list-elf", r"\.(sm_\w+)\.")):
        text = subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout
        if found := set(re.findall(said, text, re.MULTILINE)):
            return " ".join(sorted(found))
    return "nothing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", choices=[*KINDS, []], help=", ".join(KINDS))
    parser.add_argument("--capability", default="10.0", help="of the GPU, as MAJOR.MINOR")
    args = parser.parse_args()
    major, minor = map(int, args.capability.split("."))
    makers = dict(zip(KINDS, (products, triton, flashinfer, mixture), strict=True))
    print(provenance.banner("bench.compiled"))
    print("Compiled, not run.\n\n| kernels | s | KiB | code for |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for kind in args.kinds or KINDS[:-1]:
            for name, seconds, path in makers[kind]((major, minor), Path(directory)):
                size = path.stat().st_size / 1024
                print(f"| {name} | {seconds:.1f} | {size:,.0f} | {architectures(path)} |", flush=True)


if __name__ == "__main__":
    main()
