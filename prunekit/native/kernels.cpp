// Training kernels for small channel counts on a CPU: BatchNorm fused with PReLU, and depthwise 3×3 convolution.
// All tensors are channels-last.
//
// Training is memory-bound, so each kernel reads and writes every element as few times as possible. Coefficients are
// repeated over a tile of pixels whose length is a multiple of the vector width, so that any channel count fills the
// vectors. Sums are computed per chunk and added in chunk order, so that the result does not depend on the threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

namespace {

constexpr int64_t LANES = 16;  // floats in the widest vector
constexpr int64_t SHORT = 256;  // minimum number of floats in a tile, to amortize the loop overhead
constexpr int64_t CHUNK = 1 << 17;  // floats after which single-precision sums are added to a double

int64_t tile_pixels(int64_t channels) {
    int64_t pixels = LANES / std::gcd(channels, LANES);
    return pixels * std::max<int64_t>(1, SHORT / (pixels * channels));
}

template <class T>
std::vector<T> tiled(const T* values, int64_t channels, int64_t pixels) {
    std::vector<T> tile(channels * pixels);
    for (int64_t i = 0; i < channels * pixels; ++i) tile[i] = values[i % channels];
    return tile;
}

// Sums over tiles: `kinds` rows with one number per tile position, reduced to a double per channel.
template <class T>
struct Sums {
    int64_t kinds, channels, width;
    std::vector<T> rows;
    std::vector<double> total;
    Sums(int64_t kinds, int64_t channels, int64_t width)
        : kinds(kinds), channels(channels), width(width), rows(kinds * width, T(0)), total(kinds * channels, 0.0) {}
    T* row(int64_t kind) { return rows.data() + kind * width; }
    void fold() {
        for (int64_t k = 0; k < kinds; ++k)
            for (int64_t at = 0; at < width; at += channels)
                for (int64_t c = 0; c < channels; ++c) total[k * channels + c] += rows[k * width + at + c];
        std::fill(rows.begin(), rows.end(), T(0));
    }
};

// Runs body(begin, count, sums) over the tiles of one image and reduces after each chunk; count is in floats.
template <class T, class Body>
void over_tiles(int64_t numbers, Sums<T>& sums, Body body) {
    const int64_t stretch = std::max(sums.width, CHUNK / sums.width * sums.width);
    for (int64_t from = 0; from < numbers; from += stretch) {
        const int64_t to = std::min(numbers, from + stretch);
        for (int64_t at = from; at < to; at += sums.width) body(at, std::min(sums.width, to - at));
        sums.fold();
    }
}

template <class T>
void norm_stats(const T* x, int64_t images, int64_t pixels, int64_t channels, double* mean, double* variance,
                int threads) {
    const int64_t tile = tile_pixels(channels), width = tile * channels, numbers = pixels * channels;
    // Moments around a value near the mean avoid cancellation.
    std::vector<T> near(channels, T(0));
    const int64_t some = std::min<int64_t>(pixels, 64);
    for (int64_t c = 0; c < channels; ++c) {
        double sum = 0;
        for (int64_t p = 0; p < some; ++p) sum += x[p * channels + c];
        near[c] = T(sum / some);
    }
    const std::vector<T> base = tiled(near.data(), channels, tile);
    std::vector<double> part(images * 2 * channels);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < images; ++n) {
        Sums<T> sums(2, channels, width);
        const T* from = x + n * numbers;
        const T* b = base.data();
        T *first = sums.row(0), *second = sums.row(1);
        over_tiles(numbers, sums, [=](int64_t at, int64_t count) {
            const T* v = from + at;
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) {
                const T d = v[i] - b[i];
                first[i] += d;
                second[i] += d * d;
            }
        });
        std::copy(sums.total.begin(), sums.total.end(), part.begin() + n * 2 * channels);
    }
    const double count = double(images) * pixels;
    for (int64_t c = 0; c < channels; ++c) {
        double first = 0, second = 0;
        for (int64_t n = 0; n < images; ++n) {
            first += part[n * 2 * channels + c];
            second += part[(n * 2 + 1) * channels + c];
        }
        first /= count;
        mean[c] = near[c] + first;
        variance[c] = std::max(0.0, second / count - first * first);
    }
}

