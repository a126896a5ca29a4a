// Rotary embedding of queries and keys, and the KV cache's new entries; see
// kernels/rope_and_cache.py.

#include <vector>

#include "vector.h"

namespace {

// Rotates one head: its first half are real parts, its second half imaginary ones.
template <typename T>
void rotate(const T *in, const float *cos, const float *sin, T *out, int64_t half) {
    for (int64_t i = 0; i < half; i += LANES) {
        const int64_t left = half - i;
        const vec real = load(in + i, left), imaginary = load(in + half + i, left);
        const vec c = load(cos + i, left), s = load(sin + i, left);
        store(out + i, real * c - imaginary * s, left);
        store(out + half + i, imaginary * c + real * s, left);
    }
}

template <typename T>
void rope_and_cache(const T *qkv, const int64_t *positions, const float *rope, T *q, T *k_cache,
                    T *v_cache, const int64_t *slots, const T *q_norm, const T *k_norm, float eps,
                    int64_t num_tokens, int64_t heads, int64_t kv_heads, int64_t head_dim) {
    const int64_t half = head_dim / 2, all_heads = heads + 2 * kv_heads;
#pragma omp parallel if (num_tokens > 1)  // to wake threads for one costs more
    {
        std::vector<T> normal(head_dim);
#pragma omp for
        for (int64_t t = 0; t < num_tokens; t++) {
            const float *cos = rope + positions[t] * head_dim, *sin = cos + half;
            T *keys = k_cache + slots[t] * kv_heads * head_dim;
            T *values = v_cache + slots[t] * kv_heads * head_dim;
            for (int64_t h = 0; h < heads + kv_heads; h++) {
                const T *in = qkv + (t * all_heads + h) * head_dim;
                const T *weight = h < heads ? q_norm : k_norm;
                if (weight != nullptr) {
                    const float factor = inverse_rms(in, head_dim, eps);
                    for (int64_t i = 0; i < head_dim; i += LANES) {
                        const int64_t left = head_dim - i;
                        store(&normal[i], load(in + i, left) * factor * load(weight + i, left), left);
                    }
                    in = normal.data();
                }
                T *out = h < heads ? q + (t * heads + h) * head_dim : keys + (h - heads) * head_dim;
                rotate(in, cos, sin, out, half);
            }
            std::memcpy(values, qkv + (t * all_heads + heads + kv_heads) * head_dim,
                        kv_heads * head_dim * sizeof(T));
        }
    }
}

}  // namespace

#define EXPORT(T, suffix)                                                                        \
    extern "C" void rope_and_cache_##suffix(                                                     \
        const T *qkv, const int64_t *positions, const float *rope, T *q, T *k_cache, T *v_cache, \
        const int64_t *slots, const T *q_norm, const T *k_norm, float eps, int64_t num_tokens,   \
        int64_t heads, int64_t kv_heads, int64_t head_dim) {                                     \
        rope_and_cache(qkv, positions, rope, q, k_cache, v_cache, slots, q_norm, k_norm, eps,    \
                       num_tokens, heads, kv_heads, head_dim);                                   \
    }

EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)
