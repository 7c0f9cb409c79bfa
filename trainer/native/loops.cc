// The loops of an LSTM layer on a CPU. This file is compiled once for each instruction set, with
// WARMSTATE_LOOPS the name of what it defines; lstm.cc chooses one when the program runs. So it may
// define no symbol that other parts of the program have too, as containers would: the linker keeps
// one of each, and that may hold instructions that the processor lacks.
//
// A row's result does not depend on the other rows or on threads, to the last bit: each of its sums
// is one accumulator that runs through the depth in order.

#include "loops.h"

#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

using namespace warmstate;

// A tile is what a product keeps in registers: kRows rows of kVectors vectors of kWidth floats.
// kDepth rows of d_z go into the weights' gradients at once: a tile of them fits the first cache
// (AVX2: 256 * 16 * 4 bytes), or half of the second (AVX-512: 512 * 64 * 4).
#if defined(__AVX512F__)  // 32 registers of 16 floats: 24 sums, 4 of the matrix, 1 factor
constexpr int kWidth = 16, kRows = 6, kVectors = 4, kDepth = 512;
#elif defined(__AVX2__)  // 16 registers of 8 floats: 12 sums, 2 of the matrix, 1 factor
constexpr int kWidth = 8, kRows = 6, kVectors = 2, kDepth = 256;
#elif defined(__aarch64__)  // 32 registers of 4 floats: 24 sums, 4 of the matrix, 1 factor
constexpr int kWidth = 4, kRows = 6, kVectors = 4, kDepth = 256;
#else  // 16 registers of 4 floats, as in SSE2: 12 sums, 2 of the matrix, 1 factor
constexpr int kWidth = 4, kRows = 6, kVectors = 2, kDepth = 256;
#endif
constexpr int kTile = kVectors * kWidth;  // columns of a tile
constexpr int kGroup = 4 * kWidth;        // columns of a group of tiles: all gates of kWidth units
constexpr int kTiles = kGroup / kTile;    // tiles of a group
constexpr int kLine = 16;                 // floats in a cache line
constexpr int kAhead = 4096;              // floats by which a matrix is fetched into the second cache
constexpr int kMatrixRows = 16;           // of a matrix register (AMX)

typedef float Vector __attribute__((vector_size(4 * kWidth)));
typedef float Unaligned __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Bits __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

inline Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
inline Vector all(float x) { return x - Vector{}; }  // x + 0 would add: x may be -0

// Numbers in bfloat16, which are the upper halves of floats.
inline Vector load(const uint16_t* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return reinterpret_cast<Vector>(__builtin_convertvector(halves, Bits) << 16);
}
inline void store(uint16_t* p, Vector v) {
#if defined(__AVX512BF16__)
  const __m256bh halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
#else
  const Bits bits = reinterpret_cast<Bits>(v);
  const Bits nearest = bits + 0x7fff + (bits >> 16 & 1);  // a tie goes to the even one
  const auto is_nan = (bits & 0x7fffffff) > 0x7f800000;
  const Halves halves = __builtin_convertvector((is_nan ? bits | 0x00400000 : nearest) >> 16, Halves);
#endif
  std::memcpy(p, &halves, sizeof halves);
}

// What is not a number compares as false, and so stays: a run must see it.
inline Vector clamped(Vector x, float bound) {
  x = all(-bound) > x ? all(-bound) : x;
  return all(bound) < x ? all(bound) : x;
}

// exp(-x), within 2 units in the last place; beyond |x| = 87, as there.
inline Vector exp_of_minus(Vector x) {
  x = clamped(x, 87.0f);
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector shifted = x * -1.44269504088896341f + rounder;
  const Vector n = shifted - rounder;
  const Vector r = n * 2.12194440e-4f - (n * 0.693359375f + x);  // within log(2) / 2 of 0
  Vector y = all(1.38368353e-3f);  // a polynomial fitted to exp there, within 2e-9
  y = y * r + 8.37482419e-3f;
  y = y * r + 4.16682251e-2f;
  y = y * r + 1.66664198e-1f;
  y = y * r + 4.99999911e-1f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const Integers power = (reinterpret_cast<Integers>(shifted) << 23) + 0x3f800000;  // of 2, to n
  return y * reinterpret_cast<Vector>(power);
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exp_of_minus(x)); }

