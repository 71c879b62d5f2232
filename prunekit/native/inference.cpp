// Inference kernels for networks with few channels, on channels-last float32 with channels padded to a multiple of LANES.
// Such networks are memory-bound, so elementwise operations that follow (a sum, a PReLU) are fused. Threads share the
// rows; the order of summation does not depend on their number.

#include <algorithm>
#include <cstdint>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int LANES = 8;
typedef float vec __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));

inline vec load(const float* from) { return *reinterpret_cast<const vec*>(from); }
inline void store(float* to, vec value) { *reinterpret_cast<vec*>(to) = value; }

// PReLU; slope 1 is the identity, slope 0 a ReLU.
inline vec bend(vec value, const float* slope) { return value > 0 ? value : value * load(slope); }

// NaN propagates, as in PyTorch.
inline vec larger(vec a, vec b) { return (a > b) | (a != a) ? a : b; }

struct Conv {
    const float *x, *weight, *bias, *slope;
    int64_t height, width, in, out, used, taps;
    const int32_t *channels, *rows, *columns;
};

// PIXELS pixels of a row starting at `at`, BLOCKS vectors of output channels starting at `block`.
template <int PIXELS, int BLOCKS>
inline void tile(const Conv& c, int64_t image, int64_t row, int64_t at, int64_t block, const float* zeros,
                 const float* add, float* y) {
    vec sums[PIXELS][BLOCKS];
#pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; ++b) {
        const vec bias = load(c.bias + (block + b) * LANES);
#pragma GCC unroll 8
        for (int p = 0; p < PIXELS; ++p) sums[p][b] = bias;
    }
    for (int64_t t = 0; t < c.taps; ++t) {
        const int64_t from = row + c.rows[t];
        if (from < 0 || from >= c.height) continue;
        const float* line = c.x + (image * c.height + from) * c.width * c.in;
        const float* source[PIXELS];
#pragma GCC unroll 8
        for (int p = 0; p < PIXELS; ++p) {
            const int64_t column = at + p + c.columns[t];
            source[p] = column < 0 || column >= c.width ? zeros : line + column * c.in;
        }
        const float* w = c.weight + t * c.used * c.out + block * LANES;
        for (int64_t k = 0; k < c.used; ++k, w += c.out) {
            const int64_t channel = c.channels[k];
            vec factors[BLOCKS];
#pragma GCC unroll 8
            for (int b = 0; b < BLOCKS; ++b) factors[b] = load(w + b * LANES);
#pragma GCC unroll 8
            for (int p = 0; p < PIXELS; ++p) {
                const float value = source[p][channel];
#pragma GCC unroll 8
                for (int b = 0; b < BLOCKS; ++b) sums[p][b] += value * factors[b];
            }
        }
    }
#pragma GCC unroll 8
    for (int p = 0; p < PIXELS; ++p)
#pragma GCC unroll 8
        for (int b = 0; b < BLOCKS; ++b) {
            const int64_t place = (at + p) * c.out + (block + b) * LANES;
            vec value = sums[p][b];
            if (add) value += load(add + place);
            store(y + place, bend(value, c.slope + (block + b) * LANES));
        }
}

template <int PIXELS, int BLOCKS>
inline void strip(const Conv& c, int64_t image, int64_t row, int64_t block, const float* zeros, const float* add,
                  float* y) {
    int64_t at = 0;
    for (; at + PIXELS <= c.width; at += PIXELS) tile<PIXELS, BLOCKS>(c, image, row, at, block, zeros, add, y);
    // Several pixels at once hide the latency of the sums.
    for (; at + 2 <= c.width; at += 2) tile<2, BLOCKS>(c, image, row, at, block, zeros, add, y);
    for (; at < c.width; ++at) tile<1, BLOCKS>(c, image, row, at, block, zeros, add, y);
}

// One row of the convolution; `add` is a row or null.
void conv_row(const Conv& c, int64_t image, int64_t row, const float* zeros, const float* add, float* y) {
    const int64_t blocks = c.out / LANES;
    int64_t block = 0;
    // Twelve accumulators and their operands fit into the registers.
    for (; block + 3 <= blocks && blocks - block != 4; block += 3) strip<4, 3>(c, image, row, block, zeros, add, y);
    for (; block + 2 <= blocks; block += 2) strip<6, 2>(c, image, row, block, zeros, add, y);
    for (; block < blocks; ++block) strip<8, 1>(c, image, row, block, zeros, add, y);
}

struct Depthwise {
    const float *weight, *bias, *slope;
};

