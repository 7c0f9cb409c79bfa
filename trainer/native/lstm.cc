// The two loops of an LSTM layer in training, and the one that only reads; on a CPU. Everything is
// float32, but for the factors of the recurrent products, which may be bfloat16.
//
// The rows of a batch do not depend on each other, so each thread takes some of them through all
// steps and never waits for another. A step multiplies the rows that are not masked, packed, with
// the recurrent matrix, which is packed once a call: in panels of the four gates of 16 units, so
// that a panel's product stays in registers until it has become the new states of those units.
// Everything is [batch, time, ...], as Keras has it: nothing is transposed.
//
// A row's result does not depend on the number of threads or on the other rows, to the last bit.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/util/work_sharder.h"

namespace {

using tensorflow::bfloat16;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

constexpr int kWidth = 16;          // floats in a vector
constexpr int kPanel = 4 * kWidth;  // columns of a packed panel
constexpr int kRows = 6;            // rows of a product that fit the registers: 24 sums

typedef float Vector __attribute__((vector_size(4 * kWidth)));
typedef float Unaligned __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * kWidth)));

inline Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }

// Denormal numbers cost a hundred times what others do, and gradients end in them.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

// exp(x) for x <= 0, within 2 units in the last place; 0 where it would be denormal.
inline Vector exp_of_negative(Vector x) {
  const Vector smallest = Vector{} - 87.0f;
  x = smallest > x ? smallest : x;  // not a number stays so: a run must see it
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector shifted = x * 1.44269504088896341f + rounder;
  const Vector n = shifted - rounder;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector y = Vector{} + 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const Integers exponent = reinterpret_cast<const Integers&>(shifted) << 23;
  const Integers bits = reinterpret_cast<const Integers&>(y) + exponent;
  return reinterpret_cast<const Vector&>(bits);
}

inline Vector sigmoid(Vector x) {
  const Vector e = exp_of_negative(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : Vector{} + 1.0f) / (1.0f + e);
}

inline Vector tanh_of(Vector x) {
  const Vector e = exp_of_negative(2.0f * (x < 0.0f ? x : -x));
  const Vector large = (1.0f - e) / (1.0f + e);
  // Near 0 the difference above has lost its digits.
  const Vector x2 = x * x;
  const Vector small = x + x * x2 * (-0.333333333f + x2 * (0.133333333f - x2 * 0.0539682540f));
  return x2 < 0.01f ? small : (x < 0.0f ? -large : large);
}

// Two bfloat16 numbers, the first in the lower half: the factors of two steps of a product.
typedef uint32_t Pair;
typedef Pair Pairs __attribute__((vector_size(4 * kWidth)));

// The nearest bfloat16, as the upper half of a float; a tie goes to the even one.
inline uint32_t nearest_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return bits | 0x00400000;  // not a number stays so
  return bits + 0x7fff + (bits >> 16 & 1);
}

// How products are made of a kind of factors, each of which holds kSteps numbers along the depth.
struct Whole {
  typedef float Factor;
  typedef Vector Factors;
  static constexpr int64_t kSteps = 1;

  static Factors load(const Factor* p) { return ::load(p); }
  static void add(Vector& sum, Factors b, Factor a) { sum += b * a; }
  static Factor factor(const float* from, int64_t) { return *from; }
  static void pack(const float* from, int64_t depth, Factor* to) {
    std::memcpy(to, from, sizeof(Factor) * depth);
  }
};

struct Half {
  typedef Pair Factor;
  typedef Pairs Factors;
  static constexpr int64_t kSteps = 2;

  static Factors load(const Factor* p) {
    typedef Pair Unaligned __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
    return *reinterpret_cast<const Unaligned*>(p);
  }
  static void add(Vector& sum, Factors b, Factor a) {
    const Factors all = Factors{} + a;
#if defined(__AVX512BF16__)
    sum = reinterpret_cast<Vector>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
        reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(all)));
#else
    const Factors upper = Factors{} + 0xffff0000u;
    sum += reinterpret_cast<Vector>(b << 16) * reinterpret_cast<Vector>(all << 16);
    sum += reinterpret_cast<Vector>(b & upper) * reinterpret_cast<Vector>(all & upper);