// x times a quotient of polynomials in its square, fitted within 3e-8; from |x| = 9 on it is 1.
inline Vector tanh_of(Vector x) {
  x = clamped(x, 9.0f);
  const Vector square = x * x;
  Vector above = all(1.33546510e-8f), below = all(7.77655425e-7f);
  above = above * square + 2.06090755e-5f;
  below = below * square + 3.28563416e-4f;
  above = above * square + 3.49558773e-3f;
  below = below * square + 2.58769807e-2f;
  above = above * square + 1.33810253e-1f;
  below = below * square + 4.67143409e-1f;
  above = above * square + 1.0f;
  below = below * square + 1.0f;
  return x * above / below;
}

// The types of factors. A factor holds kSteps numbers that follow each other along the depth. What
// goes into the loops and comes out of them at every step has type Stored.
struct Whole {
  typedef float Number;
  typedef float Stored;
  static constexpr Factor kFactor = Factor::kFloat;
  static constexpr int64_t kSteps = 1;
  static constexpr int kTogether = kRows;  // rows that go through a product together

  static Vector load(const Number* p) { return ::load(p); }
  static Vector all(Number a) { return ::all(a); }
  static void add(Vector& sum, Vector b, Vector a) { sum += b * a; }
  static void pack(Vector numbers, Number* to) { store(to, numbers); }
};

#if defined(__AVX512BF16__)
struct Half {
  typedef uint32_t Number;
  typedef uint16_t Stored;
  static constexpr Factor kFactor = Factor::kPair;
  static constexpr int64_t kSteps = 2;
#if defined(__AMX_BF16__)
  static constexpr int kTogether = 2 * kMatrixRows;
#else
  static constexpr int kTogether = kRows;
#endif

  static __m512bh load(const Number* p) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
  }
  static __m512bh all(Number a) {
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a)));
  }
  static void add(Vector& sum, __m512bh b, __m512bh a) {
    sum = reinterpret_cast<Vector>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), b, a));
  }
  static void pack(Vector numbers, Number* to) {
    store(reinterpret_cast<uint16_t*>(to), numbers);
  }
};
#else
struct Half : Whole {  // without an instruction for them
  typedef uint16_t Stored;
  static constexpr Factor kFactor = Factor::kRounded;

  static void pack(Vector numbers, Number* to) {
    Stored rounded[kWidth];
    store(rounded, numbers);
    store(to, ::load(rounded));
  }
};
#endif

template <typename Kind>
using NumberOf = typename Kind::Number;
template <typename Kind>
using StoredOf = typename Kind::Stored;

template <typename Kind>
int64_t factors_of(int64_t depth) {
  return (depth + Kind::kSteps - 1) / Kind::kSteps;
}

// ---- Products ----

// sums[m] += row m * kTogether tiles, for kMany rows. A row's factors are kStride from each other.
template <typename Kind, int kMany, int kTogether, int kStride>
inline void multiply(const NumberOf<Kind>* tile, int64_t factors,
                     const NumberOf<Kind>* const* rows, Vector (*sums)[4]) {
  constexpr int kAcross = kTogether * kVectors;
  Vector local[kMany][kAcross];  // in registers: g++ keeps an argument in memory
  const NumberOf<Kind>* row[kMany];
#pragma GCC unroll 6
  for (int m = 0; m < kMany; ++m) {
    row[m] = rows[m];
#pragma GCC unroll 4
    for (int v = 0; v < kAcross; ++v) local[m][v] = sums[m][v];
  }
  for (int64_t k = 0; k < factors; ++k, tile += kTile) {
    decltype(Kind::load(tile)) b[kAcross];
#pragma GCC unroll 4
    for (int v = 0; v < kAcross; ++v) {
      const auto* from = tile + v / kVectors * factors * kTile + v % kVectors * kWidth;
      b[v] = Kind::load(from);
      if (v % kVectors * kWidth % kLine == 0) __builtin_prefetch(from + kAhead, 0, 2);
    }
#pragma GCC unroll 6
    for (int m = 0; m < kMany; ++m) {
      const auto a = Kind::all(row[m][k * kStride]);
#pragma GCC unroll 4
      for (int v = 0; v < kAcross; ++v) Kind::add(local[m][v], b[v], a);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kMany; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kAcross; ++v) sums[m][v] = local[m][v];
  }
}

