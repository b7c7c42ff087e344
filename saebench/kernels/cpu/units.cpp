// Sums over units, such as documents, of how often each latent fires in them (saebench/kernels/unit_sums.py has the contract).
//
// A latent is one thread's alone and all sums are of whole numbers, so results have the same bits for any number of threads.
#include <cstdint>
#include <vector>

namespace {
constexpr int64_t AHEAD = 32;  // postings whose units are on their way from memory
}

extern "C" {

// sums: [4][2][num]
void saebench_unit_sums(const int64_t* starts, const int32_t* tokens, int64_t num, const int32_t* units, const uint8_t* in_a,
                        const double* sizes, int64_t num_units, int threads, double* sums) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<int32_t> firings(num_units), seen;
#pragma omp for schedule(dynamic, 64)
        for (int64_t f = 0; f < num; f++) {
            const int64_t end = starts[f + 1];
            for (int64_t i = starts[f]; i < end; i++) {
                if (i + AHEAD < end) __builtin_prefetch(units + tokens[i + AHEAD]);
                const int32_t unit = units[tokens[i]];
                if (unit >= 0 && !firings[unit]++) seen.push_back(unit);
            }
            double totals[4][2] = {};
            for (const int32_t unit : seen) {
                const double x = firings[unit];
                const int set = in_a[unit] ? 0 : 1;
                totals[0][set] += x;
                totals[1][set] += x * x;
                totals[2][set] += x * sizes[unit];
                totals[3][set] += 1;
                firings[unit] = 0;
            }
            seen.clear();
            for (int sum = 0; sum < 4; sum++)
                for (int set = 0; set < 2; set++) sums[(sum * 2 + set) * num + f] = totals[sum][set];
        }
    }
}
}