#endif
  }
  static Factor factor(const float* from, int64_t stride) {
    return nearest_half(from[0]) >> 16 | (nearest_half(from[stride]) & 0xffff0000);
  }
  static void pack(const float* from, int64_t depth, Factor* to) {
#if defined(__AVX512BF16__)
    for (int64_t k = 0; k < depth; k += kWidth) {
      const __m256bh halves = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + k));
      std::memcpy(to + k / 2, &halves, sizeof halves);
    }
#else
    for (int64_t k = 0; k < depth; k += 2) *to++ = factor(from + k, 1);
#endif
  }
};

// sums[m] += rows[m][0..depth) * panel, for kMany rows.
template <typename Kind, int kMany>
inline void multiply(const typename Kind::Factor* panel, int64_t depth,
                     const typename Kind::Factor* const* rows, Vector (&sums)[kRows][4]) {
  Vector local[kMany][4];  // in registers
  const typename Kind::Factor* row[kMany];
#pragma GCC unroll 6
  for (int m = 0; m < kMany; ++m) {
    row[m] = rows[m];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) local[m][v] = sums[m][v];
  }
  for (int64_t k = 0; k < depth / Kind::kSteps; ++k, panel += kPanel) {
    const auto b0 = Kind::load(panel), b1 = Kind::load(panel + 16), b2 = Kind::load(panel + 32),
               b3 = Kind::load(panel + 48);
#pragma GCC unroll 6
    for (int m = 0; m < kMany; ++m) {
      const auto a = row[m][k];
      Kind::add(local[m][0], b0, a);
      Kind::add(local[m][1], b1, a);
      Kind::add(local[m][2], b2, a);
      Kind::add(local[m][3], b3, a);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kMany; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sums[m][v] = local[m][v];
  }
}

// Returns how many of `left` rows are multiplied next: as many as fit, but no small rest at the end.
inline int rows_of_group(int64_t left) {
  const int64_t groups = (left + kRows - 1) / kRows;
  return (left + groups - 1) / groups;
}

template <typename Kind>
void multiply(int many, const typename Kind::Factor* panel, int64_t depth,
              const typename Kind::Factor* const* rows, Vector (&sums)[kRows][4]) {
  switch (many) {
    case 1: return multiply<Kind, 1>(panel, depth, rows, sums);
    case 2: return multiply<Kind, 2>(panel, depth, rows, sums);
    case 3: return multiply<Kind, 3>(panel, depth, rows, sums);
    case 4: return multiply<Kind, 4>(panel, depth, rows, sums);
    case 5: return multiply<Kind, 5>(panel, depth, rows, sums);
    default: return multiply<Kind, 6>(panel, depth, rows, sums);
  }
}

// The sizes and the mask of a call.
struct Call {
  int64_t batch, steps, units;
  const bool* mask;  // [batch, time], or none

  bool shows(int64_t row, int64_t t) const { return !mask || mask[row * steps + t]; }

  // Runs work(rows), each thread with rows of its own: of all lengths, where they are sorted.
  template <typename Work>
  void run(OpKernelContext* context, const Work& work) const {
    const auto& workers = *context->device()->tensorflow_cpu_worker_threads();
    const int64_t threads = std::min<int64_t>(workers.num_threads, batch);
    const int64_t cost = 8 * units * units * steps * batch / std::max<int64_t>(threads, 1);
    tensorflow::Shard(threads, workers.workers, threads, cost, [&](int64_t first, int64_t last) {
      FlushDenormals flush;
      for (int64_t thread = first; thread < last; ++thread) {
        std::vector<int64_t> rows;
        for (int64_t row = thread; row < batch; row += threads) rows.push_back(row);
        work(rows);
      }
    });
  }
};