// The same for `many` rows, at most kRows, and one tile.
template <typename Kind, int kStride>
void multiply_tile(int64_t many, const NumberOf<Kind>* tile, int64_t factors,
                   const NumberOf<Kind>* const* rows, Vector (*sums)[4]) {
  switch (many) {
    case 1: return multiply<Kind, 1, 1, kStride>(tile, factors, rows, sums);
    case 2: return multiply<Kind, 2, 1, kStride>(tile, factors, rows, sums);
    case 3: return multiply<Kind, 3, 1, kStride>(tile, factors, rows, sums);
    case 4: return multiply<Kind, 4, 1, kStride>(tile, factors, rows, sums);
    case 5: return multiply<Kind, 5, 1, kStride>(tile, factors, rows, sums);
    default: return multiply<Kind, 6, 1, kStride>(tile, factors, rows, sums);
  }
}

#if defined(__AMX_BF16__)
// What the processor has to know of its eight matrix registers.
struct alignas(64) MatrixRegisters {
  uint8_t palette = 1, restart = 0, reserved[14] = {};
  uint16_t bytes_of_row[16] = {};
  uint8_t rows[16] = {};
};

// Sums are in registers 0 to 3, rows in 4 and 5, and `factors` rows of the matrix in 6 and 7.
void use_matrix_registers(int64_t many, int64_t factors) {
  MatrixRegisters registers;
  const int64_t first = many < kMatrixRows ? many : kMatrixRows;
  const int64_t second = many > kMatrixRows ? many - kMatrixRows : 1;
  const int64_t rows[] = {first, first, second, second, first, second, factors, factors};
  for (int i = 0; i < 8; ++i) {
    registers.rows[i] = rows[i];
    registers.bytes_of_row[i] = i == 4 || i == 5 ? 4 * factors : 64;
  }
  asm volatile("" : : "r"(&registers) : "memory");  // g++ does not know that all of it is read,
  _tile_loadconfig(&registers);                     // nor what the other functions read and write
}

