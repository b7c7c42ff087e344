// Statistics of the postings of a range of latents, and their merging (saebench/kernels/posting_statistics.py has the contract).
//
// Postings of latent f of the range: starts[f] .. starts[f + 1], tokens ascending, values in float16. A latent is one thread's alone, and
// sums have the order of the postings, so results have the same bits for any number of threads.
#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "simd.h"

namespace {

static inline float widened(uint16_t half) {  // finite
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    const uint32_t exponent = half >> 10 & 31, mantissa = half & 0x3ff;
    float x = mantissa * 0x1p-24f;  // right for subnormals
    if (exponent) {
        const uint32_t bits = (exponent + 112) << 23 | mantissa << 13;
        std::memcpy(&x, &bits, 4);
    }
    return half >> 15 ? -x : x;
#endif
}

// Adds to counts[b] the values from edge b up to the next; the last bin is closed.
void add_to_histogram(const uint16_t* values, int64_t n, double low, double high, int64_t bins, double* edges, int64_t* counts) {
    const double width = (high - low) / bins;
    if (!(width > 0)) {
        counts[bins - 1] += n;
        return;
    }
    for (int64_t b = 0; b <= bins; b++) {
        const volatile double step = b * width;  // rounded by itself: fused with the sum, it would not be numpy's
        edges[b] = low + step;
    }
    const double per = 1 / width;
    for (int64_t i = 0; i < n; i++) {
        const double v = widened(values[i]);
        int64_t b = std::clamp<int64_t>((int64_t)((v - low) * per), 0, bins - 1);  // the right one or one beside it
        while (b > 0 && v < edges[b]) b--;
        while (b + 1 < bins && v >= edges[b + 1]) b++;
        counts[b]++;
    }
}

constexpr int64_t IDS_AHEAD = 32;  // postings whose ids are on their way from memory

struct Tally {  // of one id of the vocabulary
    double sum;
    int64_t count;
};

struct Id {
    double sum;
    int64_t count;
    int32_t id;
    bool operator<(const Id& other) const { return sum != other.sum ? sum > other.sum : id < other.id; }  // better ones first
};

// Codes of consecutive tokens: those of token t at latents[starts[t - first]] .. latents[starts[t - first + 1]].
struct Chunk {
    int64_t first, last;
    const int64_t* starts;
    const int32_t* latents;
};

struct Row {
    const int32_t *begin, *end;
};

// Where the rows of ascending tokens are.
struct Walk {
    const std::vector<Chunk>& chunks;
    size_t at = 0;
    const int64_t* start(int64_t token) {  // null where no chunk has this token
        while (at < chunks.size() && token >= chunks[at].last) at++;
        return at < chunks.size() && token >= chunks[at].first ? chunks[at].starts + (token - chunks[at].first) : nullptr;
    }
    Row row(int64_t token) {
        const int64_t* begin = start(token);
        return begin ? Row{chunks[at].latents + begin[0], chunks[at].latents + begin[1]} : Row{nullptr, nullptr};
    }
};

constexpr int64_t ROWS_AHEAD = 16;  // postings whose rows are on their way from memory, and after them as many whose starts are
constexpr int SECOND_LEVEL = 2;     // of the cache: the first one waits for few lines at a time, which took half as long again
constexpr uintptr_t LINE = 64;

template <class Do>
void for_rows(const int32_t* tokens, int64_t n, const std::vector<Chunk>& chunks, const Do& use) {
    Row ahead[ROWS_AHEAD];
    Walk near{chunks}, far{chunks};
    for (int64_t i = -2 * ROWS_AHEAD; i < n; i++) {
        Row& row = ahead[(i + 2 * ROWS_AHEAD) % ROWS_AHEAD];
        if (i >= 0) use(row);
        if (i + ROWS_AHEAD >= 0 && i + ROWS_AHEAD < n) {
            row = near.row(tokens[i + ROWS_AHEAD]);
            for (uintptr_t p = (uintptr_t)row.begin & -LINE; p < (uintptr_t)row.end; p += LINE)
                __builtin_prefetch((void*)p, 0, SECOND_LEVEL);
        }
        if (i + 2 * ROWS_AHEAD < n)
            if (const int64_t* start = far.start(tokens[i + 2 * ROWS_AHEAD])) __builtin_prefetch(start, 0, SECOND_LEVEL);
    }
}

struct Pair {
    double phi;
    int32_t together, latent;
    bool operator<(const Pair& other) const {  // better ones first
        return phi != other.phi ? phi > other.phi : together != other.together ? together > other.together : latent < other.latent;
    }
};

// The best `count` of what it is shown, the worst of them in front.
struct Best {
    size_t count;
    std::vector<Pair> pairs{};
    double limit() const { return pairs.size() < count ? -std::numeric_limits<double>::infinity() : pairs.front().phi; }
    void show(const Pair& pair) {
        if (pairs.size() == count) {
            if (!(pair < pairs.front())) return;
            std::pop_heap(pairs.begin(), pairs.end());
            pairs.back() = pair;
        } else {
            pairs.push_back(pair);
        }
        std::push_heap(pairs.begin(), pairs.end());
    }
};

// Phi of a latent with others; spread[g] is the root of n_g (T - n_g), or infinite where that is 0.
struct Phi {
    int64_t tokens, firings;
    double spread;
    const int64_t* counts;
    const double* spreads;
    double excess(int32_t together, int64_t g) const { return (double)(together * tokens - firings * counts[g]); }
    double operator()(int32_t together, int64_t g) const { return excess(together, g) / (spread * spreads[g]); }
};

constexpr int64_t BLOCK = 32;   // latents that are passed over at once
constexpr int64_t SPARSE = 16;  // with fewer codes to count than one in so many latents, those that were touched are listed

// Shows `best` all latents that share a token. Most are passed over without a division, by a bound a little below the limit.
void show_all(const int32_t* together, int64_t num, const Phi& phi, Best& best) {
    for (int64_t at = 0; at < num; at += BLOCK) {
        const int64_t size = std::min(BLOCK, num - at);
        const double limit = best.limit() * phi.spread, bound = limit - 1e-12 * std::fabs(limit);
        int64_t any = 0;
        for (int64_t g = at; g < at + size; g++) any |= (together[g] > 0) & !(phi.excess(together[g], g) < bound * phi.spreads[g]);
        if (!any) continue;
        for (int64_t g = at; g < at + size; g++)
            if (together[g] > 0) {
                const double found = phi(together[g], g);
                if (found >= best.limit()) best.show({found, together[g], (int32_t)g});
            }
    }
}

// Latents with the most postings first, so that no thread is left alone with a long one.
std::vector<int64_t> longest_first(const int64_t* starts, int64_t num) {
    std::vector<int64_t> order(num);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return starts[a + 1] - starts[a] > starts[b + 1] - starts[b]; });
    return order;
}

}  // namespace

