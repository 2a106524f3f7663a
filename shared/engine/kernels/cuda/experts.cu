// The C side of `kernels.cuda_experts`.
#include "experts.cuh"
#include "launch.cuh"

#include <algorithm>

namespace forebay {

template <int S>
cudaError_t run(const Experts& p, int most_groups, bool early, cudaStream_t stream) {
    const int blocks = INNER / PAIRS + most_groups * (TILES / p.tiles_each);
    if (const cudaError_t error = launch_beside(gate_up<S>, dim3(blocks), THREADS, 0, 1, early, stream, p)) return error;
    return launch_beside(down, dim3(p.hidden / 16), THREADS, sizeof(float) * THREADS / 2 * (p.num_tokens | 1), 1, early, stream, p);
}

}  // namespace forebay

extern "C" {

// Each returns a cudaError_t.
int forebay_route(const forebay::Routing* p, int early, void* stream) {
    if (p->num_tokens > forebay::MAX_TOKENS || p->num_experts > forebay::MAX_EXPERTS || p->num_chosen > forebay::MAX_CHOSEN) return cudaErrorInvalidValue;
    const int threads = p->num_tokens <= forebay::WARPS ? forebay::THREADS : forebay::ROUTE_THREADS;
    return forebay::launch_beside(forebay::route, dim3(1), threads, 0, 1, early, stream, *p);
}

int forebay_experts(const forebay::Experts* p, int most_groups, int early, void* stream) {
    auto* s = static_cast<cudaStream_t>(stream);
    if (p->hidden == 1024) return forebay::run<1>(*p, most_groups, early, s);
    if (p->hidden == 2048) return forebay::run<2>(*p, most_groups, early, s);
    return p->hidden == 6144 ? forebay::run<6>(*p, most_groups, early, s) : cudaErrorInvalidValue;
}

const char* forebay_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
}
