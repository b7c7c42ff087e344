// Encode and select without ever holding the scores (methods.md K4, K11, K13).
//
// Latents are packed in blocks, tokens pass over them in tiles whose sums stay in registers, and a score that is not selected leaves no
// trace. Scores are screened in few bits: tokens and latents are rounded to 8 or 16 bit integers with a known error, so a score
// has an upper bound by Cauchy-Schwarz:
//     z = (x . w + b) s,   |x . w - x~ . w~| <= |x - x~| |w| + |x| |w - w~|
// and x . w is computed in float32, by `dot`, only where the bound reaches what a latent must have (`Above`) or what is at last among the
// best of a token (`Contenders`). So what is selected, and its value, does not depend on the bits of the screen, on the number of threads or
// on the order of the blocks.
#include "contenders.h"

namespace {

constexpr int64_t ROOM_BYTES = 32 << 20;  // for what contends in all tokens that are at work
constexpr int GROUP_TOKENS = 96;          // at least, of what one thread takes at a time
constexpr int64_t MOST_WAITING = 1 << 17;  // scores that one thread computes together

// All entries above a threshold of each latent, as each thread finds them.
struct Above {
    struct Found {
        int32_t token, latent;
        float value;
    };
    // What passed the screen, until there is enough to compute scores latent by latent.
    struct Own {
        int64_t count = 0;
        Array<int32_t> tokens, latents;
        Array<float> z;
        Exact exact;
        std::vector<Found>& found;
        Own(Above& keep, int thread) : tokens(LANES), latents(LANES), found(keep.found[thread]) {}
    };
    const float* threshold;  // [F]
    std::vector<std::vector<Found>> found;

    Above(const float* threshold, int threads) : threshold(threshold), found(threads) {}