// Returns the recurrent matrix [units, 4 * units] in panels of the four gates of 16 units.
template <typename Kind>
std::vector<typename Kind::Factor> in_panels(const float* matrix, int64_t units) {
  std::vector<typename Kind::Factor> packed(units / Kind::kSteps * 4 * units);
  auto* to = packed.data();
  for (int64_t u = 0; u < units; u += kWidth) {
    for (int64_t k = 0; k < units; k += Kind::kSteps) {
      for (int gate = 0; gate < 4; ++gate) {
        const float* from = matrix + k * 4 * units + gate * units + u;
        for (int v = 0; v < kWidth; ++v) *to++ = Kind::factor(from + v, 4 * units);
      }
    }
  }
  return packed;
}

template <typename Kind>
class ForwardOp : public OpKernel {
 public:
  explicit ForwardOp(OpKernelConstruction* context) : OpKernel(context) {}

  void Compute(OpKernelContext* context) override {
    const Tensor& recurrent = context->input(1);
    const TensorShape& shape = context->input(0).shape();
    const int64_t units = recurrent.dim_size(0);
    const bool masked = context->input(4).NumElements() > 0;
    const Call call{shape.dim_size(0), shape.dim_size(1), units,
                    masked ? context->input(4).flat<bool>().data() : nullptr};
    OP_REQUIRES(context, units % kWidth == 0 && shape.dim_size(2) == 4 * units,
                tensorflow::errors::InvalidArgument("units must be a multiple of 16"));
    Tensor *gates = nullptr, *outputs = nullptr, *cells = nullptr, *before = nullptr;
    const TensorShape of_units({call.batch, call.steps, units});
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0}, 2, shape, &gates));
    OP_REQUIRES_OK(context, context->allocate_output(0, of_units, &outputs));
    OP_REQUIRES_OK(context, context->allocate_output(1, of_units, &cells));
    OP_REQUIRES_OK(context, context->allocate_output(3, of_units, &before));

    const auto packed = in_panels<Kind>(recurrent.flat<float>().data(), units);
    const int64_t factors = units / Kind::kSteps;  // of a state
    const float* z = context->input(0).flat<float>().data();
    const float* h0 = context->input(2).flat<float>().data();
    const float* c0 = context->input(3).flat<float>().data();
    float *g = gates->flat<float>().data(), *h = outputs->flat<float>().data(),
          *c = cells->flat<float>().data(), *b = before->flat<float>().data();

    call.run(context, [&](const std::vector<int64_t>& rows) {
      std::vector<int64_t> shown;
      std::vector<typename Kind::Factor> last(rows.size() * factors);  // h before the step
      for (int64_t t = 0; t < call.steps; ++t) {
        shown.clear();
        for (int64_t row : rows) {
          const int64_t now = row * call.steps + t;
          const float* last_h = t ? h + (now - 1) * units : h0 + row * units;
          std::memcpy(b + now * units, last_h, 4 * units);
          if (call.shows(row, t)) {
            Kind::pack(last_h, units, last.data() + shown.size() * factors);
            shown.push_back(row);
          } else {
            const float* last_c = t ? c + (now - 1) * units : c0 + row * units;
            std::memcpy(h + now * units, last_h, 4 * units);
            std::memcpy(c + now * units, last_c, 4 * units);
          }
        }
        for (int64_t u = 0; u < units; u += kWidth) {
          const auto* panel = packed.data() + u * 4 * factors;
          for (size_t first = 0, many; first < shown.size(); first += many) {
            many = rows_of_group(shown.size() - first);
            Vector sums[kRows][4];
            const typename Kind::Factor* states[kRows];
            for (int m = 0; m < many; ++m) {
              const int64_t now = shown[first + m] * call.steps + t;
              states[m] = last.data() + (first + m) * factors;
              for (int gate = 0; gate < 4; ++gate) {
                const float* from = z + now * 4 * units + gate * units + u;
                sums[m][gate] = load(from);
                __builtin_prefetch(from + kWidth);  // for the next panel
              }
              __builtin_prefetch(c + now * units + u, 1);
              __builtin_prefetch(h + now * units + u, 1);
            }
            multiply<Kind>(many, panel, units, states, sums);
            for (int m = 0; m < many; ++m) {
              const int64_t row = shown[first + m], now = row * call.steps + t;
              const float* last_c = (t ? c + (now - 1) * units : c0 + row * units) + u;
              const Vector in = sigmoid(sums[m][0]), forget = sigmoid(sums[m][1]),
                           candidate = tanh_of(sums[m][2]), out = sigmoid(sums[m][3]);
              const Vector cell = forget * load(last_c) + in * candidate;
              float* gate = g + now * 4 * units + u;
              store(gate, in);
              store(gate + units, forget);
              store(gate + 2 * units, candidate);
              store(gate + 3 * units, out);
              store(c + now * units + u, cell);
              store(h + now * units + u, out * tanh_of(cell));
            }
          }
        }
      }
    });
  }
};

