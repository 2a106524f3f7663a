"""Waiting for the kernel in front, in Triton, for kernels that start while others still run.

Such a kernel shares its multiprocessor's L1 cache with kernels that read what used to be at the addresses of its
inputs, and waiting alone does not promise that those lines are forgotten. An acquiring load, of any address, does.
"""

import triton
import triton.language as tl


@triton.jit
def wait(at):
    """Until the kernel in front has ended; `at` points to any global memory."""
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; ld.acquire.gpu.global.u32 $0, [$1];",
        "=r,l,~{memory}",
        [at.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
