"""FlashInfer 0.7.2's W4A4 functions on the CPU: the parameters, the demands and the layouts of theirs, stated anew.

Their kernels need a GPU of compute capability 10.x. These take the same arguments, refuse what those refuse, find each
scale where those look for it, and multiply in plain torch. The demands are those of `_check_mm_fp4_problem_size` and
`_cutlass_gemm_fp4_requirement` (flashinfer/gemm/gemm_base.py), `fp4_bmm_impl` (csrc/fp4_gemm_cutlass.cu), and `runMoe`
and `getQuantParams` (csrc/fused_moe/cutlass_backend/flashinfer_cutlass_fused_moe_binding.cu); where a scale lies is
`get_sf_out_offset_128x4` (tensorrt_llm/kernels/quantization_utils.cuh).
"""

from collections.abc import Sequence
from typing import Any

import torch

from shared.engine.kernels.flashinfer_w4a4 import Functions

VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
BORDERS = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]  # between magnitudes
TO_EVEN = [False, True, False, True, False, True, False]  # of an element on a border: up, or down


def offsets(num_rows: int, num_columns: int) -> torch.Tensor:
    """Where a matrix has each of its scales, [num_rows, num_columns]."""
    row, column, tiles = torch.arange(num_rows)[:, None], torch.arange(num_columns), -(-num_columns // 4)
    return row // 128 * tiles * 512 + column // 4 * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4


def scale_at(flat: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
    """uint8 [num_rows, num_columns], each looked up."""
    return flat[offsets(num_rows, num_columns)]


def decode(codes: torch.Tensor, flat_scales: torch.Tensor) -> torch.Tensor:
    """float64 [N, K], without the scale of the matrix. The first element is in the low nibble."""
    elements = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    scales = scale_at(flat_scales, len(codes), elements.shape[1] // 16).view(torch.float8_e4m3fn).double()
    return torch.tensor(VALUES, dtype=torch.float64)[elements.long()] * scales.repeat_interleave(16, dim=1)


def fp4_quantize(
    input: torch.Tensor,
    global_scale: torch.Tensor | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    is_global_scale_inversed: bool = False,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
    nvfp4_4over6: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert input.dtype == torch.bfloat16
    assert input.ndim == 2
    assert input.stride(1) == 1, "a column-major input would be transposed"
    assert input.shape[1] % sf_vec_size == 0
    assert global_scale is not None
    assert (global_scale.shape, global_scale.dtype) == ((1,), torch.float32)
    assert (sf_vec_size, sf_use_ue8m0, is_sf_swizzled_layout, is_sf_8x4_layout) == (16, False, True, False)
    assert not is_global_scale_inversed
    rows, columns = input.shape
    groups = input.float().unflatten(1, (-1, 16))
    amax = groups.abs().amax(-1)
    scales = (global_scale * (amax * (1 / 6))).clamp(max=448).to(torch.float8_e4m3fn)
    reciprocal = torch.where(scales.float() == 0, 0, 1 / (scales.float() * (1 / global_scale)))
    scaled = (groups * reciprocal[..., None]).clamp(-6, 6).flatten(1)
    magnitudes = torch.zeros(scaled.shape, dtype=torch.uint8)
    for border, up in zip(BORDERS, TO_EVEN, strict=True):
        magnitudes += (scaled.abs() >= border) if up else (scaled.abs() > border)
    codes = magnitudes | (torch.signbit(scaled).to(torch.uint8) << 3)
    flat = torch.zeros(-(-rows // 128) * 128 * (-(-columns // 64) * 4), dtype=torch.uint8)
    flat[offsets(rows, columns // 16)] = scales.view(torch.uint8)
    return codes[:, ::2] | (codes[:, 1::2] << 4), flat.view(-1, -(-columns // 64) * 4)


def mm_fp4(
    a: torch.Tensor,
    b: torch.Tensor,
    a_descale: torch.Tensor,
    b_descale: torch.Tensor,
    alpha: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    block_size: int = 16,
    use_8x4_sf_layout: bool = False,
    backend: str = "auto",
    use_nvfp4: bool = True,
    enable_pdl: bool = True,
) -> torch.Tensor:
    assert backend == "cutlass", "others fetch kernels, or are others' weights"
    assert (block_size, use_8x4_sf_layout, use_nvfp4, out) == (16, False, True, None)
    assert a.ndim == b.ndim == 2
    assert a.shape[1] == b.shape[0]
    assert all(tensor.dtype == torch.uint8 for tensor in (a, b, a_descale, b_descale))
    assert alpha is not None
    assert (alpha.numel(), alpha.dtype, out_dtype) == (1, torch.float32, torch.bfloat16)
    # The runner passes b.T and b_descale.T on, and the kernel demands row-major tensors.
    assert all(tensor.is_contiguous() for tensor in (a, b.T, a_descale, b_descale.T, alpha))
    num_rows, num_columns = b.shape[1], a.shape[1] * 2
    assert num_rows % 32 == num_columns % 32 == 0
    for scales, rows in ((a_descale, len(a)), (b_descale.T, num_rows)):
        assert scales.numel() == -(-rows // 128) * 128 * (-(-num_columns // 64) * 4)
    product = decode(a, a_descale.flatten()) @ decode(b.T.contiguous(), b_descale.T.flatten()).T
    return (product * alpha).to(out_dtype)


def cutlass_fused_moe(
    input: torch.Tensor,
    token_selected_experts: torch.Tensor,
    token_final_scales: torch.Tensor,
    fc1_expert_weights: torch.Tensor,
    fc2_expert_weights: torch.Tensor,
    output_dtype: torch.dtype,
    quant_scales: list[torch.Tensor],
    fc1_expert_biases: torch.Tensor | None = None,
    fc2_expert_biases: torch.Tensor | None = None,
    input_sf: torch.Tensor | None = None,
    swiglu_alpha: torch.Tensor | None = None,
    swiglu_beta: torch.Tensor | None = None,
    swiglu_limit: torch.Tensor | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    cluster_size: int = 1,
    cluster_rank: int = 0,
    output: torch.Tensor | None = None,
    enable_alltoall: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    min_latency_mode: bool = False,
    use_packed_weights: bool = False,
    use_wfp4afp8_humming: bool = False,
    tune_max_num_tokens: int = 8192,
    enable_pdl: bool | None = None,
    activation_type: Any = None,  # Swiglu there
    swizzled_input_sf: bool = True,
    use_fused_finalize: bool = True,
    profile_ids: list[int] | None = None,
    workspace_buffer: torch.Tensor | None = None,
    *,
    clamped_relu2_limit: torch.Tensor | None = None,
    situ_beta: torch.Tensor | None = None,
    situ_linear_beta: torch.Tensor | None = None,
    backend: str = "cutlass",
) -> torch.Tensor:
    assert not use_fused_finalize, "its sums depend on which block ends first"
    num_experts, hidden, inner = _demand(
        input, (token_selected_experts, token_final_scales), (fc1_expert_weights, fc2_expert_weights), quant_scales
    )
    first, second = fc1_expert_weights.view(torch.uint8), fc2_expert_weights.view(torch.uint8)
    out = torch.zeros(len(input), hidden)
    for token, (experts, scales) in enumerate(zip(token_selected_experts, token_final_scales, strict=True)):
        for expert, scale in zip(experts.tolist(), scales.tolist(), strict=True):
            assert 0 <= expert < num_experts
            scales_of = [each[expert].view(torch.uint8).flatten() for each in quant_scales[1::3]]
            factors = [each[expert : expert + 1] for each in quant_scales]
            joined = _product(input[token : token + 1], first[expert], scales_of[0], factors[0], factors[2]).float()
            linear, gate = joined[:, :inner], joined[:, inner:]  # doActivationKernel: gate is `inner` behind
            activated = (gate * torch.sigmoid(gate) * linear).to(torch.bfloat16)
            out[token] += scale * _product(activated, second[expert], scales_of[1], factors[3], factors[5])[0].float()
    return out.to(output_dtype)


def _demand(
    x: torch.Tensor,
    routing: tuple[torch.Tensor, torch.Tensor],
    weights: tuple[torch.Tensor, torch.Tensor],
    quant_scales: Sequence[torch.Tensor],
) -> tuple[int, int, int]:
    (chosen, factors), (first, second) = routing, weights
    assert (x.dtype, chosen.dtype, factors.dtype) == (torch.bfloat16, torch.int32, torch.float32)
    assert chosen.shape == factors.shape
    assert len(x) == len(chosen)
    assert (first.dtype, second.dtype) == (torch.int64, torch.int64), "this is how the kernel is told of NVFP4"
    num_experts, hidden, inner = len(second), second.shape[1], second.shape[2] * 16
    assert first.shape == (num_experts, 2 * inner, hidden // 16)
    assert x.shape[1] == hidden
    kinds = [torch.float32, torch.int32, torch.float32] * 2
    assert [each.dtype for each in quant_scales] == kinds
    vector = (num_experts,)
    assert [tuple(each.shape) for each in quant_scales] == [
        vector,
        (num_experts, -(-inner // 64) * 64 * 2, _words(hidden)),
        vector,
        vector,
        (num_experts, -(-hidden // 128) * 128, _words(inner)),
        vector,
    ]
    assert all(each.is_contiguous() for each in (*weights, *quant_scales))
    return num_experts, hidden, inner


def _words(size: int) -> int:
    """How many int32 of four scales a row of `size` elements has, in whole tiles."""
    return -(-size // 64)


def _product(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, encode: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    quantized, own = fp4_quantize(x, encode)
    return (decode(quantized, own.flatten()) @ decode(codes, scales).T * alpha).to(torch.bfloat16)


FUNCTIONS = Functions(fp4_quantize, mm_fp4, cutlass_fused_moe)