// Reads without keeping anything but the states. What the inputs give the gates is looked up: words
// repeat, and each different one was multiplied once.
class ReadOp : public OpKernel {
 public:
  explicit ReadOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("return_sequences", &sequences_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor &words = context->input(0), &index = context->input(1);
    const int64_t units = context->input(2).dim_size(0), depth = 4 * units;
    const bool masked = context->input(5).NumElements() > 0;
    const Call call{index.dim_size(0), index.dim_size(1), units,
                    masked ? context->input(5).flat<bool>().data() : nullptr};
    OP_REQUIRES(context, units % kWidth == 0 && words.dim_size(1) == depth,
                tensorflow::errors::InvalidArgument("units must be a multiple of 16"));
    const int32_t* word = index.flat<int32_t>().data();
    for (int64_t i = 0; i < index.NumElements(); ++i) {
      OP_REQUIRES(context, 0 <= word[i] && word[i] < words.dim_size(0),
                  tensorflow::errors::InvalidArgument("there is no word ", word[i]));
    }
    Tensor *outputs = nullptr, *final_h = nullptr, *final_c = nullptr;
    const TensorShape of_outputs({call.batch, sequences_ ? call.steps : 1, units});
    const TensorShape state({call.batch, units});
    OP_REQUIRES_OK(context, context->allocate_output(0, of_outputs, &outputs));
    OP_REQUIRES_OK(context, context->allocate_output(1, state, &final_h));
    OP_REQUIRES_OK(context, context->allocate_output(2, state, &final_c));

    const auto packed = in_panels<Whole>(context->input(2).flat<float>().data(), units);
    const float* z = words.flat<float>().data();
    float *out = outputs->flat<float>().data(), *h = final_h->flat<float>().data(),
          *c = final_c->flat<float>().data();
    std::memcpy(h, context->input(3).flat<float>().data(), 4 * call.batch * units);
    std::memcpy(c, context->input(4).flat<float>().data(), 4 * call.batch * units);

    call.run(context, [&](const std::vector<int64_t>& rows) {
      std::vector<int64_t> shown;
      std::vector<float> last(rows.size() * units);  // h before the step
      for (int64_t t = 0; t < call.steps; ++t) {
        shown.clear();
        for (int64_t row : rows) {
          if (!call.shows(row, t)) continue;
          std::memcpy(last.data() + shown.size() * units, h + row * units, 4 * units);
          shown.push_back(row);
        }
        for (int64_t u = 0; u < units; u += kWidth) {
          const float* panel = packed.data() + u * depth;
          for (size_t first = 0, many; first < shown.size(); first += many) {
            many = rows_of_group(shown.size() - first);
            Vector sums[kRows][4];
            const float* states[kRows];
            for (int m = 0; m < many; ++m) {
              const float* of_word = z + word[shown[first + m] * call.steps + t] * depth + u;
              states[m] = last.data() + (first + m) * units;
              for (int gate = 0; gate < 4; ++gate) sums[m][gate] = load(of_word + gate * units);
            }
            multiply<Whole>(many, panel, units, states, sums);
            for (int m = 0; m < many; ++m) {
              const int64_t place = shown[first + m] * units + u;
              const Vector cell = sigmoid(sums[m][1]) * load(c + place) +
                                  sigmoid(sums[m][0]) * tanh_of(sums[m][2]);
              store(c + place, cell);
              store(h + place, sigmoid(sums[m][3]) * tanh_of(cell));
            }
          }
        }
        for (int64_t row : rows) {
          if (!sequences_) break;
          std::memcpy(out + (row * call.steps + t) * units, h + row * units, 4 * units);
        }
      }
      for (int64_t row : rows) {
        if (sequences_) break;
        std::memcpy(out + row * units, h + row * units, 4 * units);
      }
    });
  }