    // What a score must reach, of a token and of latents of a block together.
    float limit(int64_t) const { return 0; }
    template <class Screen>
    Floats limit(const Block<Screen>& block, int64_t j) const { return load(block.limits.data() + j); }
    void add(Own& own, const Problem&, int64_t token, uint32_t bits, Floats, Floats, Ints numbers) {
        if (own.count + LANES > (int64_t)own.latents.size())
            for (auto* each : {&own.tokens, &own.latents}) each->resize(2 * own.count + LANES);
        store(own.tokens.data() + own.count, all((int32_t)token));
        compress(own.latents.data() + own.count, numbers, bits);
        own.count += __builtin_popcount(bits);
    }
    // Scores are computed where there are more than so many to compute.
    void close(Own& own, const Problem& problem, int64_t few) {
        if (own.count <= few) return;
        own.z.resize(own.count);
        const auto passed = [&](const auto& use) {
            for (int64_t i = 0; i < own.count; i++) use(i, own.tokens[i], own.latents[i]);
        };
        own.exact.compute(problem, passed, own.z.data());
        for (int64_t i = 0; i < own.count; i++)
            if (own.z[i] > threshold[own.latents[i]]) own.found.push_back({own.tokens[i], own.latents[i], own.z[i]});
        own.count = 0;
    }
};

// A token takes those latents of half a panel, from the j-th of a block on, whose scores may matter; z are their screened scores.
template <class Screen, class Keep>
void take(const Problem& problem, const Tokens<Screen>& tokens, const Block<Screen>& block, int64_t token, int64_t j, Floats z, Keep& keep,
          typename Keep::Own& own) {
    const Floats slack = all(tokens.missed[token]) * load(block.norm.data() + j) + all(tokens.norm[token]) * load(block.missed.data() + j);
    const Floats most = z + slack;
    if (const uint32_t bits = at_least(most, all(keep.limit(token)) + keep.limit(block, j)))
        keep.add(own, problem, token, bits, most, slack + slack + load(block.vague.data() + j), load(block.row.data() + j));
}

// A tile of tokens passes over a block. Whether a score may matter is asked with the largest slack of a panel first, which costs a token
// four instructions, and again with its own where the answer was yes.
template <class Screen, class Keep>
void pass(const Problem& problem, const Tokens<Screen>& tokens, const Block<Screen>& block, int64_t tile, Keep& keep, typename Keep::Own& own) {
    constexpr int TILE = Screen::TOKENS;
    const int64_t token0 = tile * TILE;
    const int rows = (int)std::min<int64_t>(TILE, problem.tokens - token0);
    const float *unit = tokens.unit.data() + token0, *norm = tokens.norm.data() + token0, *missed = tokens.missed.data() + token0;
    for (int64_t at = 0; at < block.size; at += PANEL) {
        typename Screen::sums c[TILE][2];
        multiply<Screen>(tokens.packed.data + token0 * tokens.words, block.packed.data + at * tokens.words, block.start.data() + at,
                         tokens.words, c);
        const float longest = block.longest_of[at / PANEL] * 1.00001f, worst = block.worst_of[at / PANEL] * 1.00001f;
        float least[TILE];
        for (int i = 0; i < TILE; i++) {
            const float limit = keep.limit(token0 + i);
            least[i] = (limit - limit * 1e-6f) - (missed[i] * longest + norm[i] * worst);
        }
        const Floats unit0 = load(block.unit.data() + at), unit1 = load(block.unit.data() + at + LANES);
        const Floats base0 = load(block.bias.data() + at) - keep.limit(block, at),
                     base1 = load(block.bias.data() + at + LANES) - keep.limit(block, at + LANES);
        uint32_t bits[TILE];
#pragma GCC unroll 12
        for (int i = 0; i < TILE; i++)
            bits[i] = at_least(Screen::value(c[i][0]) * (all(unit[i]) * unit0) + base0, all(least[i])) |
                      at_least(Screen::value(c[i][1]) * (all(unit[i]) * unit1) + base1, all(least[i])) << LANES;
        uint64_t any = 0;
        for (int i = 0; i < rows; i++) any |= (uint64_t)(bits[i] != 0) << i;
        for (; any; any &= any - 1) {
            const int i = __builtin_ctzll(any);
            for (int64_t half = 0, j = at; half < 2; half++, j += LANES)
                if (bits[i] >> half * LANES & below(LANES))
                    take(problem, tokens, block, token0 + i, j, score<Screen>(c[i][half], unit[i], block, j), keep, own);
        }
    }
    keep.close(own, problem, MOST_WAITING);
}

// The first block, for `Contenders`: nothing is known of a token yet, so scores are written down, and what is likely to be enough is read
// off from them.
template <class Screen>
void first_pass(const Problem& problem, const Tokens<Screen>& tokens, const Block<Screen>& block, int64_t tile, Contenders& keep,
                Contenders::Own& own, Array<float>& scores) {
    const int64_t padded = block.padded(), token0 = tile * Screen::TOKENS;
    const int64_t rank = std::min(block.size, safe_rank(keep.k, (double)block.size / problem.num));
    float* best = tile_scores<Screen>(tokens, block, tile, scores);
    for (int64_t token = token0; token < std::min(problem.tokens, token0 + Screen::TOKENS); token++) {
        const float* z = scores.data() + (token - token0) * padded;
        const float ranked = rank_of_groups(z, padded, rank, best);
        if (rank < keep.k)
            keep.guess(token, ranked);
        else
            keep.limits[token] = std::max(0.f, ranked - (tokens.missed[token] * block.longest + tokens.norm[token] * block.worst));
        for (int64_t j = 0; j < padded; j += LANES) take(problem, tokens, block, token, j, load(z + j), keep, own);
    }
}

template <class Screen, class Keep>
bool run(const Problem& problem, int threads, Keep& keep, const float* threshold, int64_t& computed) {
    static_assert(Screen::TOKENS <= MOST_TOKENS);
    const Tokens<Screen> tokens(problem, threads);
    if (!tokens.finite) return false;
    const int64_t row_bytes = tokens.words * sizeof(typename Screen::word);
    // tiles of tokens that one thread takes at a time
    const int64_t group_tokens = std::max<int64_t>(GROUP_TOKENS, std::min(Screen::GROUP_BYTES / row_bytes, problem.tokens / (4 * threads)));
    const int64_t group_tiles = group_tokens / Screen::TOKENS;
    const int64_t size = std::max<int64_t>(PANEL, std::min<int64_t>(BLOCK_LATENTS, BLOCK_BYTES / row_bytes / PANEL * PANEL));
    const int64_t num_blocks = (problem.num + size - 1) / size, most = (problem.num / num_blocks + 1 + PANEL) / PANEL * PANEL;
    std::vector<std::unique_ptr<Block<Screen>>> blocks(std::max<int64_t>(1, std::min(num_blocks, Screen::BATCH_BYTES / (most * row_bytes))));
    bool finite = true;
    int64_t count = 0;
#pragma omp parallel num_threads(threads) reduction(+ : count)
    {
        const Multiplying<Screen> multiplying;
        typename Keep::Own own(keep, omp_get_thread_num());
        Array<float> scores;
        for (int64_t first = 0; first < num_blocks && finite; first += blocks.size()) {
            const int64_t held = std::min<int64_t>(blocks.size(), num_blocks - first);
            bool good = true;
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < held; i++) {
                if (!blocks[i]) blocks[i] = std::make_unique<Block<Screen>>(most, tokens.words);
                const int64_t b = first + i;
                const Share share = std::is_same_v<Keep, Contenders>  // who guess from the blocks so far
                                        ? Share::sample(b, num_blocks, problem.num)
                                        : Share::range(problem.num * b / num_blocks, problem.num * (b + 1) / num_blocks);
                good = blocks[i]->fill(problem, share, tokens.words, threshold) && good;
            }
            if (!good) {
#pragma omp atomic write
                finite = false;
            }
#pragma omp barrier
            if (!finite) break;
#pragma omp for schedule(dynamic, 1)
            for (int64_t group = 0; group < tokens.tiles; group += group_tiles)
                for (int64_t i = 0; i < held; i++) {
                    const int64_t done = first + i + 1, end = std::min(tokens.tiles, group + group_tiles);
                    if constexpr (std::is_same_v<Keep, Contenders>) own.share = (double)done / num_blocks;
                    for (int64_t tile = group; tile < end; tile++) {
                        if constexpr (std::is_same_v<Keep, Contenders>)
                            if (keep.guessing && done == 1) {
                                first_pass(problem, tokens, *blocks[i], tile, keep, own, scores);
                                continue;
                            }
                        pass(problem, tokens, *blocks[i], tile, keep, own);
                    }
                    if constexpr (std::is_same_v<Keep, Contenders>)
                        if (keep.guessing && done > 1 && (done & (done - 1)) == 0)
                            for (int64_t token = group * Screen::TOKENS; token < std::min(problem.tokens, end * Screen::TOKENS); token++)
                                keep.look_back(token, own.share);
                    if (i + 1 == held) keep.close(own, problem, 0);
                }
        }
        count += own.exact.computed;
    }
    computed += count;
    return finite;
}

