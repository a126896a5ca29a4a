// Linear layers: the rows of `x`, one for each token, times a matrix that stays the same.
//
// The matrix is packed into panels once, after loading. A product reads each panel once for up to
// CHUNK rows, and for few rows its time is that of reading the weights.

#include "panels.h"

namespace {

constexpr int64_t CHUNK = 16 * ROWS;  // rows of a task

template <typename T>
void pack(const T *weight, T *packed, int64_t in, int64_t out) {
#pragma omp parallel for
    for (int64_t first = 0; first < out; first += COLUMNS)
        pack_columns(packed + first * in, in, [=](int64_t column) {
            return first + column < out ? weight + (first + column) * in : nullptr;
        });
}

// Calls `product(first_row, end_row, panel)` for all, shared among the threads.
template <typename Product>
void for_each_panel(int64_t rows, int64_t panels, Product product) {
#pragma omp parallel for collapse(2)
    for (int64_t row = 0; row < rows; row += CHUNK)
        for (int64_t panel = 0; panel < panels; panel++)
            product(row, std::min(rows, row + CHUNK), panel);
}

template <typename T>
void linear(const T *x, const T *packed, const T *bias, T *y, int64_t rows, int64_t in,
            int64_t out) {
    for_each_panel(rows, (out + COLUMNS - 1) / COLUMNS, [=](int64_t row, int64_t end, int64_t i) {
        const int64_t first = i * COLUMNS;
        multiply(
            x, in, row, end, packed + first * in, in,
            [=](int64_t, vec *sums) {
                for (int64_t v = 0, c = first; v < VECTORS; v++, c += LANES)
                    sums[v] = bias == nullptr ? vec{} : load(bias + c, out - c);
            },
            [=](int64_t row, const vec *sums) {
                for (int64_t v = 0, c = first; v < VECTORS; v++, c += LANES)
                    store(y + row * out + c, sums[v], out - c);
            });
    });
}

// The first half of a panel's columns are gates, the second half what they are multiplied with. The
// biases are in the same order.
template <typename T>
void gated_linear(const T *x, const T *packed, const T *bias, T *y, int64_t rows, int64_t in,
                  int64_t out) {
    constexpr int HALF = VECTORS / 2;
    const int64_t panels = (out + COLUMNS / 2 - 1) / (COLUMNS / 2);
    for_each_panel(rows, panels, [=](int64_t row, int64_t end, int64_t i) {
        multiply(
            x, in, row, end, packed + i * COLUMNS * in, in,
            [=](int64_t, vec *sums) {
                for (int64_t v = 0; v < VECTORS; v++)
                    sums[v] = bias == nullptr ? vec{} : load(bias + i * COLUMNS + v * LANES);
            },
            [=](int64_t row, const vec *sums) {
                for (int64_t v = 0, c = i * COLUMNS / 2; v < HALF; v++, c += LANES)
                    store(y + row * out + c, silu(sums[v]) * sums[HALF + v], out - c);
            });
    });
}

}  // namespace

#define EXPORT(T, suffix)                                                                \
    extern "C" void pack_##suffix(const T *weight, T *packed, int64_t in, int64_t out) { \
        pack(weight, packed, in, out);                                                   \
    }                                                                                    \
    extern "C" void linear_##suffix(const T *x, const T *packed, const T *bias, T *y,    \
                                    int64_t rows, int64_t in, int64_t out) {             \
        linear(x, packed, bias, y, rows, in, out);                                       \
    }                                                                                    \
    extern "C" void gated_linear_##suffix(const T *x, const T *packed,                   \
                                          const T *bias, T *y, int64_t rows, int64_t in, \
                                          int64_t out) {                                 \
        gated_linear(x, packed, bias, y, rows, in, out);                                 \
    }

EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)

extern "C" int64_t panel_columns() { return COLUMNS; }