// sums[m] += row m * half a group, by the processor's matrix registers. Rows are evenly spaced.
template <bool kSecond>  // whether there are more than kMatrixRows rows
void multiply_half_group(const uint32_t* half, int64_t factors, int64_t chunk,
                         const uint32_t* const* rows, int64_t stride, Vector (*sums)[4]) {
  _tile_loadd(0, sums[0], sizeof *sums);
  _tile_loadd(1, sums[0] + 1, sizeof *sums);
  if (kSecond) _tile_loadd(2, sums[kMatrixRows], sizeof *sums);
  if (kSecond) _tile_loadd(3, sums[kMatrixRows] + 1, sizeof *sums);
  for (int64_t k = 0; k < factors; k += chunk) {
    _tile_loadd(6, half + k * kTile, 4 * kTile);
    _tile_loadd(4, rows[0] + k, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, half + k * kTile + kWidth, 4 * kTile);
    _tile_dpbf16ps(1, 4, 7);
    if (!kSecond) continue;
    _tile_loadd(5, rows[kMatrixRows] + k, stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums[0], sizeof *sums);
  _tile_stored(1, sums[0] + 1, sizeof *sums);
  if (kSecond) _tile_stored(2, sums[kMatrixRows], sizeof *sums);
  if (kSecond) _tile_stored(3, sums[kMatrixRows] + 1, sizeof *sums);
}

void multiply_group_in_matrices(int64_t many, const uint32_t* group, int64_t factors,
                                const uint32_t* const* rows, Vector (*sums)[4]) {
  const int64_t chunk = factors % 16 ? 8 : 16;  // units are a multiple of 16, pairs of 8
  const int64_t stride = many > 1 ? 4 * (rows[1] - rows[0]) : 0;
  use_matrix_registers(many, chunk);
  for (int half = 0; half < 2; ++half) {
    auto* of_half = reinterpret_cast<Vector(*)[4]>(&sums[0][2 * half]);
    const auto multiply = many > kMatrixRows ? multiply_half_group<true> : multiply_half_group<false>;
    multiply(group + 2 * half * kWidth, factors, chunk, rows, stride, of_half);
  }
  _tile_release();
  asm volatile("" : : : "memory");
}
#endif

// The same for a group of tiles. The tiles of few rows go together: a sum waits for its last step,
// so there must be several.
template <typename Kind>
void multiply_group(int64_t many, const NumberOf<Kind>* group, int64_t factors,
                    const NumberOf<Kind>* const* rows, Vector (*sums)[4]) {
#if defined(__AMX_BF16__)
  if constexpr (Kind::kTogether > kRows) {
    return multiply_group_in_matrices(many, group, factors, rows, sums);
  }
#endif
  switch (many) {
    case 1: return multiply<Kind, 1, kTiles, 1>(group, factors, rows, sums);
    case 2: return multiply<Kind, 2, kTiles, 1>(group, factors, rows, sums);
    case 3: return multiply<Kind, 3, kTiles, 1>(group, factors, rows, sums);
  }
  for (int tile = 0; tile < kTiles; ++tile, group += factors * kTile) {
    // A row of four sums begins kVectors further on, and ends in what is not touched.
    auto* of_tile = reinterpret_cast<Vector(*)[4]>(&sums[0][tile * kVectors]);
    multiply_tile<Kind, 1>(many, group, factors, rows, of_tile);
  }
}

// Returns how many of `left` rows go together: as many as fit, but no small rest at the end.
template <typename Kind>
int64_t rows_together(int64_t left) {
  const int64_t parts = (left + Kind::kTogether - 1) / Kind::kTogether;
  return (left + parts - 1) / parts;
}

inline bool shows(const bool* mask, int64_t place) { return !mask || mask[place]; }

// ---- The forward loop ----

// Rows of a batch in the forward loop.
template <typename Kind>
struct States {
  const Forward& call;
  const int64_t* rows;
  int64_t factors;          // of a state
  NumberOf<Kind>* packed;   // two states h of a row, before and after the step
  int64_t newer[kMostRows];  // which of the two is the newer one

  StoredOf<Kind>* outputs() { return static_cast<StoredOf<Kind>*>(call.outputs); }
  NumberOf<Kind>* state(int64_t i, int64_t which) {
    return packed + (2 * i + which) * (factors + kPadding);
  }
  // Finds the states before the step. Where many rows go together they must be evenly spaced, and
  // so are copied behind all states of `count` rows.
  void before(const int64_t* shown, int64_t many, int64_t count, const NumberOf<Kind>** found) {
    for (int64_t m = 0; m < many; ++m) {
      found[m] = state(shown[m], newer[shown[m]]);
      if (Kind::kTogether == kRows) continue;
      NumberOf<Kind>* copy = packed + (2 * count + m) * (factors + kPadding);
      std::memcpy(copy, found[m], sizeof *copy * factors);
      found[m] = copy;
    }
  }
  void begin(int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      newer[i] = 0;
      for (int64_t u = 0; u < call.units; u += kWidth) {
        Kind::pack(load(call.h + rows[i] * call.units + u), state(i, 0) + u / Kind::kSteps);
      }
    }
  }
  void repeat(int64_t i, int64_t place) {
    const int64_t at = rows[i] * call.units, to = place * call.units;
    for (int64_t u = 0; call.outputs && u < call.units; u += kWidth) {
      store(outputs() + to + u, load(call.h + at + u));
    }
    if (call.cells) std::memcpy(call.cells + to, call.c + at, 4 * call.units);
    if (call.gates) std::memset(call.gates + 4 * to, 0, 4 * 4 * call.units);
  }
  // Begins the sums of the units from u on with z, and fetches what is next.
  void start(int64_t i, int64_t u, int64_t place, Vector (&sums)[4]) {
    const int64_t units = call.units, row = call.index ? call.index[place] : place;
    const auto* z = static_cast<const StoredOf<Kind>*>(call.z) + row * 4 * units + u;
    const float* bias = call.bias ? call.bias + rows[i] * 4 * units + u : nullptr;
    for (int gate = 0; gate < 4; ++gate) {
      sums[gate] = load(z + gate * units);
      if (bias) sums[gate] += load(bias + gate * units);
      __builtin_prefetch(z + gate * units + kWidth);
    }
    if (call.outputs) __builtin_prefetch(outputs() + place * units + u, 1);
    if (call.cells) __builtin_prefetch(call.cells + place * units + u, 1);
  }
  // From the sums to the new states.
  void finish(int64_t i, int64_t u, int64_t place, const Vector (&sums)[4]) {
    const int64_t units = call.units;
    float *h = call.h + rows[i] * units + u, *c = call.c + rows[i] * units + u;
    const Vector in = sigmoid(sums[0]), forget = sigmoid(sums[1]), candidate = tanh_of(sums[2]),
                 out = sigmoid(sums[3]);
    const Vector cell = forget * load(c) + in * candidate, output = out * tanh_of(cell);
    store(c, cell);
    store(h, output);
    Kind::pack(output, state(i, 1 - newer[i]) + u / Kind::kSteps);
    if (call.outputs) store(outputs() + place * units + u, output);
    if (!call.gates) return;
    float* gate = call.gates + place * 4 * units + u;
    store(gate, in);
    store(gate + units, forget);
    store(gate + 2 * units, candidate);
    store(gate + 3 * units, out);
    store(call.cells + place * units + u, cell);
  }
};

