// What a network of few channels computes at inference, on channels-last float32 whose channels fill whole vectors: pixels in
// a row, the channels of each side by side, padded to a multiple of LANES. Such a network is bound by memory, so what
// follows an operation element by element (a sum, a PReLU) is done before its result is written. Rows are shared out among
// the threads; each number is summed in one order, whatever their count.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int LANES = 8;
typedef float vec __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));

inline vec load(const float* from) { return *reinterpret_cast<const vec*>(from); }
inline void store(float* to, vec value) { *reinterpret_cast<vec*>(to) = value; }

// PReLU; with slopes of 1 it is nothing, with 0 a ReLU.
inline vec bend(vec value, const float* slope) { return value > 0 ? value : value * load(slope); }

struct Conv {
    const float *x, *weight, *bias, *slope, *add;
    float* y;
    int64_t height, width, in, out, used, taps;
    const int32_t *channels, *rows, *columns;
};

// PIXELS pixels of a row from `at` on, BLOCKS vectors of output channels from `block` on.
template <int PIXELS, int BLOCKS>
inline void tile(const Conv& c, int64_t image, int64_t row, int64_t at, int64_t block, const float* zeros) {
    vec sums[PIXELS][BLOCKS];
    for (int b = 0; b < BLOCKS; ++b) {
        const vec bias = load(c.bias + (block + b) * LANES);
        for (int p = 0; p < PIXELS; ++p) sums[p][b] = bias;
    }
    for (int64_t t = 0; t < c.taps; ++t) {
        const int64_t from = row + c.rows[t];
        if (from < 0 || from >= c.height) continue;
        const float* line = c.x + (image * c.height + from) * c.width * c.in;
        const float* source[PIXELS];
        for (int p = 0; p < PIXELS; ++p) {
            const int64_t column = at + p + c.columns[t];
            source[p] = column < 0 || column >= c.width ? zeros : line + column * c.in;
        }
        const float* w = c.weight + t * c.used * c.out + block * LANES;
        for (int64_t k = 0; k < c.used; ++k, w += c.out) {
            const int64_t channel = c.channels[k];
            vec factors[BLOCKS];
            for (int b = 0; b < BLOCKS; ++b) factors[b] = load(w + b * LANES);
            for (int p = 0; p < PIXELS; ++p) {
                const float value = source[p][channel];
                for (int b = 0; b < BLOCKS; ++b) sums[p][b] += value * factors[b];
            }
        }
    }
    const int64_t first = ((image * c.height + row) * c.width + at) * c.out + block * LANES;
    for (int p = 0; p < PIXELS; ++p)
        for (int b = 0; b < BLOCKS; ++b) {
            const int64_t place = first + p * c.out + b * LANES;
            vec value = sums[p][b];
            if (c.add) value += load(c.add + place);
            store(c.y + place, bend(value, c.slope + (block + b) * LANES));
        }
}

template <int PIXELS, int BLOCKS>
inline void strip(const Conv& c, int64_t image, int64_t row, int64_t block, const float* zeros) {
    int64_t at = 0;
    for (; at + PIXELS <= c.width; at += PIXELS) tile<PIXELS, BLOCKS>(c, image, row, at, block, zeros);
    for (; at < c.width; ++at) tile<1, BLOCKS>(c, image, row, at, block, zeros);
}

// Where each of a line's values lies between two of another line, half-pixel centres (align_corners false).
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

}  // namespace

extern "C" {

// y = act(Σ over taps of x shifted · weight + bias + add). `weight` is (taps, used, out); `channels` are those of x that are
// read; a tap is a shift by rows and columns, beyond the border all is zero. `add` may be null, and may be y.
void infer_conv(const float* x, const float* weight, const float* bias, const float* slope, const float* add, float* y,
                const int32_t* channels, const int32_t* rows, const int32_t* columns, int64_t images, int64_t height,
                int64_t width, int64_t in, int64_t out, int64_t used, int64_t taps, int threads) {
    const Conv c{x, weight, bias, slope, add, y, height, width, in, out, used, taps, channels, rows, columns};
    const std::vector<float> zeros(in, 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t line = 0; line < images * height; ++line) {
        const int64_t image = line / height, row = line % height;
        int64_t block = 0;
        // Twelve sums fit into the registers beside what they are made of.
        for (; block + 3 <= out / LANES && out / LANES - block != 4; block += 3)
            strip<4, 3>(c, image, row, block, zeros.data());
        for (; block + 2 <= out / LANES; block += 2) strip<6, 2>(c, image, row, block, zeros.data());
        for (; block < out / LANES; ++block) strip<8, 1>(c, image, row, block, zeros.data());
    }
}

// Depthwise 3×3, padding 1: y = act(x * weight + bias); `weight` is (9, channels).
void infer_depthwise(const float* x, const float* weight, const float* bias, const float* slope, float* y, int64_t images,
                     int64_t height, int64_t width, int64_t channels, int threads) {
    const std::vector<float> zeros(width * channels, 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t line = 0; line < images * height; ++line) {
        const int64_t row = line % height, stride = width * channels;
        const float* mid = x + line * stride;
        const float* lines[3] = {row ? mid - stride : zeros.data(), mid,
                                 row + 1 < height ? mid + stride : zeros.data()};
        for (int64_t c = 0; c < channels; c += LANES) {
            vec w[9];
            for (int k = 0; k < 9; ++k) w[k] = load(weight + k * channels + c);
            const vec base = load(bias + c);
            const float *up = lines[0] + c, *at = lines[1] + c, *down = lines[2] + c;
            float* to = y + line * stride + c;
            for (int64_t p = 0; p < width; ++p, up += channels, at += channels, down += channels, to += channels) {
                vec sum = base + load(up) * w[1] + load(at) * w[4] + load(down) * w[7];
                if (p) sum += load(up - channels) * w[0] + load(at - channels) * w[3] + load(down - channels) * w[6];
                if (p + 1 < width)
                    sum += load(up + channels) * w[2] + load(at + channels) * w[5] + load(down + channels) * w[8];
                store(to, bend(sum, slope + c));
            }
        }
    }
}

// y = act(add + x up-sampled bilinearly); `add` may be null, and may be y.
void infer_upsample(const float* x, const float* slope, const float* add, float* y, int64_t images, int64_t height,
                    int64_t width, int64_t to_height, int64_t to_width, int64_t channels, int threads) {
    const Between down(height, to_height), along(width, to_width);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t line = 0; line < images * to_height; ++line) {
        const int64_t image = line / to_height, row = line % to_height;
        const float* top = x + (image * height + down.low[row]) * width * channels;
        const float* bottom = x + (image * height + down.high[row]) * width * channels;
        const float lower = down.share[row], upper = 1 - lower;
        for (int64_t p = 0; p < to_width; ++p) {
            const int64_t left = along.low[p] * channels, right = along.high[p] * channels;
            const float after = along.share[p], before = 1 - after;
            const float a = upper * before, b = upper * after, c = lower * before, d = lower * after;
            const int64_t place = (line * to_width + p) * channels;
            for (int64_t k = 0; k < channels; k += LANES) {
                vec value = a * load(top + left + k) + b * load(top + right + k) + c * load(bottom + left + k) +
                            d * load(bottom + right + k);
                if (add) value += load(add + place + k);
                store(y + place + k, bend(value, slope + k));
            }
        }
    }
}

// Pooling 2×2, sides rounded up; the maximum, or the mean of those that are there.
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
                    const vec e = a > b ? a : b, f = c > d ? c : d;
                    store(to + k, e > f ? e : f);
                }
            }
        }
    }
}
}
