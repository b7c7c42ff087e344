// The nearest others of every row of a matrix: each pair is screened once, for both of its rows.
//
// Rows are taken in a random order, block by block. All rows pass over the first block, a fair sample, which gives each a guess of how
// large a product must be to matter (encode.cpp has the bounds and the guesses). Then the rows of each block pass over the blocks from
// theirs on: what is found for the later row of a pair goes to it at once, for one thread holds its block; what is found for the earlier
// row is written down and goes to it when the block is done. So what is found does not depend on the number of threads.
#include <numeric>

#include "scan.h"

namespace {

struct Entry {
    float value;
    int32_t latent;
};
static inline bool before(const Entry& a, const Entry& b) {  // the total order of selection
    return a.value > b.value || (a.value == b.value && a.latent < b.latent);
}

// The k best of each row so far, and some that were among them once. A product matters where it reaches `limit`, which rises to the k-th
// best, and sooner by a guess from the blocks seen; where the guess was too high, which the end shows, the row is done again.
struct Best {
    int64_t k, room;
    Array<float> limits, guesses;
    std::vector<Entry> entries;
    Array<int32_t> sizes;

    Best(int64_t tokens, int64_t k) : k(k), room(2 * k + 32), limits(tokens), guesses(tokens), entries(tokens * room), sizes(tokens) {}
    void guess(int64_t token, float value) {
        guesses[token] = std::max(guesses[token], value);
        limits[token] = std::max(limits[token], value);
    }
    void offer(int64_t token, int64_t row, float z) {
        if (!(z > 0 && z >= limits[token])) return;
        Entry* found = entries.data() + token * room;
        found[sizes[token]++] = {z, (int32_t)row};
        if (sizes[token] == room) {
            std::nth_element(found, found + k - 1, found + room, before);
            sizes[token] = (int32_t)k;
            limits[token] = std::max(limits[token], found[k - 1].value);
        }
    }
    void look_back(int64_t token, int64_t rank) {
        if (sizes[token] < rank) return;
        Entry* found = entries.data() + token * room;
        std::nth_element(found, found + rank - 1, found + sizes[token], before);
        if (rank < k)
            guess(token, found[rank - 1].value);
        else
            limits[token] = std::max(limits[token], found[rank - 1].value);
    }
};

// As `safe_rank` (contenders.h), but less safe: a row that is done again costs twice what it would have cost, and the others gain.
int64_t likely_rank(int64_t k, double share) {
    const double expected = k * share;
    return std::min<int64_t>(k, (int64_t)(expected + 2.5 * std::sqrt(expected) + 2));
}

// 2, 3, 4, 6, 8, 12, 16, ...: when it is worth to look back.
bool often(int64_t done) {
    while (done % 2 == 0 && done > 2) done /= 2;
    return done == 2 || done == 3 || done == 1;
}

struct Found {
    int32_t token;
    Entry entry;
};

struct Rows {
    const float* w;         // rows in a random order
    const int32_t* number;  // of each row
    int64_t num, width, size;