extern "C" {

// powers [4, F]; low, high, contexts [F]; histogram [F, bins] and positions [F, position_bins], all zero before.
void saebench_moments(const int64_t* starts, const int32_t* tokens, const uint16_t* values, int64_t num, int64_t context_size,
                      int64_t bins, int64_t position_bins, int threads, double* powers, float* low, float* high, int64_t* contexts,
                      int64_t* histogram, int64_t* positions) {
    const uint32_t size = (uint32_t)context_size;
    std::vector<int32_t> bin_of(context_size);
    for (int64_t p = 0; p < context_size; p++) bin_of[p] = (int32_t)(p * position_bins / context_size);
#pragma omp parallel num_threads(threads)
    {
        std::vector<double> edges(bins + 1);
#pragma omp for schedule(dynamic, 16)
        for (int64_t f = 0; f < num; f++) {
            double sums[4]{};
            float least = 0, most = 0;
            int64_t distinct = 0;
            uint32_t before = (uint32_t)-1;
            for (int64_t i = starts[f]; i < starts[f + 1]; i++) {
                const float v = widened(values[i]);
                const double x = v, x2 = x * x;  // powers of a float16 have no more than 44 bits: exact
                sums[0] += x, sums[1] += x2, sums[2] += x2 * x, sums[3] += x2 * x2;
                least = i == starts[f] ? v : std::min(least, v);
                most = i == starts[f] ? v : std::max(most, v);
                const uint32_t context = (uint32_t)tokens[i] / size;  // of 32 bits: twice as fast as of 64
                distinct += context != before;
                before = context;
                positions[f * position_bins + bin_of[tokens[i] - context * size]]++;
            }
            for (int p = 0; p < 4; p++) powers[p * num + f] = sums[p];
            low[f] = least, high[f] = most, contexts[f] = distinct;
            add_to_histogram(values + starts[f], starts[f + 1] - starts[f], std::min(0.f, least), most, bins, edges.data(),
                             histogram + f * bins);
        }
    }
}

// ids (-1), counts and sums (0) [F, count] hold padding before. False where an id is outside the vocabulary.
int saebench_top_tokens(const int64_t* starts, const int32_t* tokens, const uint16_t* values, const int32_t* id_of, int64_t num,
                        int64_t vocabulary, int64_t count, int threads, int32_t* ids, int64_t* counts, double* sums,
                        int64_t* distinct) {
    int valid = 1;
#pragma omp parallel num_threads(threads) reduction(&& : valid)
    {
        std::vector<Tally> tallies(vocabulary);
        std::vector<Id> touched;
#pragma omp for schedule(dynamic, 16)
        for (int64_t f = 0; f < num; f++) {
            const int64_t last = starts[f + 1] - 1;
            touched.clear();
            for (int64_t i = starts[f]; i <= last; i++) {
                __builtin_prefetch(id_of + tokens[std::min(i + IDS_AHEAD, last)], 0, SECOND_LEVEL);
                const int32_t id = id_of[tokens[i]];
                if (id < 0 || id >= vocabulary) {
                    valid = 0;
                    continue;
                }
                Tally& tally = tallies[id];
                if (!tally.count++) touched.push_back({0, 0, id});
                tally.sum += widened(values[i]);
            }
            for (Id& each : touched) {
                Tally& tally = tallies[each.id];
                each.sum = tally.sum, each.count = tally.count;
                tally = {};
            }
            const int64_t kept = std::min<int64_t>(count, touched.size());
            std::partial_sort(touched.begin(), touched.begin() + kept, touched.end());
            for (int64_t i = 0; i < kept; i++) {
                ids[f * count + i] = touched[i].id;
                counts[f * count + i] = touched[i].count;
                sums[f * count + i] = touched[i].sum;
            }
            distinct[f] = touched.size();
        }
    }
    return valid;
}

// `firings` and `spreads` of `all` latents; chunks of codes in the order of tokens. latents (-1), together and phis (0) [num, count] hold
// padding before.
void saebench_coactivation(const int64_t* starts, const int32_t* tokens, int64_t num, int64_t num_chunks, const int64_t* firsts,
                           const int64_t* sizes, const int64_t* const* chunk_starts, const int32_t* const* chunk_latents,
                           const int64_t* firings, const double* spreads, int64_t all, int64_t num_tokens, int64_t first_latent,
                           int64_t count, int threads, int32_t* latents, int64_t* together, double* phis) {
    std::vector<Chunk> chunks;
    int64_t codes = 0, rows = 0;
    for (int64_t c = 0; c < num_chunks; c++) {
        chunks.push_back({firsts[c], firsts[c] + sizes[c], chunk_starts[c], chunk_latents[c]});
        codes += chunk_starts[c][sizes[c]] - chunk_starts[c][0], rows += sizes[c];
    }
    const double length = rows ? (double)codes / rows : 0;
    const std::vector<int64_t> order = longest_first(starts, num);
#pragma omp parallel num_threads(threads)
    {
        std::vector<int32_t> counters(all), touched;
        int32_t* const counter = counters.data();
#pragma omp for schedule(dynamic, 1)
        for (int64_t o = 0; o < num; o++) {
            const int64_t i = order[o], f = first_latent + i, n = starts[i + 1] - starts[i];
            const int32_t* own = tokens + starts[i];
            const Phi phi{num_tokens, firings[f], spreads[f], firings, spreads};
            Best best{(size_t)count};
            if (n * length * SPARSE < all) {
                touched.clear();
                for_rows(own, n, chunks, [&](const Row& row) {
                    for (const int32_t* g = row.begin; g < row.end; g++)
                        if (!counter[*g]++) touched.push_back(*g);
                });
                for (const int32_t g : touched) {
                    if (g != f) {
                        const double found = phi(counter[g], g);
                        if (found >= best.limit()) best.show({found, counter[g], g});
                    }
                    counter[g] = 0;
                }
            } else {
                for_rows(own, n, chunks, [&](const Row& row) {
#pragma GCC unroll 8
                    for (const int32_t* g = row.begin; g < row.end; g++) counter[*g]++;
                });
                counter[f] = 0;
                show_all(counter, all, phi, best);
                std::fill(counter, counter + all, 0);
            }
            std::sort_heap(best.pairs.begin(), best.pairs.end());
            for (size_t j = 0; j < best.pairs.size(); j++) {
                latents[i * count + j] = best.pairs[j].latent;
                together[i * count + j] = best.pairs[j].together;
                phis[i * count + j] = best.pairs[j].phi;
            }
        }
    }
}

// Postings of latents first .. first + num of all runs, to tokens and values [starts[num]].
void saebench_merge_runs(int64_t num_runs, const int64_t* const* run_starts, const int32_t* const* run_tokens,
                         const uint16_t* const* run_values, int64_t first, int64_t num, const int64_t* starts, int threads,
                         int32_t* tokens, uint16_t* values) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
    for (int64_t f = 0; f < num; f++) {
        int64_t at = starts[f];
        for (int64_t r = 0; r < num_runs; r++) {
            const int64_t from = run_starts[r][first + f], n = run_starts[r][first + f + 1] - from;
            std::memcpy(tokens + at, run_tokens[r] + from, n * sizeof(int32_t));
            std::memcpy(values + at, run_values[r] + from, n * sizeof(uint16_t));
            at += n;
        }
    }
}
}
