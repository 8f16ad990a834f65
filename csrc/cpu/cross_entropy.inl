// One row at a time, kLanes logits in a vector. Included once for each kind of processor, inside a namespace that
// defines kLanes; nothing here has external linkage.

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

constexpr int kUnrolled = 4;  // vectors whose sums do not wait for each other
constexpr float kLowest = -__builtin_huge_valf();

inline Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline Floats load(const uint16_t* p) {
  Halves x;
  std::memcpy(&x, p, sizeof x);
  return reinterpret_cast<Floats>(__builtin_convertvector(x, Words) << 16);
}

inline void store(Floats x, float* p) { std::memcpy(p, &x, sizeof x); }

inline void store(Floats x, uint16_t* p) {
  const Words u = reinterpret_cast<Words>(x);
  const Words nan = reinterpret_cast<Words>(x != x);
  const Words rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const Halves narrow = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), Halves);
  std::memcpy(p, &narrow, sizeof narrow);
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// e^x for x of at most about 0, to about one unit in the last place; 0 below -87. NaN stays NaN.
inline Floats exponential(Floats x) {
  // x = n ln 2 + r: adding 1.5 * 2^23 rounds to an integer, which the low bits then hold. n ln 2 in two parts, the
  // first of which is exact.
  constexpr float kInteger = 12582912.0f;
  constexpr float kHigh = 0x1.62ep-1f, kLow = 0x1.0bfbe8p-15f;
  const auto under = x < -87.0f;
  x = under ? Floats{} - 87.0f : x;
  const Floats shifted = x * 0x1.715476p+0f + kInteger;
  const Floats n = shifted - kInteger;
  const Floats r = (x - n * kHigh) - n * kLow;
  Floats p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  const Words power = (reinterpret_cast<Words>(shifted) << 23) + 0x3f800000u;
  return under ? Floats{} : p * reinterpret_cast<Floats>(power);
}

// Calls body(vector, which sum, first column, columns); lanes past the end are -inf.
template <typename T, typename Body>
inline void for_each(const T* row, int64_t v, Body body) {
  int64_t j = 0;
  for (; j + kUnrolled * kLanes <= v; j += kUnrolled * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kUnrolled; ++i) body(load(row + j + i * kLanes), i, j + i * kLanes, int64_t{kLanes});
  }
  for (; j + kLanes <= v; j += kLanes) body(load(row + j), 0, j, int64_t{kLanes});
  if (j == v) return;
  T rest[kLanes];
  store(Floats{} + kLowest, rest);
  for (int64_t i = 0; i < v - j; ++i) rest[i] = row[j + i];
  body(load(rest), 0, j, v - j);
}

template <typename T>
void one_row(const CrossEntropyParams& p, T* row, int64_t label, float& loss) {
  const int64_t v = p.v;
  if (label == p.ignored) {
    loss = 0.0f;
    if (p.gradient) std::memset(row, 0, sizeof(T) * v);
    return;
  }
  const bool known = label >= 0 && label < v;
  const float mine = widened(row[known ? label : 0]);

  Floats lanes[kUnrolled];
  for (Floats& x : lanes) x = Floats{} + kLowest;
  for_each(row, v, [&](Floats z, int i, int64_t, int64_t) { lanes[i] = larger(z, lanes[i]); });
  const Floats largest = larger(larger(lanes[0], lanes[1]), larger(lanes[2], lanes[3]));
  float most = largest[0];
  for (int i = 1; i < kLanes; ++i) most = largest[i] > most ? largest[i] : most;

  for (Floats& x : lanes) x = Floats{};
  for_each(row, v, [&](Floats z, int i, int64_t, int64_t) { lanes[i] += exponential(z - most); });
  const Floats sums = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += sums[i];

  const float log_total = __builtin_logf(total);
  loss = log_total + (most - mine);
  if (p.smoothing != 0.0f) {
    for (Floats& x : lanes) x = Floats{};
    for_each(row, v, [&](Floats z, int i, int64_t, int64_t columns) {
      for (int64_t c = columns; c < kLanes; ++c) z[c] = most;
      lanes[i] += z - most;
    });
    const Floats differences = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    float difference = 0.0f;
    for (int i = 0; i < kLanes; ++i) difference += differences[i];
    loss = (1.0f - p.smoothing) * loss + p.smoothing * (log_total - difference / static_cast<float>(v));
  }
  if (!known) loss = __builtin_nanf("");
  if (!p.gradient) return;

  const float scale = *p.scale, factor = scale / total, less = scale * p.smoothing / static_cast<float>(v);
  for_each(row, v, [&](Floats z, int, int64_t first, int64_t columns) {
    const Floats d = exponential(z - most) * factor - less;
    if (columns == kLanes) {
      store(d, row + first);
    } else {
      T rest[kLanes];
      store(d, rest);
      for (int64_t c = 0; c < columns; ++c) row[first + c] = rest[c];
    }
  });
  if (known) {
    const Floats e = exponential(Floats{} + (mine - most));
    T rounded[kLanes];
    store(e * factor - (less + (1.0f - p.smoothing) * scale), rounded);
    row[label] = rounded[0];
  }
}

void rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (p.dtype == DType::kFloat32) {
      one_row(p, static_cast<float*>(p.logits) + i * p.v, p.labels[i], p.losses[i]);
    } else {
      one_row(p, static_cast<uint16_t*>(p.logits) + i * p.v, p.labels[i], p.losses[i]);
    }
  }
}