template <typename Kind>
void forward(const Forward& call, const int64_t* rows, int64_t count, float* scratch) {
  States<Kind> states{call, rows, factors_of<Kind>(call.units),
                      reinterpret_cast<NumberOf<Kind>*>(scratch), {}};
  const auto* recurrent = static_cast<const NumberOf<Kind>*>(call.recurrent);
  states.begin(count);
  for (int64_t t = 0; t < call.steps; ++t) {
    int64_t shown[kMostRows], many_shown = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = rows[i] * call.steps + t;
      if (shows(call.mask, place)) {
        shown[many_shown++] = i;
      } else {
        states.repeat(i, place);
      }
    }
    const NumberOf<Kind>* before[kMostRows];
    states.before(shown, many_shown, count, before);
    for (int64_t u = 0; u < call.units; u += kWidth) {
      for (int64_t first = 0, many; first < many_shown; first += many) {
        many = rows_together<Kind>(many_shown - first);
        Vector sums[Kind::kTogether][4];
        for (int64_t m = 0; m < many; ++m) {
          const int64_t i = shown[first + m];
          states.start(i, u, rows[i] * call.steps + t, sums[m]);
        }
        multiply_group<Kind>(many, recurrent + 4 * u * states.factors, states.factors, before + first,
                             sums);
        for (int64_t m = 0; m < many; ++m) {
          const int64_t i = shown[first + m];
          states.finish(i, u, rows[i] * call.steps + t, sums[m]);
        }
      }
    }
    for (int64_t m = 0; m < many_shown; ++m) states.newer[shown[m]] ^= 1;
  }
}