// y = act(x · scale + shift), act(u) = u if u > 0, else slope · u; `means`: mean of y per image and channel.
template <class T>
void apply(const T* x, const T* scale, const T* shift, const T* slope, T* y, T* means, int64_t images, int64_t pixels,
           int64_t channels, int threads) {
    const int64_t tile = tile_pixels(channels), width = tile * channels, numbers = pixels * channels;
    const auto a = tiled(scale, channels, tile), b = tiled(shift, channels, tile), s = tiled(slope, channels, tile);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < images; ++n) {
        Sums<T> sums(1, channels, width);
        const T *A = a.data(), *B = b.data(), *S = s.data();
        T* sum = sums.row(0);
        over_tiles(numbers, sums, [=](int64_t at, int64_t count) {
            const T* v = x + n * numbers + at;
            T* out = y + n * numbers + at;
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) {
                const T u = v[i] * A[i] + B[i];
                const T r = u > 0 ? u : S[i] * u;
                out[i] = r;
                sum[i] += r;
            }
        });
        for (int64_t c = 0; c < channels; ++c) means[n * channels + c] = T(sums.total[c] / pixels);
    }
}

// BatchNorm with batch statistics, followed by PReLU. `held` (5, channels) stores what the backward pass needs: scale,
// shift, slope, mean, 1/√(v+ε). The running statistics are updated as in PyTorch. A null slope means no activation;
// `one_slope` means one slope for all channels.
template <class T>
void norm_act(const T* x, const T* gamma, const T* beta, const T* slope, int one_slope, double eps, double momentum,
              T* running, T* running_var, T* held, T* y, T* means, int64_t images, int64_t pixels, int64_t channels,
              int threads) {
    std::vector<double> mean(channels), variance(channels);
    norm_stats<T>(x, images, pixels, channels, mean.data(), variance.data(), threads);
    const double count = double(images) * pixels;
    for (int64_t c = 0; c < channels; ++c) {
        const double deviation = 1 / std::sqrt(variance[c] + eps), scale = gamma[c] * deviation;
        held[c] = T(scale);
        held[channels + c] = T(beta[c] - mean[c] * scale);
        held[2 * channels + c] = slope ? slope[one_slope ? 0 : c] : T(1);
        held[3 * channels + c] = T(mean[c]);
        held[4 * channels + c] = T(deviation);
        running[c] = T(running[c] + momentum * (mean[c] - running[c]));
        running_var[c] = T(running_var[c] + momentum * (variance[c] * count / (count - 1) - running_var[c]));
    }
    apply<T>(x, held, held + channels, held + 2 * channels, y, means, images, pixels, channels, threads);
}

