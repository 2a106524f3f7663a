// How kernels are launched: each may begin while the one before it ends, its blocks in clusters where it wants that.
#pragma once
#include <device.cuh>

namespace forebay {

// With none, one or both attributes: whether it may begin `early`, and how many blocks a cluster has.
template <class... Parameters, class... Arguments>
cudaError_t launch_with(int num_attributes, bool early, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, int cluster,
                        cudaStream_t stream, const Arguments&... arguments) {
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = early;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = cluster, attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream;
    config.attrs = attributes, config.numAttrs = num_attributes;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// On any GPU, early where it can.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, int cluster, cudaStream_t stream, Arguments... arguments) {
    int device = 0, major = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
    return launch_with(major < 9 ? 0 : cluster > 1 ? 2 : 1, true, kernel, grid, threads, shared, cluster, stream, arguments...);
}

// On a GPU that can, early if wanted, with any amount of shared memory.
template <class... Parameters, class... Arguments>
cudaError_t launch_beside(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, int cluster, bool early, void* stream, const Arguments&... arguments) {
    if (shared > 40 << 10) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (error != cudaSuccess) return error;
    }
    return launch_with(cluster > 1 ? 2 : 1, early, kernel, grid, threads, shared, cluster, static_cast<cudaStream_t>(stream), arguments...);
}

// The same of blocks that wait for one another, so must all find a place: there are to be as many multiprocessors. It is not a cooperative
// launch, which at one token begins later; that attribute, not set, says it to whoever emulates this.
template <class... Parameters, class... Arguments>
cudaError_t launch_together(void (*kernel)(Parameters...), int blocks, int threads, size_t shared, bool early, cudaStream_t stream, const Arguments&... arguments) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeCooperative, attributes[0].val.cooperative = 0;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = early;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks), config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream;
    config.attrs = attributes, config.numAttrs = 2;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace forebay