// ---- The backward loop ----

// From the gradients of a step's h and c to those of its gates, and of c before the step.
template <typename Kind>
inline void through_gates(const Backward& call, int64_t row, int64_t t, NumberOf<Kind>* packed) {
  const int64_t units = call.units, place = row * call.steps + t;
  const float *gate = call.gates + place * 4 * units, *c = call.cells + place * units;
  const float *c_before = t ? c - units : call.c + row * units, *d_h = call.d_h + row * units;
  auto* d_z = static_cast<StoredOf<Kind>*>(call.d_z) + place * 4 * units;
  float *d_c = call.d_c + row * units, *d_bias = call.d_bias + row * 4 * units;
  for (int64_t u = 0; u < units; u += kWidth) {
    const Vector in = load(gate + u), forget = load(gate + units + u),
                 candidate = load(gate + 2 * units + u), out = load(gate + 3 * units + u);
    const Vector squashed = tanh_of(load(c + u)), of_h = load(d_h + u);
    const Vector of_c = load(d_c + u) + of_h * out * (1.0f - squashed * squashed);
    const Vector gradients[4] = {of_c * candidate * in * (1.0f - in),
                                 of_c * load(c_before + u) * forget * (1.0f - forget),
                                 of_c * in * (1.0f - candidate * candidate),
                                 of_h * squashed * out * (1.0f - out)};
    store(d_c + u, of_c * forget);
    for (int64_t g = 0; g < 4; ++g) {
      store(d_z + g * units + u, gradients[g]);
      store(d_bias + g * units + u, load(d_bias + g * units + u) + gradients[g]);
      Kind::pack(gradients[g], packed + (g * units + u) / Kind::kSteps);
    }
  }
}

// Makes a row at most so long, keeping its direction. A row that is not finite stays so.
inline void clip(float norm, int64_t units, float* row) {
  Vector squares = {};
  for (int64_t u = 0; u < units; u += kWidth) squares += load(row + u) * load(row + u);
  float sum = 0;
  for (int v = 0; v < kWidth; ++v) sum += squares[v];
  if (sum <= norm * norm) return;
  const float factor = norm / __builtin_sqrtf(sum);
  for (int64_t u = 0; u < units; u += kWidth) store(row + u, load(row + u) * factor);
}

template <typename Kind>
void backward(const Backward& call, const int64_t* rows, int64_t count, float* scratch) {
  const int64_t units = call.units, factors = factors_of<Kind>(4 * units);
  const auto* recurrent = static_cast<const NumberOf<Kind>*>(call.recurrent);
  auto* d_gates = reinterpret_cast<NumberOf<Kind>*>(scratch);
  const auto* d_outputs = static_cast<const StoredOf<Kind>*>(call.d_outputs);
  auto* d_z = static_cast<StoredOf<Kind>*>(call.d_z);
  for (int64_t i = 0; i < count; ++i) {
    std::memset(call.d_bias + rows[i] * 4 * units, 0, 4 * 4 * units);
  }
  for (int64_t t = call.steps - 1; t >= 0; --t) {
    int64_t shown[kMostRows], many_shown = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = rows[i] * call.steps + t;
      float* d_h = call.d_h + rows[i] * units;
      for (int64_t u = 0; d_outputs && u < units; u += kWidth) {
        store(d_h + u, load(d_h + u) + load(d_outputs + place * units + u));
      }
      if (shows(call.mask, place)) {
        through_gates<Kind>(call, rows[i], t, d_gates + many_shown * (factors + kPadding));
        shown[many_shown++] = rows[i];
      } else {
        std::memset(d_z + place * 4 * units, 0, sizeof *d_z * 4 * units);
      }
    }
    for (int64_t u = 0; u < units; u += kGroup) {
      const int64_t vectors = units - u < kGroup ? (units - u) / kWidth : 4;
      for (int64_t first = 0, many; first < many_shown; first += many) {
        many = rows_together<Kind>(many_shown - first);
        Vector sums[Kind::kTogether][4] = {};
        const NumberOf<Kind>* left[Kind::kTogether];
        for (int64_t m = 0; m < many; ++m) left[m] = d_gates + (first + m) * (factors + kPadding);
        multiply_group<Kind>(many, recurrent + u * factors, factors, left, sums);
        for (int64_t m = 0; m < many; ++m) {
          float* d_h = call.d_h + shown[first + m] * units + u;
          for (int64_t v = 0; v < vectors; ++v) store(d_h + v * kWidth, sums[m][v]);
        }
      }
    }
    for (int64_t m = 0; call.clip_norm && m < many_shown; ++m) {
      clip(call.clip_norm, units, call.d_h + shown[m] * units);
    }
  }
}