    int64_t blocks() const { return (num + size - 1) / size; }
    int64_t count(int64_t block) const { return std::min(size, num - block * size); }
};

// The pairs of a tile of tokens, whose places in the order begin at `first`, with a block whose places begin at `other`.
template <class Screen>
void pass(const Problem& problem, const Tokens<Screen>& tokens, const Block<Screen>& block, int64_t tile, int64_t first, int64_t other,
          bool to_block, const int32_t* number, Best& keep, Array<int32_t>& places, Array<float>& z, std::vector<Found>& found,
          int64_t& computed) {
    const int64_t token0 = tile * Screen::TOKENS, words = tokens.words;
    const int held = (int)std::min<int64_t>(Screen::TOKENS, problem.tokens - token0);
    int32_t counts[Screen::TOKENS] = {};
    for (int64_t at = 0; at < block.size; at += PANEL) {
        typename Screen::sums c[Screen::TOKENS][2];
        multiply<Screen>(tokens.packed.data + token0 * words, block.packed.data + at * words, block.start.data() + at, words, c);
        uint32_t bits[Screen::TOKENS][2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const int64_t j = at + half * LANES;
            const Floats block_unit = load(block.unit.data() + j), block_bias = load(block.bias.data() + j),
                         block_norm = load(block.norm.data() + j), block_missed = load(block.missed.data() + j),
                         block_limit = to_block ? load(keep.limits.data() + other + j) : all(INFINITY);
#pragma GCC unroll 12
            for (int i = 0; i < Screen::TOKENS; i++) {
                const int64_t token = token0 + (i < held ? i : 0);
                const Floats slack = all(tokens.missed[token]) * block_norm + all(tokens.norm[token]) * block_missed;
                const Floats most = Screen::value(c[i][half]) * (all(tokens.unit[token]) * block_unit) + (block_bias + slack);
                const Floats own = all(keep.limits[first + token]);
                bits[i][half] = at_least(most, own < block_limit ? own : block_limit);
            }
        }
        for (int i = 0; i < held; i++)
            for (uint64_t left = bits[i][0] | (uint64_t)bits[i][1] << LANES; left; left &= left - 1)
                places[i * block.most + counts[i]++] = block.row[at + __builtin_ctzll(left)];
    }
    for (int i = 0; i < held; i++) {
        const int64_t token = token0 + i;
        const int32_t* of = places.data() + i * block.most;
        problem.scores(token, of, counts[i], z.data());
        computed += counts[i];
        for (int32_t n = 0; n < counts[i]; n++) {
            if (z[n] > 0 && z[n] >= keep.limits[first + token]) found.push_back({(int32_t)token, {z[n], number[of[n]]}});
            if (to_block) keep.offer(of[n], number[first + token], z[n]);
        }
    }
}

// The largest scores of a tile of tokens with the first block are written down, and a guess is read off from them.
template <class Screen>
void sample(const Problem& problem, const Tokens<Screen>& tokens, const Block<Screen>& block, int64_t tile, int64_t first,
            const int32_t* number, Best& keep, Array<float>& scores, Array<int32_t>& places, Array<float>& z,
            int64_t& computed) {
    const int64_t padded = block.padded(), token0 = tile * Screen::TOKENS;
    const int64_t rank = std::min(block.size, likely_rank(keep.k, (double)block.size / problem.num));
    float* best = tile_scores<Screen>(tokens, block, tile, scores);
    const int held = (int)std::min<int64_t>(Screen::TOKENS, problem.tokens - token0);
    for (int i = 0; i < held; i++) {
        const int64_t token = token0 + i, place = first + token;
        const float* of = scores.data() + i * padded;
        const float slack = tokens.missed[token] * block.longest + tokens.norm[token] * block.worst;
        keep.guess(place, rank_of_groups(of, padded, rank, best) - slack);
        const Floats limit = all(keep.limits[place] - slack);
        int32_t count = 0;
        for (int64_t at = 0; at < padded; at += LANES)
            for (uint32_t left = at_least(load(of + at), limit); left; left &= left - 1)
                places[count++] = block.row[at + __builtin_ctz(left)];
        problem.scores(token, places.data(), count, z.data());
        for (int32_t n = 0; n < count; n++) keep.offer(place, number[places[n]], z[n]);
        computed += count;
    }
}

template <class Screen>
bool run(const Rows& all_rows, const float* zeros, int threads, Best& keep, int64_t& computed) {
    const int64_t words = words_of<Screen>(all_rows.width), num_blocks = all_rows.blocks(), size = all_rows.size;
    const int64_t most = (size + PANEL - 1) / PANEL * PANEL;
    auto of_block = [&](int64_t a) {
        return Problem{all_rows.w + a * size * all_rows.width, all_rows.w, zeros, nullptr, nullptr, all_rows.count(a), all_rows.width, all_rows.num};
    };
    std::vector<std::unique_ptr<Block<Screen>>> blocks(num_blocks);
    bool finite = true;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) reduction(&& : finite)
    for (int64_t b = 0; b < num_blocks; b++) {
        blocks[b] = std::make_unique<Block<Screen>>(most, words);
        finite = blocks[b]->fill(of_block(b), Share::range(b * size, b * size + all_rows.count(b)), words, nullptr) && finite;
    }
    if (!finite) return false;
    std::vector<std::vector<Found>> found(threads);
    int64_t total = 0;
    for (int64_t a = 0; a < num_blocks; a++) {
        const Problem problem = of_block(a);
        const Tokens<Screen> tokens(problem, threads);
#pragma omp parallel num_threads(threads) reduction(+ : total)
        {
            const Multiplying<Screen> multiplying;
            Array<float> scores, z(most);
            Array<int32_t> places(most);
#pragma omp for schedule(dynamic, 1)
            for (int64_t tile = 0; tile < tokens.tiles; tile++)
                sample(problem, tokens, *blocks[0], tile, a * size, all_rows.number, keep, scores, places, z, total);
        }
    }
    for (int64_t a = 0; a < num_blocks; a++) {
        const Problem problem = of_block(a);
        const Tokens<Screen> tokens(problem, threads);
#pragma omp parallel num_threads(threads) reduction(+ : total)
        {
            const Multiplying<Screen> multiplying;
            Array<float> z(most);
            Array<int32_t> places(Screen::TOKENS * most);
            std::vector<Found>& own = found[omp_get_thread_num()];
#pragma omp for schedule(dynamic, 1)
            for (int64_t b = std::max<int64_t>(a, 1); b < num_blocks; b++)
                for (int64_t tile = 0; tile < tokens.tiles; tile++)
                    pass(problem, tokens, *blocks[b], tile, a * size, b * size, a > 0 && b > a, all_rows.number, keep, places, z, own,
                         total);
        }
        for (auto& part : found) {
            for (const Found& each : part) keep.offer(a * size + each.token, each.entry.latent, each.entry.value);
            part.clear();
        }
        const int64_t done = a + 1, rank = likely_rank(keep.k, (double)done / num_blocks);
        if (done > 1 && often(done) && done < num_blocks)
#pragma omp parallel for schedule(static) num_threads(threads)
            for (int64_t place = done * size; place < all_rows.num; place++) keep.look_back(place, rank);
    }
    computed += total;
    return true;
}

}  // namespace