template <class Keep>
bool run_screened(int bits, const Problem& problem, int threads, Keep& keep, const float* threshold, int64_t& computed) {
#if defined(MATRIX_UNIT)
    if (bits == 8 && Tiles::granted()) return run<Tiles>(problem, threads, keep, threshold, computed);
#endif
#if defined(BYTES_AND_PAIRS)
    if (bits == 8) return run<Bytes>(problem, threads, keep, threshold, computed);
#endif
#if defined(PAIRS) || defined(BYTES_AND_PAIRS)
    if (bits == 16) return run<Pairs>(problem, threads, keep, threshold, computed);
#endif
    return run<Float32>(problem, threads, keep, threshold, computed);
}

// How many tokens are settled together. Their rows are read about 1.6 k times, those of latents once for all of them: where that is little
// beside it, as many tokens as stay in half of the second-level cache while rows of latents pass by.
int64_t settled_together(const Problem& problem, int64_t k, int threads) {
    const int64_t near = std::max<int64_t>(1 << 20, second_level_cache() / 2), row = problem.width * sizeof(float);
    const bool few = problem.num * row / near < (k * 4) / 5;  // passes over all latents cost less than half of what is read of tokens
    return std::clamp<int64_t>((few ? near : 2 << 20) / row, 1, (problem.tokens + threads - 1) / threads);
}

// The k best of every token; with `guessing`, `again` are tokens for which a guess was too high.
bool best(const Problem& problem, int64_t k, int bits, int threads, bool guessing, float* values, int32_t* indices,
          std::vector<int64_t>& again, int64_t& computed) {
    Contenders keep(problem.tokens, k, guessing);
    if (!run_screened(bits, problem, threads, keep, nullptr, computed)) return false;
    const int64_t at_once = settled_together(problem, k, threads);
    int64_t settled = 0;
#pragma omp parallel num_threads(threads) reduction(+ : settled)
    {
        Contenders::Own own(keep, 0);
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < problem.tokens; first += at_once)
            keep.settle(own, problem, first, std::min(first + at_once, problem.tokens), [&](int64_t token, int64_t count) {
                for (int64_t j = 0; j < k; j++) {
                    values[token * k + j] = j < count ? score_of(own.best[j]) : 0.f;
                    indices[token * k + j] = j < count ? latent_of(own.best[j]) : (int32_t)problem.row(0);
                }
            });
        settled += own.exact.computed;
    }
    computed += settled;
    for (int64_t token = 0; token < problem.tokens; token++)
        if (keep.guesses[token] > 0 && values[token * k + k - 1] < keep.guesses[token]) again.push_back(token);
    return true;
}