// ---- Products with rows of the batch and time ----

// Columns of a group of which only `many` are there.
inline void load_some(const float* from, int64_t many, Vector (&to)[4]) {
  float each[kGroup] = {};
  std::memcpy(each, from, 4 * many);
  for (int v = 0; v < 4; ++v) to[v] = load(each + v * kWidth);
}
inline void store_some(float* to, int64_t many, const Vector (&from)[4]) {
  if (many == kGroup) {
    for (int v = 0; v < 4; ++v) store(to + v * kWidth, from[v]);
    return;
  }
  float each[kGroup];
  for (int v = 0; v < 4; ++v) store(each + v * kWidth, from[v]);
  std::memcpy(to, each, 4 * many);
}

// A group of columns of some rows.
void product_of_group(const Product& call, const int64_t* rows, int64_t count, int64_t column) {
  const auto* group = static_cast<const float*>(call.right) + column * call.depth;
  const int64_t columns = call.columns - column < kGroup ? call.columns - column : kGroup;
  // The bias comes last, as in the forward loop, whose rows may have different ones.
  Vector bias[4] = {};
  if (call.bias) load_some(call.bias + column, columns, bias);
  for (int64_t first = 0, many; first < count; first += many) {
    many = rows_together<Whole>(count - first);
    Vector sums[kRows][4];
    const float* left[kRows];
    for (int64_t m = 0; m < many; ++m) {
      left[m] = call.left + rows[first + m] * call.depth;
      for (int v = 0; v < 4; ++v) sums[m][v] = Vector{};
      const float* to = call.out + rows[first + m] * call.columns + column;
      for (int64_t at = 0; at < columns; at += kLine) __builtin_prefetch(to + at, 1);
    }
    multiply_group<Whole>(many, group, call.depth, left, sums);
    for (int64_t m = 0; m < many; ++m) {
      for (int v = 0; v < 4 && call.bias; ++v) sums[m][v] += bias[v];
      store_some(call.out + rows[first + m] * call.columns + column, columns, sums[m]);
    }
  }
}

void product(const Product& call, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; block += kProductRows) {
    int64_t shown[kProductRows], many_shown = 0;
    for (int64_t row = block; row < end && row < block + kProductRows; ++row) {
      if (shows(call.mask, row)) {
        shown[many_shown++] = row;
      } else {
        std::memset(call.out + row * call.columns, 0, 4 * call.columns);
      }
    }
    for (int64_t column = 0; column < call.columns; column += kGroup) {
      product_of_group(call, shown, many_shown, column);
    }
  }
}

// ---- The gradients of the weights ----

// Left factors are in tiles [kDepth, kRows]. They are copied eight at a time, so the last ones of a
// tile run into the two places behind it.
constexpr int64_t kCopied = 8;
constexpr int64_t kRowsAhead = 48;
constexpr int64_t kLeftTile = kDepth * kRows + kCopied;

int64_t left_tiles(const WeightGradient& call) {
  return (call.width + call.units + kRows - 1) / kRows;
}

