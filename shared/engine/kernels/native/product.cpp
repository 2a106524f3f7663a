// One product by itself, for what is between layers: every sum is taken in the order of the row alone.
#include "crew.h"
#include "team.h"

namespace forebay {

template <class T> void multiply_rows(const Linear& w, Team& team, const T* a, int64_t num_rows, float* out) {
    Phase phase;
    const long stride = w.num_words * PER_WORD<T>;
    team.run([&](int thread) {
        Member<T>{&phase, thread, team.size}.project(a, stride, num_rows, w, out, w.num_panels * PANEL);
    });
}

}  // namespace forebay

using namespace forebay;

extern "C" {

// a [rows, words of k] to out float32 [rows, panels * 32].
void forebay_product(const Linear* w, Team* team, int is_bf16, const void* a, int64_t num_rows, float* out) {
    is_bf16 ? multiply_rows(*w, *team, (const bf16*)a, num_rows, out)
            : multiply_rows(*w, *team, (const float*)a, num_rows, out);
}
}
