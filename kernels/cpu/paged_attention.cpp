// Attention over the paged KV cache; see kernels/paged_attention.py.
//
// A task is a tile of query tokens of one request and one KV head; its rows are the tokens' heads
// that share it. The task walks over the keys, KEYS at a time, and takes for each row scores,
// weights, and the weighted sum of the values. The softmax is online (Milakov and Gimelshein, 2018):
// a row keeps its largest score, the sum of its weights and its sum of values, and scales the sums
// down when a larger score comes.
//
// A decode has few rows, and its time is that of reading keys and values: they are used where they
// are. Many rows share them: they are packed into panels, and products of matrices do the rest.

#include <vector>

#include "panels.h"

namespace {

constexpr int64_t QUERIES = 32;  // tokens of a tile
constexpr int64_t KEYS = 256;    // keys of a step, a multiple of COLUMNS
constexpr int64_t MANY = 8;      // rows from which packing pays
constexpr int SHARED = LANES == 8 ? 2 : 4;  // rows that share a load of values, if they are few

template <typename T>
struct Inputs {
    const T *q, *k_cache, *v_cache;  // [tokens, heads, dim], [blocks, block_size, kv_heads, dim]
    const int32_t *block_tables, *context_lens, *query_start_loc;
    T *out;
    int64_t num_requests, max_blocks, heads, kv_heads, head_dim, block_size;
    float scale;
    int64_t window;  // 0: none
};

struct Tile {
    int64_t request, first_token, num_tokens;  // tokens are rows of q
    int64_t first_position;                    // of the first one, in its sequence
};

// Keys and values of a step; those past `count` repeat the last one, and nobody sees them.
struct Step {
    int64_t start, count, padded;  // positions in the sequence
    int64_t offsets[KEYS];         // in the caches
};

// Of one row, as far as it has come; `factor` is what the last step's larger score has made of the
// sums of before.
struct Softmax {
    float largest_score = -INFINITY, sum_of_weights = 0, factor = 1;
};

// What a thread works in.
template <typename T>
struct Space {
    T *queries, *weights, *panel;  // [rows, dim], [rows, KEYS], [KEYS or dim, COLUMNS]
    float *scores, *sums;          // [rows, KEYS], [rows, width]
    Softmax *softmax;              // [rows]

    void prepare(int64_t rows, int64_t dim, int64_t width) {
        numbers.resize(rows * (dim + KEYS) + std::max(KEYS, dim) * COLUMNS);
        queries = numbers.data();
        weights = queries + rows * dim;
        panel = weights + rows * KEYS;
        floats.resize(rows * (KEYS + width));
        scores = floats.data();
        sums = scores + rows * KEYS;
        std::fill(sums, sums + rows * width, 0.0f);
        states.assign(rows, Softmax());
        softmax = states.data();
    }

  private:
    std::vector<T> numbers;
    std::vector<float> floats;
    std::vector<Softmax> states;
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Turns a row's scores into weights, of which the largest ever is 1. The row sees the keys from
// `from` up to `to` of `count`, a multiple of LANES; the other weights are 0.
template <typename W>
inline void weigh(Softmax &row, float *scores, int64_t from, int64_t to, int64_t count, W *weights) {
    row.factor = 1;
    if (from >= to) {
        for (int64_t j = 0; j < count; j += LANES) store(weights + j, vec{});
        return;
    }
    std::fill(scores, scores + from, -INFINITY);
    std::fill(scores + to, scores + count, -INFINITY);
    vec high = vec{} + row.largest_score;
    for (int64_t j = 0; j < count; j += LANES) {
        const vec score = load(scores + j);
        high = score > high ? score : high;
    }
    const float before = row.largest_score;
    row.largest_score = largest(high);
    row.factor = exp(vec{} + (before - row.largest_score))[0];
    vec total = {};
    for (int64_t j = 0; j < count; j += LANES) {
        const vec weight = exp(load(scores + j) - row.largest_score);
        store(weights + j, weight);
        total += weight;
    }
    row.sum_of_weights = row.sum_of_weights * row.factor + sum(total);
}

// Sums of products, spread over a vector.
template <typename T>
inline vec dot(const T *a, const T *b, int64_t dim) {
    constexpr int STEP = LANES * Unit<T>::SIZE;
    vec total = {};
    int64_t d = 0;
    for (; d + STEP <= dim; d += STEP)
        total = Unit<T>::multiply_add(total, load_units(a + d), load_units(b + d));
    for (; d < dim; d += LANES) total += load(a + d, dim - d) * load(b + d, dim - d);
    return total;
}

// One task. `DIM` is the head dimension where it is a common one: known loops are unrolled.
template <typename T, int DIM>
struct Task {
    const Inputs<T> &in;
    const Tile &tile;
    const int64_t kv;
    Space<T> &space;
    Step step = {};
    const int64_t dim = DIM ? DIM : in.head_dim, width = round_up(dim, COLUMNS);
    const int64_t group = in.heads / in.kv_heads, rows = tile.num_tokens * group;
    const bool many = rows >= MANY && dim % Unit<T>::SIZE == 0;
    const T *const k_cache = in.k_cache + kv * dim, *const v_cache = in.v_cache + kv * dim;

