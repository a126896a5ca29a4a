// silu(gate) * up, of rows that hold both side by side; see kernels/silu_and_mul.py.

#include "vector.h"

namespace {

template <typename T>
void silu_and_mul(const T *gate_up, T *out, int64_t num_tokens, int64_t size) {
#pragma omp parallel for
    for (int64_t t = 0; t < num_tokens; t++) {
        const T *gate = gate_up + 2 * t * size, *up = gate + size;
        for (int64_t i = 0; i < size; i += LANES) {
            const int64_t left = size - i;
            store(out + t * size + i, silu(load(gate + i, left)) * load(up + i, left), left);
        }
    }
}

}  // namespace

#define EXPORT(T, suffix)                                                               \
    extern "C" void silu_and_mul_##suffix(const T *gate_up, T *out, int64_t num_tokens, \
                                          int64_t size) {                               \
        silu_and_mul(gate_up, out, num_tokens, size);                                   \
    }

EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)
