// The C side of `kernels.cuda_layers`.
#include "attention.cuh"

#include <algorithm>

using forebay::Step;

extern "C" {

// Lays a block's shared memory out, with as long a ring as fits, and runs a step; `num_parts` floats are added up at once.
// Returns a cudaError_t.
int forebay_layers(Step* p, int num_blocks, int num_parts, void* stream) {
    using namespace forebay;
    const int num_tokens = p->num_sequences * p->width, most = std::max(std::max(p->hidden, p->inner_size), p->num_q * HEAD);
    const int columns = CHUNK_STEPS * Packed::COLUMNS, layers = p->num_layers * static_cast<int>(sizeof(Layer));
    p->x_stride = (most + columns - 1) / columns * GROUP_VALUES + PADDING;
    const int x_bytes = std::max(WARPS * num_tokens * p->x_stride * 2, MERGED_BYTES), parts_bytes = num_parts * 4, angles_bytes = num_tokens * HEAD * 4;
    const int others = RING_AT + x_bytes + parts_bytes + angles_bytes + layers;
    p->depth = std::min(p->depth, (MAX_SHARED_BYTES - others) / CHUNK_BYTES);
    if (p->depth < UNDER_WAY) return cudaErrorInvalidValue;
    p->x_at = RING_AT + p->depth * CHUNK_BYTES, p->parts_at = p->x_at + x_bytes, p->angles_at = p->parts_at + parts_bytes;
    p->layers_at = p->angles_at + angles_bytes;
    const int num_bytes = others + p->depth * CHUNK_BYTES;
    const cudaError_t error = cudaFuncSetAttribute(decode_layers, cudaFuncAttributeMaxDynamicSharedMemorySize, num_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeCooperative, attribute.val.cooperative = 1;  // all blocks at once
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(num_blocks), config.blockDim = dim3(ALL_THREADS), config.dynamicSmemBytes = num_bytes;
    config.stream = static_cast<cudaStream_t>(stream), config.attrs = &attribute, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, decode_layers, *p);
}
}
