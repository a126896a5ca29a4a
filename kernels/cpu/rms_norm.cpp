// RMSNorm of each row, after adding the residual stream; see kernels/rms_norm.py.

#include "vector.h"

namespace {

template <typename T>
void rms_norm(const T *x, const T *residual, const T *weight, T *out, T *total, int64_t num_tokens,
              int64_t size, float eps) {
#pragma omp parallel for if (num_tokens > 1)  // to wake threads for one costs more
    for (int64_t start = 0; start < num_tokens * size; start += size) {
        const T *row = x + start;
        if (residual != nullptr) {
            row = total + start;
            for (int64_t i = 0; i < size; i += LANES)
                store(total + start + i,
                      load(x + start + i, size - i) + load(residual + start + i, size - i),
                      size - i);
        }
        const float factor = inverse_rms(row, size, eps);
        for (int64_t i = 0; i < size; i += LANES)
            store(out + start + i, load(row + i, size - i) * factor * load(weight + i, size - i),
                  size - i);
    }
}

}  // namespace

#define EXPORT(T, suffix)                                                                      \
    extern "C" void rms_norm_##suffix(const T *x, const T *residual, const T *weight, T *out,  \
                                      T *total, int64_t num_tokens, int64_t size, float eps) { \
        rms_norm(x, residual, weight, out, total, num_tokens, size, eps);                      \
    }

EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)