 private:
  bool sequences_;
};

template <typename Kind>
class BackwardOp : public OpKernel {
 public:
  explicit BackwardOp(OpKernelConstruction* context) : OpKernel(context) {}

  void Compute(OpKernelContext* context) override {
    const Tensor& recurrent = context->input(1);
    const TensorShape& shape = context->input(0).shape();
    const int64_t units = recurrent.dim_size(0);
    const bool masked = context->input(4).NumElements() > 0;
    const Call call{shape.dim_size(0), shape.dim_size(1), units,
                    masked ? context->input(4).flat<bool>().data() : nullptr};
    const bool sequences = context->input(5).NumElements() > 0;
    Tensor *d_gates = nullptr, *d_h = nullptr, *d_c = nullptr;
    const TensorShape state({call.batch, units});
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0}, 0, shape, &d_gates));
    OP_REQUIRES_OK(context, context->allocate_output(1, state, &d_h));
    OP_REQUIRES_OK(context, context->allocate_output(2, state, &d_c));

    const float* matrix = recurrent.flat<float>().data();
    const int64_t panels = (units + kPanel - 1) / kPanel, depth = 4 * units;
    const int64_t factors = depth / Kind::kSteps;  // of a row's gradients
    std::vector<typename Kind::Factor> packed(panels * factors * kPanel, 0);
    for (int64_t u = 0; u < units; ++u) {
      auto* to = packed.data() + u / kPanel * factors * kPanel + u % kPanel;
      for (int64_t k = 0; k < factors; ++k) {
        to[k * kPanel] = Kind::factor(matrix + u * depth + k * Kind::kSteps, 1);
      }
    }
    const float* g = context->input(0).flat<float>().data();
    const float* c0 = context->input(2).flat<float>().data();
    const float* c = context->input(3).flat<float>().data();
    const float* d_out = context->input(5).flat<float>().data();
    float *dz = d_gates->flat<float>().data(), *dh = d_h->flat<float>().data(),
          *dc = d_c->flat<float>().data();
    std::memcpy(dh, context->input(6).flat<float>().data(), 4 * call.batch * units);
    std::memcpy(dc, context->input(7).flat<float>().data(), 4 * call.batch * units);

    call.run(context, [&](const std::vector<int64_t>& rows) {
      std::vector<int64_t> shown;
      std::vector<typename Kind::Factor> of_gates(rows.size() * factors);
      for (int64_t t = call.steps - 1; t >= 0; --t) {
        shown.clear();
        for (int64_t row : rows) {
          const int64_t now = row * call.steps + t;
          float *row_dh = dh + row * units, *row_dc = dc + row * units,
                *row_dz = dz + now * depth;
          if (sequences) {
            for (int64_t u = 0; u < units; ++u) row_dh[u] += d_out[now * units + u];
          }
          if (!call.shows(row, t)) {
            std::memset(row_dz, 0, 4 * depth);
            continue;
          }
          const float* gate = g + now * depth;
          const float* last_c = t ? c + (now - 1) * units : c0 + row * units;
          for (int64_t u = 0; u < units; u += kWidth) {
            const Vector in = load(gate + u), forget = load(gate + units + u),
                         candidate = load(gate + 2 * units + u),
                         out = load(gate + 3 * units + u);
            const Vector squashed = tanh_of(load(c + now * units + u));
            const Vector of_h = load(row_dh + u);
            const Vector of_c = load(row_dc + u) + of_h * out * (1.0f - squashed * squashed);
            const Vector of_in = of_c * candidate * in * (1.0f - in);
            const Vector of_forget = of_c * load(last_c + u) * forget * (1.0f - forget);
            const Vector of_candidate = of_c * in * (1.0f - candidate * candidate);
            const Vector of_out = of_h * squashed * out * (1.0f - out);
            store(row_dz + u, of_in);
            store(row_dz + units + u, of_forget);
            store(row_dz + 2 * units + u, of_candidate);
            store(row_dz + 3 * units + u, of_out);
            store(row_dc + u, of_c * forget);
          }
          Kind::pack(row_dz, depth, of_gates.data() + shown.size() * factors);
          shown.push_back(row);
        }
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t vectors = std::min<int64_t>(4, (units - p * kPanel) / kWidth);
          for (size_t first = 0, many; first < shown.size(); first += many) {
            many = rows_of_group(shown.size() - first);
            Vector sums[kRows][4] = {};
            const typename Kind::Factor* gradients[kRows];
            for (int m = 0; m < many; ++m) {
              gradients[m] = of_gates.data() + (first + m) * factors;
            }
            multiply<Kind>(many, packed.data() + p * factors * kPanel, depth, gradients, sums);
            for (int m = 0; m < many; ++m) {
              float* to = dh + shown[first + m] * units + p * kPanel;
              for (int64_t v = 0; v < vectors; ++v) store(to + v * kWidth, sums[m][v]);
            }
          }
        }
      }
    });
  }
};

}  // namespace

