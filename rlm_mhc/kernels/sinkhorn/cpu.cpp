// Sinkhorn-Knopp on [tokens, n, n] and the gradient of its finite iteration; the derivation is in README.md.
//
// LANES matrices are worked on together, entry e of all of them side by side, so that every loop over lanes is one
// vector instruction and all iterations run in the first-level cache. NaN must reach every entry of its matrix: no
// -ffast-math, and std::max may drop it only where a sum brings it back.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int LANES = 16;

inline double exp_nonpositive(double x) { return std::exp(x); }

// Cody-Waite reduction and a polynomial: within 2 units in the last place, and, unlike std::exp, vectorised.
inline float exp_nonpositive(float x) {
    const float clamped = std::max(x, -87.0f);
    const float shifted = clamped * 1.44269504f + 12582912.0f;
    const float whole = shifted - 12582912.0f;
    const float r = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.9875691e-4f;
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665795e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    const std::int32_t bits = (static_cast<std::int32_t>(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : p * power;
}

// N is n where the compiler is to know it and unroll, 0 where it is not.
template <typename T, int N>
struct Sinkhorn {
    const int any_n, num_iters;
    const T eps;
    std::vector<T> current, tape;

    Sinkhorn(int n, int num_iters, T eps, bool taped)
        : any_n(n),
          num_iters(num_iters),
          eps(eps),
          current(n * n * LANES),
          tape(taped ? 2 * num_iters * n * n * LANES : 0) {}

    int size() const { return N ? N : any_n; }
    T* entry(T* block, int i, int j) { return block + (i * size() + j) * LANES; }

    void record(int step) {
        if (!tape.empty()) std::copy(current.begin(), current.end(), tape.begin() + step * current.size());
    }

    void load(const T* logits, int lanes) {
        const int n = size();
        const T limit = std::numeric_limits<T>::max() / 4;
        std::fill(current.begin(), current.end(), T(0));
        for (int lane = 0; lane < lanes; ++lane)
            for (int e = 0; e < n * n; ++e)
                current[e * LANES + lane] = std::clamp(logits[lane * n * n + e], -limit, limit);
    }

    // Columns, on logarithms.
    void first_columns() {
        const int n = size();
        for (int j = 0; j < n; ++j) {
            T largest[LANES], total[LANES];
            for (int l = 0; l < LANES; ++l) largest[l] = entry(current.data(), 0, j)[l], total[l] = 0;
            for (int i = 1; i < n; ++i)
                for (int l = 0; l < LANES; ++l) largest[l] = std::max(largest[l], entry(current.data(), i, j)[l]);
            for (int i = 0; i < n; ++i)
                for (int l = 0; l < LANES; ++l)
                    total[l] += exp_nonpositive(entry(current.data(), i, j)[l] - largest[l]);
            for (int l = 0; l < LANES; ++l) total[l] = std::log(total[l]);
            // One after the other: the sum would swallow the logarithm where the largest logit is huge.
            for (int i = 0; i < n; ++i)
                for (int l = 0; l < LANES; ++l)
                    entry(current.data(), i, j)[l] = (entry(current.data(), i, j)[l] - largest[l]) - total[l];
        }
        if (!tape.empty())
            for (std::size_t k = 0; k < current.size(); ++k) tape[k] = exp_nonpositive(current[k]);
    }

    // Rows of exp + eps, where every entry is at least eps.
    void first_rows_shifted() {
        for (std::size_t k = 0; k < current.size(); ++k) current[k] = exp_nonpositive(current[k]) + eps;
        normalise<true>();
        record(1);
    }

    // Rows, from logarithms to numbers: from here on every row and column has an entry of at least 1/n², so that
    // sums cannot vanish.
    void first_rows() {
        const int n = size();
        for (int i = 0; i < n; ++i) {
            T largest[LANES], total[LANES];
            for (int l = 0; l < LANES; ++l) largest[l] = entry(current.data(), i, 0)[l], total[l] = 0;
            for (int j = 1; j < n; ++j)
                for (int l = 0; l < LANES; ++l) largest[l] = std::max(largest[l], entry(current.data(), i, j)[l]);
            for (int j = 0; j < n; ++j)
                for (int l = 0; l < LANES; ++l) {
                    const T x = exp_nonpositive(entry(current.data(), i, j)[l] - largest[l]);
                    entry(current.data(), i, j)[l] = x;
                    total[l] += x;
                }
            for (int j = 0; j < n; ++j)
                for (int l = 0; l < LANES; ++l) entry(current.data(), i, j)[l] /= total[l];
        }
        record(1);
    }

    // Divide by the sums along one axis: entries of line k are at (k, m) for rows and at (m, k) for columns.
    template <bool ROWS>
    void normalise() {
        const int n = size();
        for (int k = 0; k < n; ++k) {
            T total[LANES];
            std::fill(total, total + LANES, eps);
            for (int m = 0; m < n; ++m) {
                const T* x = ROWS ? entry(current.data(), k, m) : entry(current.data(), m, k);
                for (int l = 0; l < LANES; ++l) total[l] += x[l];
            }
            for (int l = 0; l < LANES; ++l) total[l] = T(1) / total[l];
            for (int m = 0; m < n; ++m) {
                T* x = ROWS ? entry(current.data(), k, m) : entry(current.data(), m, k);
                for (int l = 0; l < LANES; ++l) x[l] *= total[l];
            }
        }
    }

    void iterate() {
        first_columns();
        eps > 0 ? first_rows_shifted() : first_rows();
        for (int k = 1; k < num_iters; ++k) {
            normalise<false>();
            record(2 * k);
            normalise<true>();
            record(2 * k + 1);
        }
    }

    // g -= m · (sum of g along the axis), for the outcome m of one normalisation.
    template <bool ROWS>
    void pull(T* g, T* m) {
        const int n = size();
        for (int k = 0; k < n; ++k) {
            T total[LANES] = {};
            for (int e = 0; e < n; ++e) {
                const T* x = ROWS ? entry(g, k, e) : entry(g, e, k);
                for (int l = 0; l < LANES; ++l) total[l] += x[l];
            }
            for (int e = 0; e < n; ++e) {
                T* x = ROWS ? entry(g, k, e) : entry(g, e, k);
                const T* y = ROWS ? entry(m, k, e) : entry(m, e, k);
                for (int l = 0; l < LANES; ++l) x[l] -= y[l] * total[l];
            }
        }
    }

    void forward(const T* logits, T* out, int lanes) {
        const int n = size();
        load(logits, lanes);
        iterate();
        for (int lane = 0; lane < lanes; ++lane)
            for (int e = 0; e < n * n; ++e) out[lane * n * n + e] = current[e * LANES + lane];
    }

    void backward(const T* logits, const T* cotangent, T* out, int lanes) {
        const int n = size();
        load(logits, lanes);
        iterate();
        for (int e = 0; e < n * n; ++e)
            for (int lane = 0; lane < LANES; ++lane)
                current[e * LANES + lane] *= lane < lanes ? cotangent[lane * n * n + e] : T(0);
        for (int step = 2 * num_iters - 1; step >= 0; --step) {
            T* m = tape.data() + step * current.size();
            if (step == 0 && eps > 0)
                for (std::size_t k = 0; k < current.size(); ++k) current[k] *= m[k] / (m[k] + eps);
            step % 2 ? pull<true>(current.data(), m) : pull<false>(current.data(), m);
        }
        const T limit = std::numeric_limits<T>::max() / 4;
        for (int lane = 0; lane < lanes; ++lane)
            for (int e = 0; e < n * n; ++e) {
                const int k = lane * n * n + e;
                out[k] = std::abs(logits[k]) > limit ? T(0) : current[e * LANES + lane];
            }
    }
};

template <typename T, int N>
void run_blocks(const T* logits, const T* cotangent, T* out, std::int64_t tokens, int n, int num_iters, T eps) {
    Sinkhorn<T, N> block(n, num_iters, eps, cotangent != nullptr);
    for (std::int64_t t = 0; t < tokens; t += LANES) {
        const int lanes = static_cast<int>(std::min<std::int64_t>(LANES, tokens - t));
        const std::int64_t at = t * n * n;
        if (cotangent)
            block.backward(logits + at, cotangent + at, out + at, lanes);
        else
            block.forward(logits + at, out + at, lanes);
    }
}

template <typename T>
void run(const T* logits, const T* cotangent, T* out, std::int64_t tokens, int n, int num_iters, double eps) {
    const auto blocks = n == 2 ? run_blocks<T, 2> : n == 4 ? run_blocks<T, 4> : run_blocks<T, 0>;
    blocks(logits, cotangent, out, tokens, n, num_iters, static_cast<T>(eps));
}

}  // namespace

extern "C" {
void sinkhorn_float(const float* logits, const float* cotangent, float* out, std::int64_t tokens, int n, int iters,
                    double eps) {
    run(logits, cotangent, out, tokens, n, iters, eps);
}
void sinkhorn_double(const double* logits, const double* cotangent, double* out, std::int64_t tokens, int n, int iters,
                     double eps) {
    run(logits, cotangent, out, tokens, n, iters, eps);
}
}