// One row of a depthwise 3×3 convolution from the rows above, at and below it.
void depthwise_row(const Depthwise& d, const float* above, const float* at, const float* below, float* y, int64_t width,
                   int64_t channels) {
    for (int64_t c = 0; c < channels; c += LANES) {
        vec w[9];
        for (int k = 0; k < 9; ++k) w[k] = load(d.weight + k * channels + c);
        const vec base = load(d.bias + c);
        const float *up = above + c, *mid = at + c, *down = below + c;
        float* to = y + c;
        for (int64_t p = 0; p < width; ++p, up += channels, mid += channels, down += channels, to += channels) {
            vec sum = base + load(up) * w[1] + load(mid) * w[4] + load(down) * w[7];
            if (p) sum += load(up - channels) * w[0] + load(mid - channels) * w[3] + load(down - channels) * w[6];
            if (p + 1 < width)
                sum += load(up + channels) * w[2] + load(mid + channels) * w[5] + load(down + channels) * w[8];
            store(to, bend(sum, d.slope + c));
        }
    }
}

// Source indices and weights of bilinear interpolation along one axis, half-pixel centers (align_corners=false).
struct Between {
    std::vector<int64_t> low, high;
    std::vector<float> share;
    Between(int64_t from, int64_t to) : low(to), high(to), share(to) {
        const float step = float(from) / float(to);
        for (int64_t i = 0; i < to; ++i) {
            const float place = std::max(0.0f, (float(i) + 0.5f) * step - 0.5f);
            low[i] = std::min<int64_t>(int64_t(place), from - 1);
            high[i] = std::min<int64_t>(low[i] + 1, from - 1);
            share[i] = std::min(std::max(place - float(low[i]), 0.0f), 1.0f);
        }
    }
};

struct Coarse {
    const float* x;
    int64_t height, width, channels;
    Between down, along;
    Coarse(const float* x, int64_t height, int64_t width, int64_t channels, int64_t to_height, int64_t to_width)
        : x(x), height(height), width(width), channels(channels), down(height, to_height), along(width, to_width) {}
};

// One row of the upsampled map; `add` is a row or null.
void upsample_row(const Coarse& u, int64_t image, int64_t row, const float* slope, const float* add, float* y) {
    const float* top = u.x + (image * u.height + u.down.low[row]) * u.width * u.channels;
    const float* bottom = u.x + (image * u.height + u.down.high[row]) * u.width * u.channels;
    const float lower = u.down.share[row], upper = 1 - lower;
    for (size_t p = 0; p < u.along.low.size(); ++p) {
        const int64_t left = u.along.low[p] * u.channels, right = u.along.high[p] * u.channels;
        const float after = u.along.share[p], before = 1 - after;
        const float a = upper * before, b = upper * after, c = lower * before, d = lower * after;
        const int64_t place = p * u.channels;
        for (int64_t k = 0; k < u.channels; k += LANES) {
            vec value = a * load(top + left + k) + b * load(top + right + k) + c * load(bottom + left + k) +
                        d * load(bottom + right + k);
            if (add) value += load(add + place + k);
            store(y + place + k, slope ? bend(value, slope + k) : value);
        }
    }
}

}  // namespace

