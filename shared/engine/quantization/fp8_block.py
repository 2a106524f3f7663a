"""FP8 weights with a float32 scale per block of 128 x 128, as in GLM's and DeepSeek's FP8 checkpoints."""

import torch

BLOCK = 128


def dequantize(weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """w[n, k] = weight[n, k] * scale_inv[n // 128, k // 128], computed in float32 and rounded once.

    weight [N, K] float8_e4m3fn; scale_inv [ceil(N/128), ceil(K/128)] float32 (a factor, despite its name): the last
    block of a dimension may be ragged, as with the 576 rows of kv_a_proj. Raises ValueError when the shapes disagree.
    """
    num_rows, num_columns = weight.shape
    wanted = (-(-num_rows // BLOCK), -(-num_columns // BLOCK))
    if tuple(scale_inv.shape) != wanted:
        raise ValueError(f"weights {list(weight.shape)} need scales {list(wanted)}, not {list(scale_inv.shape)}")
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    per_column = scale_inv.float().repeat_interleave(BLOCK, dim=1)[:, :num_columns]
    for index, rows in enumerate(torch.split(weight, BLOCK)):
        result[index * BLOCK : index * BLOCK + len(rows)] = rows.float() * per_column[index]
    return result
