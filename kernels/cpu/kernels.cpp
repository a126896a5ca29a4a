// The engine's kernels for a CPU: what `kernels/*.py` has in Triton, as plain loops.
//
// Each function is a template over the element type, float or bfloat16; all arithmetic is in float.
// Tensors are contiguous and have the shapes that the Python functions of the same name document.
// Loops over tokens or heads are shared among threads by OpenMP, and inner loops run over contiguous
// numbers, so that the compiler turns them into vector instructions.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct bfloat16 {  // the upper half of a float
    uint16_t bits;
    operator float() const {
        uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
    bfloat16 &operator=(float value) {  // to the nearest, ties to even
        uint32_t wide;
        std::memcpy(&wide, &value, sizeof wide);
        bits = uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
        return *this;
    }
};

// exp by 2^x = 2^n * 2^f with |f| <= 1/2: n goes into the exponent's bits, 2^f is a polynomial.
// Unlike the library's exp it has no branches, so loops around it become vector instructions.
// Measured over its range, its error is at most 4e-6 of the value, and 5e-7 for |x| < 5; at -87 and
// below it is about 1e-38 and not 0.
inline float fast_exp(float x) {
    float t = std::min(std::max(x, -87.0f), 88.0f) * 1.44269504f;
    float n = std::nearbyint(t), f = (t - n) * 0.693147181f;
    float p = 1 + f * (1 + f * (0.5f + f * (0.166666667f + f * (0.0416666667f +
              f * (0.00833333333f + f * 0.00138888889f)))));
    int32_t exponent = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    return p * scale;
}

inline void softmax(float *x, int64_t length) {
    float largest = x[0], total = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 1; j < length; j++) largest = std::max(largest, x[j]);
    for (int64_t j = 0; j < length; j++) x[j] = fast_exp(x[j] - largest);
    for (int64_t j = 0; j < length; j++) total += x[j];
    for (int64_t j = 0; j < length; j++) x[j] /= total;
}

// Attention of one query token over KV heads `kv_first` to `kv_last`, whose keys lie side by side.
// `DIM` is the head dimension where it is a common one: loops of known length are unrolled.
template <typename T, int DIM>
void attend(const T *__restrict q, const T *__restrict k_cache, const T *__restrict v_cache,
            const int32_t *__restrict table, T *__restrict out, int64_t first, int64_t last,
            int64_t group, int64_t head_dim, int64_t kv_heads, int64_t kv_first, int64_t kv_last,
            int64_t block_size, float scale, std::vector<float> &space) {
    const int64_t length = last - first, dim = DIM ? DIM : head_dim;
    const int64_t heads = (kv_last - kv_first) * group, width = (kv_last - kv_first) * dim;
    space.resize(heads * length + 2 * heads * dim + width);
    float *__restrict scores = space.data();               // [heads, length]
    float *__restrict queries = scores + heads * length;   // [heads, dim]
    float *__restrict sums = queries + heads * dim;        // [heads, dim]
    float *__restrict row = sums + heads * dim;            // [width], keys or values as floats
    const auto offset = [&](int64_t position) {  // of that token's keys and values in the caches
        int64_t slot = table[position / block_size] * block_size + position % block_size;
        return (slot * kv_heads + kv_first) * dim;
    };

    for (int64_t i = 0; i < heads * dim; i++) queries[i] = float(q[i]) * scale;
    for (int64_t j = 0; j < length; j++) {
        const T *__restrict keys = k_cache + offset(first + j);
        for (int64_t i = 0; i < width; i++) row[i] = keys[i];
        for (int64_t h = 0; h < heads; h++) {
            const float *__restrict key = row + h / group * dim, *__restrict query = queries + h * dim;
            float score = 0;
            for (int64_t d = 0; d < dim; d++) score += query[d] * key[d];
            scores[h * length + j] = score;
        }
    }
    for (int64_t h = 0; h < heads; h++) softmax(scores + h * length, length);
    for (int64_t i = 0; i < heads * dim; i++) sums[i] = 0;
    for (int64_t j = 0; j < length; j++) {
        const T *__restrict values = v_cache + offset(first + j);
        for (int64_t i = 0; i < width; i++) row[i] = values[i];
        for (int64_t h = 0; h < heads; h++) {
            const float *__restrict value = row + h / group * dim;
            float *__restrict sum = sums + h * dim;
            const float weight = scores[h * length + j];
            for (int64_t d = 0; d < dim; d++) sum[d] += weight * value[d];
        }
    }
    for (int64_t i = 0; i < heads * dim; i++) out[i] = sums[i];
}

template <typename T>
void attention(const T *q, const T *k_cache, const T *v_cache, const int32_t *block_tables,
               const int32_t *context_lens, const int32_t *query_start_loc, T *out,
               int64_t num_requests, int64_t max_blocks, int64_t heads, int64_t kv_heads,
               int64_t head_dim, int64_t block_size, float scale, int64_t window) {
    const int64_t num_tokens = query_start_loc[num_requests], group = heads / kv_heads;
    std::vector<int32_t> request_of(num_tokens);
    for (int64_t r = 0; r < num_requests; r++)
        std::fill(request_of.begin() + query_start_loc[r],
                  request_of.begin() + query_start_loc[r + 1], int32_t(r));
    const auto one = head_dim == 64 ? attend<T, 64> : head_dim == 128 ? attend<T, 128> : attend<T, 0>;
    const int64_t part = num_tokens >= 8 ? kv_heads : 1;  // heads of a task: few tokens are split
#pragma omp parallel
    {
        std::vector<float> space;
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t t = 0; t < num_tokens; t++) {
            for (int64_t h = 0; h < kv_heads; h += part) {
                const int64_t r = request_of[t];
                const int64_t last = context_lens[r] - (query_start_loc[r + 1] - t) + 1;
                const int64_t first = window > 0 ? std::max<int64_t>(0, last - window) : 0;
                const int64_t head = (t * heads + h * group) * head_dim;
                one(q + head, k_cache, v_cache, block_tables + r * max_blocks, out + head, first,
                    last, group, head_dim, kv_heads, h, h + part, block_size, scale, space);
            }
        }
    }
}