// Gradients with respect to x and (`found`, (3, channels)) γ, β and the slope; u is recomputed.
template <class T>
void norm_act_backward(const T* grad, const T* x, const T* held, T* grad_x, T* found, int64_t images, int64_t pixels,
                       int64_t channels, int threads) {
    const int64_t tile = tile_pixels(channels), width = tile * channels, numbers = pixels * channels;
    const T *scale = held, *deviation = held + 4 * channels;
    const auto a = tiled(scale, channels, tile), b = tiled(held + channels, channels, tile),
               s = tiled(held + 2 * channels, channels, tile), m = tiled(held + 3 * channels, channels, tile);
    std::vector<double> part(images * 3 * channels);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < images; ++n) {
        Sums<T> sums(3, channels, width);
        const T *A = a.data(), *B = b.data(), *S = s.data(), *M = m.data();
        T *plain = sums.row(0), *crossed = sums.row(1), *below = sums.row(2);
        over_tiles(numbers, sums, [=](int64_t at, int64_t count) {
            const T *v = x + n * numbers + at, *g = grad + n * numbers + at;
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) {
                const T u = v[i] * A[i] + B[i];
                const T down = g[i] * S[i];
                const T inner = u > 0 ? g[i] : down;
                plain[i] += inner;
                crossed[i] += inner * (v[i] - M[i]);
                below[i] += u > 0 ? T(0) : g[i] * u;
            }
        });
        std::copy(sums.total.begin(), sums.total.end(), part.begin() + n * 3 * channels);
    }
    std::vector<T> linear(channels), constant(channels);
    const double count = double(images) * pixels;
    for (int64_t c = 0; c < channels; ++c) {
        double plain = 0, crossed = 0, below = 0;
        for (int64_t n = 0; n < images; ++n) {
            plain += part[n * 3 * channels + c];
            crossed += part[(n * 3 + 1) * channels + c];
            below += part[(n * 3 + 2) * channels + c];
        }
        found[c] = T(crossed * deviation[c]);
        found[channels + c] = T(plain);
        found[2 * channels + c] = T(below);
        const double tilt = -double(scale[c]) * deviation[c] * deviation[c] * crossed / count;
        linear[c] = T(tilt);
        constant[c] = T(-double(scale[c]) * plain / count);
    }
    const auto l = tiled(linear.data(), channels, tile), k = tiled(constant.data(), channels, tile);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < images; ++n) {
        const T *A = a.data(), *B = b.data(), *S = s.data(), *M = m.data(), *L = l.data(), *K = k.data();
        for (int64_t at = 0; at < numbers; at += width) {
            const int64_t many = std::min(width, numbers - at);
            const T *v = x + n * numbers + at, *g = grad + n * numbers + at;
            T* out = grad_x + n * numbers + at;
#pragma omp simd
            for (int64_t i = 0; i < many; ++i) {
                const T u = v[i] * A[i] + B[i];
                const T down = g[i] * S[i];
                const T inner = u > 0 ? g[i] : down;
                out[i] = A[i] * inner + L[i] * (v[i] - M[i]) + K[i];
            }
        }
    }
}

// Three rows of an image, padded by a column of zeros on each side.
template <class T>
struct Rows {
    int64_t height, width, channels, stride;
    std::vector<T> held;
    Rows(int64_t height, int64_t width, int64_t channels, int64_t spare)
        : height(height), width(width), channels(channels), stride((width + 2) * channels + spare),
          held(3 * stride, T(0)) {}
    T* at(int64_t row) { return held.data() + (row + 3) % 3 * stride; }
    void load(const T* image, int64_t row) {
        T* to = at(row) + channels;
        if (row < 0 || row >= height)
            std::fill(to, to + width * channels, T(0));
        else
            std::memcpy(to, image + row * width * channels, width * channels * sizeof(T));
    }
};

// Depthwise 3×3, padding 1. `kernel` is (3, 3, channels); rotated by 180°, this computes the gradient of the input.
template <class T>
void depthwise(const T* x, const T* kernel, T* y, int64_t images, int64_t height, int64_t width, int64_t channels,
               int threads) {
    const int64_t tile = tile_pixels(channels), wide = tile * channels, numbers = width * channels;
    std::vector<T> taps;
    for (int k = 0; k < 9; ++k) {
        const auto one = tiled(kernel + k * channels, channels, tile);
        taps.insert(taps.end(), one.begin(), one.end());
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < images; ++n) {
        const T* from = x + n * height * numbers;
        Rows<T> rows(height, width, channels, wide);
        rows.load(from, -1);
        rows.load(from, 0);
        for (int64_t h = 0; h < height; ++h) {
            rows.load(from, h + 1);
            const T *up = rows.at(h - 1), *mid = rows.at(h), *down = rows.at(h + 1);
            T* out = y + (n * height + h) * numbers;
            for (int64_t at = 0; at < numbers; at += wide) {
                const int64_t many = std::min(wide, numbers - at);
                const T *u = up + at, *m = mid + at, *d = down + at, *k = taps.data();
                T* o = out + at;
#pragma omp simd
                for (int64_t i = 0; i < many; ++i) {
                    o[i] = u[i] * k[i] + u[i + channels] * k[wide + i] + u[i + 2 * channels] * k[2 * wide + i] +
                           m[i] * k[3 * wide + i] + m[i + channels] * k[4 * wide + i] +
                           m[i + 2 * channels] * k[5 * wide + i] + d[i] * k[6 * wide + i] +
                           d[i + channels] * k[7 * wide + i] + d[i + 2 * channels] * k[8 * wide + i];
                }
            }
        }
    }
}

