// Scores in float32, latent by latent: rows of tokens stay in the cache, and those of latents come once.
#pragma once

#include "scan.h"

namespace {

constexpr int ROWS_AHEAD = 3;  // rows of latents that are on their way from memory

struct Exact {
    Array<int32_t> starts, places, tokens, latents;  // all but the first by latent
    int64_t computed = 0;

    // `pairs` calls what it is given with the place, token and latent of every pair; z[place] becomes its score.
    template <class Pairs>
    void compute(const Problem& problem, const Pairs& pairs, float* z) {
        const int64_t count = sort(problem, pairs);
        const auto next = [&](int64_t i) {
            const int32_t latent = latents[i];
            while (i < count && latents[i] == latent) i++;
            return i;
        };
        int64_t ahead = 0;
        for (int rows = 0; rows < ROWS_AHEAD && ahead < count; rows++) ahead = next(ahead);
        for (int64_t i = 0; i < count;) {
            const int32_t latent = latents[i];
            const int64_t end = next(i);
            const float* w = problem.w + latent * problem.width;
            const float* later = ahead < count ? problem.w + latents[ahead] * problem.width : w;
            if (ahead < count) ahead = next(ahead);
            while (i < end) {
                const int64_t some = std::min<int64_t>(4, end - i);
                const float* x[4];
                float products[4];
                for (int64_t n = 0; n < some; n++) x[n] = problem.x + tokens[i + n] * problem.width;
                switch (some) {
                    case 1: dots<1, 1>(w, x, problem.width, products, &later); break;
                    case 2: dots<2, 1>(w, x, problem.width, products, &later); break;
                    case 3: dots<3, 1>(w, x, problem.width, products, &later); break;
                    default: dots<4, 1>(w, x, problem.width, products, &later);
                }
                for (int64_t n = 0; n < some; n++, i++) z[places[i]] = problem.finished(products[n], latent);
            }
        }
        computed += count;
    }

   private:
    template <class Pairs>
    int64_t sort(const Problem& problem, const Pairs& pairs) {
        int64_t low = problem.end(), high = -1, count = 0;
        pairs([&](int64_t, int64_t, int64_t latent) { low = std::min(low, latent), high = std::max(high, latent), count++; });
        starts.assign(count ? high - low + 2 : 1, 0);
        pairs([&](int64_t, int64_t, int64_t latent) { starts[latent - low + 1]++; });
        for (size_t f = 1; f < starts.size(); f++) starts[f] += starts[f - 1];
        for (auto* each : {&places, &tokens, &latents}) each->resize(count);
        pairs([&](int64_t place, int64_t token, int64_t latent) {
            const int32_t at = starts[latent - low]++;
            places[at] = (int32_t)place, tokens[at] = (int32_t)token, latents[at] = (int32_t)latent;
        });
        return count;
    }
};

}  // namespace
