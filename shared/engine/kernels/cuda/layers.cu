// The C side of `kernels.cuda_layers`.
#include "attention.cuh"

using forebay::Step;

extern "C" {

// Returns a cudaError_t. `parts` floats are what a block adds up in at once; `processors` is how many blocks there are.
int forebay_layers(const Step* p, int num_blocks, int num_parts, void* stream) {
    const size_t shared = p->depth * (forebay::CHUNK_BYTES + 2 * sizeof(uint64_t)) +
                          sizeof(float) * (forebay::WARPS * (forebay::MAX_ROWS + 2 * forebay::MAX_QUERIES) + num_parts);
    const cudaError_t error = cudaFuncSetAttribute(forebay::decode_layers, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeCooperative, attribute.val.cooperative = 1;  // all blocks at once
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(num_blocks), config.blockDim = dim3(forebay::THREADS + 32), config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream), config.attrs = &attribute, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, forebay::decode_layers, *p);
}
}