int64_t weight_gradient_scratch(const WeightGradient& call, int64_t columns) {
  return left_tiles(call) * (kRows + kLeftTile) + kCopied + kDepth * kTile;
}

// Packs [inputs, h before the step] of some places, each of which is `line` meanwhile.
void pack_left(const WeightGradient& call, const int64_t* places, int64_t many, float* line,
               float* to) {
  for (int64_t k = 0; k < many; ++k) {
    const int64_t row = places[k] / call.steps, t = places[k] % call.steps;
    const float* h = t ? call.outputs + (places[k] - 1) * call.units : call.h + row * call.units;
    std::memcpy(line, call.inputs + places[k] * call.width, 4 * call.width);
    std::memcpy(line + call.width, h, 4 * call.units);
    for (int64_t tile = 0; tile < left_tiles(call); ++tile) {
      std::memcpy(to + tile * kLeftTile + k * kRows, line + tile * kRows, 4 * kCopied);
    }
  }
}

// Adds what some places give to a tile of columns; or begins with it.
void add_tile(const WeightGradient& call, bool begins, int64_t column, int64_t places,
              const float* left, const float* right) {
  const int64_t rows = call.width + call.units, columns = 4 * call.units;
  const auto sum = [&](int64_t m) {
    if (m < call.width) return call.d_kernel + m * columns + column;
    return call.d_recurrent + (m - call.width) * columns + column;
  };
  for (int64_t first = 0; first < rows; first += kRows, left += kLeftTile) {
    const int64_t many = rows - first < kRows ? rows - first : kRows;
    Vector sums[kRows][4] = {};
    const float* factors[kRows];
    for (int64_t m = 0; m < many; ++m) {
      factors[m] = left + m;
      for (int v = 0; !begins && v < kVectors; ++v) sums[m][v] = load(sum(first + m) + v * kWidth);
      const int64_t next = first + m + kRows;
      for (int at = 0; next < rows && at < kTile; at += kLine) {
        __builtin_prefetch(sum(next) + at, 1);
      }
    }
    multiply_tile<Whole, kRows>(many, right, places, factors, sums);
    for (int64_t m = 0; m < many; ++m) {
      for (int v = 0; v < kVectors; ++v) store(sum(first + m) + v * kWidth, sums[m][v]);
    }
  }
}

void weight_gradient(const WeightGradient& call, int64_t first, int64_t last, float* scratch) {
  float* line = scratch;
  float* left = line + left_tiles(call) * kRows + kCopied;
  float* right = left + left_tiles(call) * kLeftTile;
  const int64_t columns = 4 * call.units, all_places = call.batch * call.steps;
  int64_t places[kDepth], many = 0;
  bool begins = true;
  for (int64_t place = 0; place <= all_places; ++place) {
    if (place < all_places && shows(call.mask, place)) places[many++] = place;
    if (many < kDepth && place < all_places) continue;
    pack_left(call, places, many, line, left);
    for (int64_t column = first; column < last; column += kTile) {
      for (int64_t k = 0; k < many; ++k) {
        // Rows lie too far apart for the processor to see a pattern.
        const int64_t ahead = k + kRowsAhead < many ? k + kRowsAhead : many - 1;
        const float* later = call.d_z + places[ahead] * columns;
        for (int at = 0; at < kTile; at += kLine) __builtin_prefetch(later + column + at, 0, 2);
        const float* from = call.d_z + places[k] * columns + column;
        for (int v = 0; v < kTile; v += kWidth) store(right + k * kTile + v, load(from + v));
      }
      add_tile(call, begins, column, many, left, right);
    }
    begins = false;
    many = 0;
  }
}

template <typename Kind>
constexpr Factors with_factors() {
  return {Kind::kFactor, forward<Kind>, backward<Kind>};
}

}  // namespace

const warmstate::Loops warmstate::WARMSTATE_LOOPS = {
    kWidth,  kTile,  with_factors<Whole>(), with_factors<Half>(), product, weight_gradient_scratch,
    weight_gradient,
};