extern "C" {

// y = act(Σ over taps of shifted x · weight + bias + add + upsampled coarse); if `units` is 2, followed by two depthwise
// 3×3 convolutions with their activations, row by row, so that intermediate rows stay in the cache. `weight` is (taps,
// used, out); `channels` are the channels of x that are read; a tap is a shift by rows and columns with zero padding.
// `add` and `coarse` may be null.
void infer_conv(const float* x, const float* weight, const float* bias, const float* slope, const float* add,
                const float* coarse, const float* weight1, const float* bias1, const float* slope1, const float* weight2,
                const float* bias2, const float* slope2, float* y, const int32_t* channels, const int32_t* rows,
                const int32_t* columns, int64_t images, int64_t height, int64_t width, int64_t in, int64_t out,
                int64_t used, int64_t taps, int64_t coarse_height, int64_t coarse_width, int64_t units, int threads) {
    const Conv c{x, weight, bias, slope, height, width, in, out, used, taps, channels, rows, columns};
    const Depthwise first{weight1, bias1, slope1}, second{weight2, bias2, slope2};
    const Coarse u(coarse, coarse ? coarse_height : 1, coarse ? coarse_width : 1, out, height, width);
    const int64_t stride = width * out, lines = images * height;
    const std::vector<float> zeros(std::max(in, units == 2 ? stride : 0), 0.0f);
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const int64_t thread = omp_get_thread_num(), of = omp_get_num_threads();
#else
        const int64_t thread = 0, of = 1;
#endif
        const int64_t from = lines * thread / of, to = lines * (thread + 1) / of;
        std::vector<float> fine(coarse ? stride : 0), ring(units == 2 ? 6 * stride : 0);
        const auto mixed = [&](int64_t image, int64_t row, float* into) {
            const float* other = add ? add + (image * height + row) * stride : nullptr;
            if (coarse) {
                upsample_row(u, image, row, nullptr, other, fine.data());
                other = fine.data();
            }
            conv_row(c, image, row, zeros.data(), other, into);
        };
        if (units != 2)
            for (int64_t line = from; line < to; ++line) mixed(line / height, line % height, y + line * stride);
        for (int64_t line = from; units == 2 && line < to;) {
            // The rows of one image for this thread; two rows beyond them are recomputed.
            const int64_t image = line / height, begin = line % height, end = std::min(height, begin + to - line);
            float *one = ring.data(), *two = ring.data() + 3 * stride;
            const auto in_ring = [&](float* held, int64_t row, int64_t low, int64_t high) {
                return row < std::max<int64_t>(low, 0) || row >= std::min(high, height) ? zeros.data() : held + row % 3 * stride;
            };
            int64_t made = std::max<int64_t>(0, begin - 2), half = std::max<int64_t>(0, begin - 1);
            const int64_t start = made, middle = half;
            for (int64_t row = begin; row < end; ++row) {
                for (; half <= std::min(row + 1, height - 1); ++half) {
                    for (; made <= std::min(half + 1, height - 1); ++made) mixed(image, made, one + made % 3 * stride);
                    depthwise_row(first, in_ring(one, half - 1, start, made), in_ring(one, half, start, made),
                                  in_ring(one, half + 1, start, made), two + half % 3 * stride, width, out);
                }
                depthwise_row(second, in_ring(two, row - 1, middle, half), in_ring(two, row, middle, half),
                              in_ring(two, row + 1, middle, half), y + (image * height + row) * stride, width, out);
            }
            line += end - begin;
        }
    }
}

// Depthwise 3×3, padding 1: y = act(x * weight + bias); `weight` is (9, channels).
void infer_depthwise(const float* x, const float* weight, const float* bias, const float* slope, float* y, int64_t images,
                     int64_t height, int64_t width, int64_t channels, int threads) {
    const std::vector<float> zeros(width * channels, 0.0f);
    const Depthwise d{weight, bias, slope};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t line = 0; line < images * height; ++line) {
        const int64_t row = line % height, stride = width * channels;
        const float* at = x + line * stride;
        depthwise_row(d, row ? at - stride : zeros.data(), at, row + 1 < height ? at + stride : zeros.data(),
                      y + line * stride, width, channels);
    }
}

// y = act(add + bilinearly upsampled x); `add` may be null.
void infer_upsample(const float* x, const float* slope, const float* add, float* y, int64_t images, int64_t height,
                    int64_t width, int64_t to_height, int64_t to_width, int64_t channels, int threads) {
    const Coarse u(x, height, width, channels, to_height, to_width);
    const int64_t stride = to_width * channels;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t line = 0; line < images * to_height; ++line)
        upsample_row(u, line / to_height, line % to_height, slope, add ? add + line * stride : nullptr,
                     y + line * stride);
}

// Pooling 2×2, sizes rounded up: the maximum, or the mean of the pixels inside.
void infer_pool(const float* x, float* y, int64_t images, int64_t height, int64_t width, int64_t channels, int mean,
                int threads) {
    const int64_t rows = (height + 1) / 2, columns = (width + 1) / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t line = 0; line < images * rows; ++line) {
        const int64_t image = line / rows, row = line % rows * 2;
        const float* top = x + (image * height + row) * width * channels;
        const bool lower = row + 1 < height;
        const float* bottom = lower ? top + width * channels : top;
        for (int64_t p = 0; p < columns; ++p) {
            const bool righter = 2 * p + 1 < width;
            const int64_t left = 2 * p * channels, right = righter ? left + channels : left;
            const float share = (lower ? 0.5f : 1.0f) * (righter ? 0.5f : 1.0f);
            float* to = y + (line * columns + p) * channels;
            for (int64_t k = 0; k < channels; k += LANES) {
                const vec a = load(top + left + k), b = load(top + right + k), c = load(bottom + left + k),
                          d = load(bottom + right + k);
                if (mean) {
                    vec sum = a;
                    if (righter) sum += b;
                    if (lower) sum += c;
                    if (lower && righter) sum += d;
                    store(to + k, sum * share);
                } else {
                    store(to + k, larger(larger(a, b), larger(c, d)));
                }
            }
        }
    }
}
}