// Gradient of the kernel, (3, 3, channels).
template <class T>
void depthwise_kernel(const T* grad, const T* x, T* grad_kernel, int64_t images, int64_t height, int64_t width,
                      int64_t channels, int threads) {
    const int64_t tile = tile_pixels(channels), wide = tile * channels, numbers = width * channels;
    std::vector<double> part(images * 9 * channels);
    const int64_t often = std::max<int64_t>(1, CHUNK / numbers);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < images; ++n) {
        const T* from = x + n * height * numbers;
        Rows<T> rows(height, width, channels, wide);
        Sums<T> sums(9, channels, wide);
        T* s = sums.row(0);
        rows.load(from, -1);
        rows.load(from, 0);
        for (int64_t h = 0; h < height; ++h) {
            rows.load(from, h + 1);
            const T *up = rows.at(h - 1), *mid = rows.at(h), *down = rows.at(h + 1);
            const T* g = grad + (n * height + h) * numbers;
            for (int64_t at = 0; at < numbers; at += wide) {
                const int64_t many = std::min(wide, numbers - at);
                const T *u = up + at, *m = mid + at, *d = down + at, *v = g + at;
#pragma omp simd
                for (int64_t i = 0; i < many; ++i) {
                    const T w = v[i];
                    s[i] += w * u[i];
                    s[wide + i] += w * u[i + channels];
                    s[2 * wide + i] += w * u[i + 2 * channels];
                    s[3 * wide + i] += w * m[i];
                    s[4 * wide + i] += w * m[i + channels];
                    s[5 * wide + i] += w * m[i + 2 * channels];
                    s[6 * wide + i] += w * d[i];
                    s[7 * wide + i] += w * d[i + channels];
                    s[8 * wide + i] += w * d[i + 2 * channels];
                }
            }
            if ((h + 1) % often == 0) sums.fold();
        }
        sums.fold();
        std::copy(sums.total.begin(), sums.total.end(), part.begin() + n * 9 * channels);
    }
    for (int64_t k = 0; k < 9 * channels; ++k) {
        double sum = 0;
        for (int64_t n = 0; n < images; ++n) sum += part[n * 9 * channels + k];
        grad_kernel[k] = T(sum);
    }
}

}  // namespace

#define FOR_TYPE(suffix, T)                                                                                           \
    void norm_act_##suffix(const T* x, const T* gamma, const T* beta, const T* slope, int one_slope, double eps,      \
                           double momentum, T* mean, T* var, T* held, T* y, T* means, int64_t n, int64_t p,           \
                           int64_t c, int t) {                                                                        \
        norm_act<T>(x, gamma, beta, slope, one_slope, eps, momentum, mean, var, held, y, means, n, p, c, t);          \
    }                                                                                                                 \
    void norm_act_backward_##suffix(const T* g, const T* x, const T* held, T* gx, T* found, int64_t n, int64_t p,     \
                                    int64_t c, int t) {                                                               \
        norm_act_backward<T>(g, x, held, gx, found, n, p, c, t);                                                      \
    }                                                                                                                 \
    void depthwise_##suffix(const T* x, const T* k, T* y, int64_t n, int64_t h, int64_t w, int64_t c, int t) {        \
        depthwise<T>(x, k, y, n, h, w, c, t);                                                                         \
    }                                                                                                                 \
    void depthwise_kernel_##suffix(const T* g, const T* x, T* gk, int64_t n, int64_t h, int64_t w, int64_t c,         \
                                   int t) {                                                                           \
        depthwise_kernel<T>(g, x, gk, n, h, w, c, t);                                                                 \
    }

extern "C" {
FOR_TYPE(float, float)
FOR_TYPE(double, double)
}
