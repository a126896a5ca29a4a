// Rows of a matrix, one for each token.

#include "vector.h"

namespace {

template <typename T>
void embedding(const T *weight, const int64_t *token_ids, T *out, int64_t num_tokens,
               int64_t size) {
    for (int64_t t = 0; t < num_tokens; t++)
        std::memcpy(out + t * size, weight + token_ids[t] * size, size * sizeof(T));
}

}  // namespace

#define EXPORT(T, suffix)                                                                      \
    extern "C" void embedding_##suffix(const T *weight, const int64_t *token_ids, T *out,      \
                                       int64_t num_tokens, int64_t size) {                     \
        embedding(weight, token_ids, out, num_tokens, size);                                   \
    }

EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)