// z: [batch, time, 4 * units], what the inputs and the bias give the gates, which are input,
// forget, candidate and output. mask: bool [batch, time], or empty. factors: of the
// recurrent products.
REGISTER_OP("WarmstateLstm")
    .Attr("factors: {float, bfloat16} = DT_FLOAT")
    .Input("z: float")
    .Input("recurrent: float")
    .Input("h: float")
    .Input("c: float")
    .Input("mask: bool")
    .Output("outputs: float")
    .Output("cells: float")
    .Output("gates: float")
    .Output("before: float")
    .SetShapeFn(tensorflow::shape_inference::UnknownShape);
REGISTER_KERNEL_BUILDER(
    Name("WarmstateLstm").Device(tensorflow::DEVICE_CPU).TypeConstraint<float>("factors"),
    ForwardOp<Whole>);
REGISTER_KERNEL_BUILDER(
    Name("WarmstateLstm").Device(tensorflow::DEVICE_CPU).TypeConstraint<bfloat16>("factors"),
    ForwardOp<Half>);

// z: [words, 4 * units], what each different word and the bias give the gates. index: int32
// [batch, time], rows of z. mask: bool [batch, time], or empty.
REGISTER_OP("WarmstateLstmRead")
    .Attr("return_sequences: bool")
    .Input("z: float")
    .Input("index: int32")
    .Input("recurrent: float")
    .Input("h: float")
    .Input("c: float")
    .Input("mask: bool")
    .Output("outputs: float")
    .Output("final_h: float")
    .Output("final_c: float")
    .SetShapeFn(tensorflow::shape_inference::UnknownShape);
REGISTER_KERNEL_BUILDER(Name("WarmstateLstmRead").Device(tensorflow::DEVICE_CPU), ReadOp);

// d_outputs: [batch, time, units], or empty where only the final states have a gradient.
REGISTER_OP("WarmstateLstmGrad")
    .Attr("factors: {float, bfloat16} = DT_FLOAT")
    .Input("gates: float")
    .Input("recurrent: float")
    .Input("c: float")
    .Input("cells: float")
    .Input("mask: bool")
    .Input("d_outputs: float")
    .Input("d_h: float")
    .Input("d_c: float")
    .Output("d_z: float")
    .Output("d_first_h: float")
    .Output("d_first_c: float")
    .SetShapeFn(tensorflow::shape_inference::UnknownShape);
REGISTER_KERNEL_BUILDER(
    Name("WarmstateLstmGrad").Device(tensorflow::DEVICE_CPU).TypeConstraint<float>("factors"),
    BackwardOp<Whole>);
REGISTER_KERNEL_BUILDER(
    Name("WarmstateLstmGrad").Device(tensorflow::DEVICE_CPU).TypeConstraint<bfloat16>("factors"),
    BackwardOp<Half>);
