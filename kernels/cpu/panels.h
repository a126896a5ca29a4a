// Products of rows with a panel of columns, of which larger products are made.
//
// A panel holds COLUMNS columns of a matrix in the order in which the product reads them: one number
// of each column (for bfloat16 two neighbours), then the next of each. ROWS x COLUMNS sums stay in
// registers; a step of the loop reads COLUMNS numbers of the panel and one of each row.

#pragma once

#include "vector.h"

namespace {

constexpr int VECTORS = LANES == 8 ? 2 : 4;  // AVX2 has 16 registers, AVX-512 and NEON have 32
constexpr int ROWS = 6, COLUMNS = VECTORS * LANES;

// Packs a panel; `column(c)` is where the numbers of a column begin, one after another.
template <typename T, typename Column>
inline void pack_columns(T *panel, int64_t length, Column column) {
    constexpr int SIZE = Unit<T>::SIZE;
    for (int64_t c = 0; c < COLUMNS; c++) {
        const T *from = column(c);
        for (int64_t k = 0; k < length; k += SIZE) {
            T *to = panel + k * COLUMNS + c * SIZE;
            if (from == nullptr)
                std::fill(to, to + SIZE, T{});
            else
                std::memcpy(to, from + k, SIZE * sizeof(T));
        }
    }
}

// The same of a matrix that lies in rows; `row(k)` is where row k begins, of which `left` columns are
// there.
template <typename T, typename Row>
inline void pack_rows(T *panel, int64_t length, int64_t left, Row row) {
    constexpr int SIZE = Unit<T>::SIZE;
    const int64_t columns = std::min<int64_t>(left, COLUMNS);
    for (int64_t k = 0; k < length; k += SIZE, panel += SIZE * COLUMNS) {
        if (columns < COLUMNS) std::fill(panel, panel + SIZE * COLUMNS, T{});
        for (int64_t i = 0; i < SIZE; i++) {
            const T *from = row(k + i);
            for (int64_t c = 0; c < columns; c++) panel[c * SIZE + i] = from[c];
        }
    }
}

template <typename T, int N, typename Start, typename Finish>
inline void multiply_rows(const T *x, int64_t stride, int64_t first, const T *panel, int64_t length,
                          Start start, Finish finish) {
    typedef Unit<T> U;
    vec sums[N][VECTORS];
    for (int row = 0; row < N; row++) start(first + row, sums[row]);
    for (int64_t k = 0; k < length; k += U::SIZE, panel += COLUMNS * U::SIZE) {
        typename U::units columns[VECTORS];
        for (int v = 0; v < VECTORS; v++) columns[v] = load_units(panel + v * LANES * U::SIZE);
        for (int row = 0; row < N; row++) {
            const auto one = U::broadcast(x + (first + row) * stride + k);
            for (int v = 0; v < VECTORS; v++)
                sums[row][v] = U::multiply_add(sums[row][v], one, columns[v]);
        }
    }
    for (int row = 0; row < N; row++) finish(first + row, sums[row]);
}

// Multiplies rows `first` to `last` of `x` by a panel. `start(row, sums)` sets where the sums of a
// row begin, `finish(row, sums)` takes them; they are VECTORS vectors.
template <typename T, typename Start, typename Finish>
void multiply(const T *x, int64_t stride, int64_t first, int64_t last, const T *panel,
              int64_t length, Start start, Finish finish) {
    for (; first + ROWS <= last; first += ROWS)
        multiply_rows<T, ROWS>(x, stride, first, panel, length, start, finish);
    switch (last - first) {
        case 1: return multiply_rows<T, 1>(x, stride, first, panel, length, start, finish);
        case 2: return multiply_rows<T, 2>(x, stride, first, panel, length, start, finish);
        case 3: return multiply_rows<T, 3>(x, stride, first, panel, length, start, finish);
        case 4: return multiply_rows<T, 4>(x, stride, first, panel, length, start, finish);
        case 5: return multiply_rows<T, 5>(x, stride, first, panel, length, start, finish);
    }
}

}  // namespace