extern "C" {

// For each row the k largest products with all rows, itself among them: values and indices [F, k], best first, where there are fewer than k
// above zero followed by 0 and -1. The rows are in a random order, `number` has the number of each;
// `zeros` [F] are 0. In `again` [F] are the rows for which a guess was
// too high, to be done in another way; returns how many, or -1 where rows are not finite.
int64_t saebench_nearest(const float* w, const int32_t* number, const float* zeros, int64_t num, int64_t width, int64_t k, int bits, int threads,
                         float* values, int32_t* indices, int32_t* again, int64_t* computed) {
    constexpr int64_t STEP = std::lcm((int64_t)TILE_TOKENS, (int64_t)PANEL);
    const int64_t row_bytes = width * bits / 8;
    const Rows rows{w, number, num, width, std::max<int64_t>(STEP, std::min<int64_t>(BLOCK_LATENTS, BLOCK_BYTES / row_bytes) / STEP * STEP)};
    Best keep(rows.blocks() * rows.size, k);
    bool finite;
#if defined(MATRIX_UNIT)
    if (bits == 8 && Tiles::granted()) finite = run<Tiles>(rows, zeros, threads, keep, *computed);
    else
#endif
#if defined(BYTES_AND_PAIRS)
    if (bits == 8) finite = run<Bytes>(rows, zeros, threads, keep, *computed);
    else
#endif
#if defined(PAIRS) || defined(BYTES_AND_PAIRS)
    if (bits == 16) finite = run<Pairs>(rows, zeros, threads, keep, *computed);
    else
#endif
    finite = run<Float32>(rows, zeros, threads, keep, *computed);
    if (!finite) return -1;
    int64_t failed = 0;
    for (int64_t place = 0; place < num; place++) {
        const int64_t row = number[place];
        Entry* found = &keep.entries[place * keep.room];
        const int64_t count = std::min<int64_t>(k, keep.sizes[place]);
        std::partial_sort(found, found + count, found + keep.sizes[place], before);
        for (int64_t j = 0; j < k; j++) {
            values[row * k + j] = j < count ? found[j].value : 0.f;
            indices[row * k + j] = j < count ? found[j].latent : -1;
        }
        if (keep.guesses[place] > 0 && values[row * k + k - 1] < keep.guesses[place]) again[failed++] = (int32_t)row;
    }
    return failed;
}
}