// Writes row / rms(row) * weight; `row` holds floats.
template <typename T>
void normalise(const float *row, const T *weight, T *out, int64_t size, float eps) {
    float squares = 0;
    for (int64_t i = 0; i < size; i++) squares += row[i] * row[i];
    const float factor = 1 / std::sqrt(squares / float(size) + eps);
    for (int64_t i = 0; i < size; i++) out[i] = row[i] * factor * float(weight[i]);
}

template <typename T>
void rms_norm(const T *x, const T *residual, const T *weight, T *out, T *total, int64_t num_tokens,
              int64_t size, float eps) {
#pragma omp parallel
    {
        std::vector<float> row(size);
#pragma omp for
        for (int64_t t = 0; t < num_tokens; t++) {
            const int64_t start = t * size;
            if (residual != nullptr) {
                for (int64_t i = 0; i < size; i++)
                    total[start + i] = float(x[start + i]) + float(residual[start + i]);
                for (int64_t i = 0; i < size; i++) row[i] = total[start + i];
            } else {
                for (int64_t i = 0; i < size; i++) row[i] = x[start + i];
            }
            normalise(row.data(), weight, out + start, size, eps);
        }
    }
}

template <typename T>
void silu_and_mul(const T *gate_up, T *out, int64_t num_tokens, int64_t size) {
#pragma omp parallel for
    for (int64_t t = 0; t < num_tokens; t++) {
        const T *gate = gate_up + 2 * t * size, *up = gate + size;
        for (int64_t i = 0; i < size; i++) {
            const float g = gate[i];
            out[t * size + i] = g / (1 + fast_exp(-g)) * float(up[i]);
        }
    }
}

template <typename T>
void rope_and_cache(const T *qkv, const int64_t *positions, const float *rope, T *q, T *k_cache,
                    T *v_cache, const int64_t *slots, const T *q_norm, const T *k_norm, float eps,
                    int64_t num_tokens, int64_t heads, int64_t kv_heads, int64_t head_dim) {
    const int64_t half = head_dim / 2, all_heads = heads + 2 * kv_heads;
#pragma omp parallel
    {
        std::vector<float> row(head_dim);
        std::vector<T> normal(head_dim);
#pragma omp for
        for (int64_t t = 0; t < num_tokens; t++) {
            const float *cos = rope + positions[t] * head_dim, *sin = cos + half;
            T *keys = k_cache + slots[t] * kv_heads * head_dim;
            T *values = v_cache + slots[t] * kv_heads * head_dim;
            for (int64_t h = 0; h < heads + kv_heads; h++) {
                const T *in = qkv + (t * all_heads + h) * head_dim;
                const T *weight = h < heads ? q_norm : k_norm;
                T *out = h < heads ? q + (t * heads + h) * head_dim
                                   : keys + (h - heads) * head_dim;
                for (int64_t i = 0; i < head_dim; i++) row[i] = in[i];
                if (weight != nullptr) {
                    normalise(row.data(), weight, normal.data(), head_dim, eps);
                    for (int64_t i = 0; i < head_dim; i++) row[i] = normal[i];
                }
                for (int64_t i = 0; i < half; i++) {
                    out[i] = row[i] * cos[i] - row[half + i] * sin[i];
                    out[half + i] = row[half + i] * cos[i] + row[i] * sin[i];
                }
            }
            std::memcpy(values, qkv + (t * all_heads + heads + kv_heads) * head_dim,
                        kv_heads * head_dim * sizeof(T));
        }
    }
}

}  // namespace

// What Python calls: each kernel for float and for bfloat16.
#define EXPORT(T, suffix)                                                                         \
    extern "C" void attention_##suffix(                                                           \
        const T *q, const T *k_cache, const T *v_cache, const int32_t *block_tables,              \
        const int32_t *context_lens, const int32_t *query_start_loc, T *out,                      \
        int64_t num_requests, int64_t max_blocks, int64_t heads, int64_t kv_heads,                \
        int64_t head_dim, int64_t block_size, float scale, int64_t window) {                      \
        attention(q, k_cache, v_cache, block_tables, context_lens, query_start_loc, out,          \
                  num_requests, max_blocks, heads, kv_heads, head_dim, block_size, scale, window); \
    }                                                                                             \
    extern "C" void rms_norm_##suffix(const T *x, const T *residual, const T *weight, T *out,     \
                                      T *total, int64_t num_tokens, int64_t size, float eps) {    \
        rms_norm(x, residual, weight, out, total, num_tokens, size, eps);                         \
    }                                                                                             \
    extern "C" void silu_and_mul_##suffix(const T *gate_up, T *out, int64_t num_tokens,           \
                                          int64_t size) {                                         \
        silu_and_mul(gate_up, out, num_tokens, size);                                             \
    }                                                                                             \
    extern "C" void rope_and_cache_##suffix(                                                      \
        const T *qkv, const int64_t *positions, const float *rope, T *q, T *k_cache, T *v_cache,  \
        const int64_t *slots, const T *q_norm, const T *k_norm, float eps, int64_t num_tokens,    \
        int64_t heads, int64_t kv_heads, int64_t head_dim) {                                      \
        rope_and_cache(qkv, positions, rope, q, k_cache, v_cache, slots, q_norm, k_norm, eps,     \
                       num_tokens, heads, kv_heads, head_dim);                                    \
    }

EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)