    void run() {
        space.prepare(rows, dim, width);
        for (int64_t row = 0; row < rows; row++)
            std::memcpy(space.queries + row * dim, of_row(in.q, row), dim * sizeof(T));
        const int64_t end = tile.first_position + tile.num_tokens;
        for (step.start = sees_from(tile.first_position); step.start < end; step.start += KEYS) {
            step.count = std::min(KEYS, end - step.start);
            step.padded = round_up(step.count, many ? COLUMNS : LANES);
            locate();
            if (many)
                by_products();
            else
                by_rows();
        }
        for (int64_t row = 0; row < rows; row++)
            for (int64_t d = 0; d < dim; d += LANES)
                store(of_row(in.out, row) + d,
                      load(space.sums + row * width + d) / space.softmax[row].sum_of_weights,
                      dim - d);
    }

    template <typename P>
    P *of_row(P *tensor, int64_t row) const {  // of q or out
        const int64_t token = tile.first_token + row / group, head = kv * group + row % group;
        return tensor + (token * in.heads + head) * dim;
    }

    int64_t sees_from(int64_t position) const {
        return in.window > 0 ? std::max<int64_t>(0, position + 1 - in.window) : 0;
    }

    void locate() {
        const int32_t *table = in.block_tables + tile.request * in.max_blocks;
        int64_t block = step.start / in.block_size, within = step.start % in.block_size;
        for (int64_t j = 0; j < step.padded; j++) {
            step.offsets[j] = (table[block] * in.block_size + within) * in.kv_heads * dim;
            if (j + 1 >= step.count) continue;
            within = within + 1 == in.block_size ? 0 : within + 1;
            block += within == 0;
        }
    }

    template <typename W>
    void weigh_row(int64_t row, W *weights) {
        const int64_t position = tile.first_position + row / group;
        const int64_t from = std::max(sees_from(position), step.start) - step.start;
        const int64_t to = std::min(position + 1 - step.start, step.count);
        weigh(space.softmax[row], space.scores + row * KEYS, from, to, step.padded, weights);
    }

    void by_products() {
        for (int64_t first = 0; first < step.padded; first += COLUMNS) {
            pack_columns(space.panel, dim,
                         [&](int64_t j) { return k_cache + step.offsets[first + j]; });
            multiply(
                space.queries, dim, 0, rows, space.panel, dim,
                [](int64_t, vec *sums) { std::fill(sums, sums + VECTORS, vec{}); },
                [&](int64_t row, const vec *sums) {
                    float *scores = space.scores + row * KEYS + first;
                    for (int v = 0; v < VECTORS; v++) store(scores + v * LANES, sums[v] * in.scale);
                });
        }
        for (int64_t row = 0; row < rows; row++) weigh_row(row, space.weights + row * KEYS);
        const int64_t count = round_up(step.count, Unit<T>::SIZE);
        for (int64_t first = 0; first < dim; first += COLUMNS) {
            pack_rows(space.panel, count, dim - first,
                      [&](int64_t j) { return v_cache + step.offsets[j] + first; });
            multiply(
                space.weights, KEYS, 0, rows, space.panel, count,
                [&](int64_t row, vec *sums) {
                    const float *before = space.sums + row * width + first;
                    const float factor = space.softmax[row].factor;
                    for (int v = 0; v < VECTORS; v++) sums[v] = load(before + v * LANES) * factor;
                },
                [&](int64_t row, const vec *sums) {
                    float *now = space.sums + row * width + first;
                    for (int v = 0; v < VECTORS; v++) store(now + v * LANES, sums[v]);
                });
        }
    }