// The same for all tokens, until nothing has to be done again.
bool all_best(const Problem& problem, int64_t k, int bits, int threads, float* values, int32_t* indices, int64_t& computed) {
    std::vector<int64_t> again;
    if (!best(problem, k, bits, threads, true, values, indices, again, computed)) return false;
    if (again.empty()) return true;
    Array<float> x_again(again.size() * problem.width), values_again(again.size() * k);
    Array<int32_t> indices_again(again.size() * k);
    for (size_t i = 0; i < again.size(); i++) std::memcpy(&x_again[i * problem.width], problem.x + again[i] * problem.width, problem.width * sizeof(float));
    Problem rest = problem;
    rest.x = x_again.data();
    rest.tokens = (int64_t)again.size();
    std::vector<int64_t> none;
    best(rest, k, bits, threads, false, values_again.data(), indices_again.data(), none, computed);
    for (size_t i = 0; i < again.size(); i++) {
        std::memcpy(values + again[i] * k, &values_again[i * k], k * sizeof(float));
        std::memcpy(indices + again[i] * k, &indices_again[i * k], k * sizeof(int32_t));
    }
    return true;
}

}  // namespace

extern "C" {

// The fewest bits that scores can be screened with here: 8, 16 or 32.
int saebench_screen_bits() {
#if defined(BYTES_AND_PAIRS)
    return 8;
#elif defined(PAIRS)
    return 16;
#else
    return 32;
#endif
}

// Whether the processor's matrix unit multiplies 8-bit integers here.
int saebench_matrix_unit() {
#if defined(MATRIX_UNIT)
    return Tiles::granted();
#else
    return 0;
#endif
}

// Values and indices [B, K], best first. Returns how many scores were computed in float32, or -1 where x, w, b are not finite.
int64_t saebench_topk(const float* x, const float* w, const float* b, const float* scale, const int32_t* latents, int64_t tokens,
                      int64_t width, int64_t num, int64_t k, int bits, int threads, float* values, int32_t* indices) {
    const int64_t at_once = std::max<int64_t>(GROUP_TOKENS * threads, ROOM_BYTES / (12 * Contenders::room_for(k)));
    int64_t computed = 0;
    for (int64_t first = 0; first < tokens; first += at_once) {
        const Problem problem{x + first * width, w, b, scale, latents, std::min(at_once, tokens - first), width, num};
        if (!all_best(problem, k, bits, threads, values + first * k, indices + first * k, computed)) return -1;
    }
    return computed;
}

typedef Above Selection;

// Entries above thresholds, to be fetched by `saebench_take`; fills offsets [B + 1]. Null where x, w, b are not finite.
Selection* saebench_above(const float* x, const float* w, const float* b, const float* scale, const float* threshold, int64_t tokens,
                          int64_t width, int64_t num, int bits, int threads, int64_t* offsets, int64_t* computed) {
    const Problem problem{x, w, b, scale, nullptr, tokens, width, num};
    auto selection = std::make_unique<Selection>(threshold, threads);
    if (!run_screened(bits, problem, threads, *selection, threshold, *computed)) return nullptr;
    std::fill(offsets, offsets + tokens + 1, 0);
    for (const auto& part : selection->found)
        for (const auto& each : part) offsets[each.token + 1]++;
    for (int64_t token = 0; token < tokens; token++) offsets[token + 1] += offsets[token];
    return selection.release();
}

// Copies the entries, ascending in each row, and frees the selection.
void saebench_take(Selection* taken, int64_t tokens, const int64_t* offsets, int threads, int32_t* indices, float* values) {
    std::unique_ptr<Selection> selection(taken);
    std::vector<uint64_t> entries(offsets[tokens]);  // latent, value
    std::vector<int64_t> next(offsets, offsets + tokens);
#pragma omp parallel num_threads(threads)
    {
        const int64_t team = omp_get_num_threads(), own = omp_get_thread_num(), first = tokens * own / team, last = tokens * (own + 1) / team;
        for (const auto& part : selection->found)
            for (const auto& each : part)
                if (each.token >= first && each.token < last) {
                    uint32_t bits;
                    std::memcpy(&bits, &each.value, 4);
                    entries[next[each.token]++] = (uint64_t)each.latent << 32 | bits;
                }
        for (int64_t token = first; token < last; token++) {
            std::sort(entries.begin() + offsets[token], entries.begin() + offsets[token + 1]);
            for (int64_t e = offsets[token]; e < offsets[token + 1]; e++) {
                const uint32_t bits = (uint32_t)entries[e];
                indices[e] = (int32_t)(entries[e] >> 32);
                std::memcpy(values + e, &bits, 4);
            }
        }
    }
}
}