    void by_rows() {
        for (int64_t j = 0; j < step.padded; j += LANES) {
            for (int64_t row = 0; row < rows; row++) {
                vec parts[LANES];
                for (int i = 0; i < LANES; i++)
                    parts[i] = dot(space.queries + row * dim, k_cache + step.offsets[j + i], dim);
                store(space.scores + row * KEYS + j, sums_of(parts) * in.scale);
            }
        }
        for (int64_t row = 0; row < rows; row++) weigh_row(row, space.scores + row * KEYS);
        for (int64_t row = 0; row < rows; row += SHARED) {
            switch (std::min<int64_t>(SHARED, rows - row)) {
                case 1: add_values<1>(row); break;
                case 2: add_values<2>(row); break;
                case 3: add_values<3>(row); break;
                case 4: add_values<4>(row); break;
            }
        }
    }

    // Adds the weighted values to the sums of N rows, V vectors of them at a time.
    template <int N>
    void add_values(int64_t first) {
        constexpr int V = DIM && DIM / LANES % 4 == 0 ? 4 : 1;
        const float *weights = space.scores + first * KEYS;
        for (int64_t d = 0; d < dim; d += V * LANES) {
            float *sums = space.sums + first * width + d;
            vec total[N][V];
            for (int n = 0; n < N; n++)
                for (int v = 0; v < V; v++)
                    total[n][v] =
                        load(sums + n * width + v * LANES) * space.softmax[first + n].factor;
            for (int64_t j = 0; j < step.count; j++) {
                const T *value = v_cache + step.offsets[j] + d;
                for (int v = 0; v < V; v++) {
                    const vec part = load(value + v * LANES, dim - d - v * LANES);
                    for (int n = 0; n < N; n++) total[n][v] += weights[n * KEYS + j] * part;
                }
            }
            for (int n = 0; n < N; n++)
                for (int v = 0; v < V; v++) store(sums + n * width + v * LANES, total[n][v]);
        }
    }
};

template <typename T, int DIM>
void attend(const Inputs<T> &in, const Tile &tile, int64_t kv) {
    thread_local Space<T> space;
    Task<T, DIM>{in, tile, kv, space}.run();
}

template <typename T>
void paged_attention(const Inputs<T> &in) {
    std::vector<Tile> tiles;
    for (int64_t r = 0; r < in.num_requests; r++)
        for (int64_t t = in.query_start_loc[r]; t < in.query_start_loc[r + 1]; t += QUERIES) {
            const int64_t left = in.query_start_loc[r + 1] - t;
            tiles.push_back({r, t, std::min(QUERIES, left), in.context_lens[r] - left});
        }
    const auto one = in.head_dim == 64    ? attend<T, 64>
                     : in.head_dim == 128 ? attend<T, 128>
                                          : attend<T, 0>;
    const int64_t part = tiles.size() >= 8 ? in.kv_heads : 1;  // KV heads lie side by side
#pragma omp parallel for collapse(2) schedule(dynamic, part)
    for (size_t i = 0; i < tiles.size(); i++)
        for (int64_t kv = 0; kv < in.kv_heads; kv++) one(in, tiles[i], kv);
}

}  // namespace

#define EXPORT(T, suffix)                                                                         \
    extern "C" void paged_attention_##suffix(                                                     \
        const T *q, const T *k_cache, const T *v_cache, const int32_t *block_tables,              \
        const int32_t *context_lens, const int32_t *query_start_loc, T *out,                      \
        int64_t num_requests, int64_t max_blocks, int64_t heads, int64_t kv_heads,                \
        int64_t head_dim, int64_t block_size, float scale, int64_t window) {                      \
        paged_attention<T>({q, k_cache, v_cache, block_tables, context_lens, query_start_loc,     \
                            out, num_requests, max_blocks, heads, kv_heads, head_dim, block_size, \
                            scale, window});                                                      \
    }

EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)
