// What lstm.cc, which TensorFlow calls, and loops.cc, which is compiled once for each instruction
// set, share. Numbers are float32 in row-major order unless a comment says otherwise; those behind
// `void*` have the type of the recurrent products' factors. Gates are input, forget, candidate and
// output. A mask is true where a step is not masked; null: everywhere.

#ifndef WARMSTATE_LOOPS_H_
#define WARMSTATE_LOOPS_H_

#include <cstdint>

namespace warmstate {

constexpr int kUnitsMultiple = 16;   // of an LSTM: whole vectors of every instruction set
constexpr int64_t kMostRows = 64;    // of a batch, in one call of a loop
constexpr int64_t kPadding = 16;     // floats between rows in scratch: rows share no cache set
constexpr int64_t kProductRows = 48;  // rows that stay in the caches while a whole matrix goes by

// The forward loop.
struct Forward {
  int64_t steps, units;
  const bool* mask;       // [batch, time]
  const void* z;          // [batch, time, 4 * units], what inputs and bias give the gates
  const int32_t* index;   // [batch, time], rows of z [words, 4 * units]; null: z is as above
  const float* bias;      // [batch, 4 * units], of the rows of the batch, added to z; null: 0
  const void* recurrent;  // packed, [units, 4 * units]
  float *h, *c;           // [batch, units]: before the first step; on return, after the last
  void* outputs;          // [batch, time, units]; null: not kept
  float* gates;           // [batch, time, 4 * units], may be z if that is float32; null: not kept
  float* cells;           // [batch, time, units]; null: not kept
};

// The backward loop.
struct Backward {
  int64_t steps, units;
  const bool* mask;
  const float *gates, *cells;  // of the forward loop
  const float* c;              // [batch, units], before the first step
  const void* recurrent;       // packed, [4 * units, units]
  const void* d_outputs;       // [batch, time, units]; null: all are 0
  float *d_h, *d_c;            // [batch, units], after the last step; on return, before the first
  float clip_norm;             // of a row of d_h that a step gives the step before it; 0: any
  void* d_z;                   // [batch, time, 4 * units], may be `gates` if it is float32
  float* d_bias;               // [batch, 4 * units]: d_z, before it is rounded, summed over time
};

// out = left * right + bias; rows that are masked are 0.
struct Product {
  int64_t depth, columns;
  const bool* mask;   // [rows]
  const float* left;  // [rows, depth]
  const void* right;  // packed, [depth, columns]
  const float* bias;  // [columns]; null: 0
  float* out;         // [rows, columns]
};

// The gradients of both matrices: [inputs, h before the step] transposed, times d_z.
struct WeightGradient {
  int64_t batch, steps, width, units;
  const bool* mask;
  const float *inputs, *outputs;  // [batch, time, width], [batch, time, units]
  const float* h;                 // [batch, units], before the first step
  const float* d_z;               // [batch, time, 4 * units]
  float *d_kernel, *d_recurrent;
};

// How the numbers of a packed matrix are written, each factor in four bytes.
enum class Factor {
  kFloat,    // float32
  kRounded,  // float32 with the value of a bfloat16
  kPair,     // two bfloat16 that follow each other along the depth, the first in the lower half
};

// The nearest bfloat16, as the upper half of a float; a tie goes to the even one.
static inline uint32_t nearest_half(float x) {
  union {
    float number;
    uint32_t bits;
  } of = {x};
  if ((of.bits & 0x7fffffff) > 0x7f800000) return (of.bits | 0x00400000) & 0xffff0000;  // NaN
  return (of.bits + 0x7fff + (of.bits >> 16 & 1)) & 0xffff0000;
}

// The loops with one type of the recurrent products' factors. They take at most kMostRows rows of a
// batch, and scratch of forward_scratch or backward_scratch floats.
struct Factors {
  Factor factor;
  void (*forward)(const Forward&, const int64_t* rows, int64_t count, float* scratch);
  void (*backward)(const Backward&, const int64_t* rows, int64_t count, float* scratch);
};

// Of a row, two states and a copy of one.
static inline int64_t forward_scratch(int64_t rows, int64_t units) {
  return 3 * rows * (units + kPadding);
}
static inline int64_t backward_scratch(int64_t rows, int64_t units) {
  return rows * (4 * units + kPadding);
}

// The loops of one instruction set. Its packed matrices are tiles [depth, tile], one after the
// other; their number is a multiple of `4 * width / tile`, and what is too much is filled with 0.
// The columns of a recurrent matrix are so ordered that those are all gates of `width` units.
struct Loops {
  int64_t width, tile;                                           // columns
  Factors whole, half;                                           // float32, bfloat16
  void (*product)(const Product&, int64_t first, int64_t last);  // of rows; right in Factor::kFloat
  int64_t (*weight_gradient_scratch)(const WeightGradient&, int64_t columns);
  // Of columns of d_z, multiples of `tile`.
  void (*weight_gradient)(const WeightGradient&, int64_t first, int64_t last, float* scratch);
};

extern const Loops portable, avx2, avx512, avx512_bf16, amx_bf16, neon;

}  // namespace warmstate

#endif  // WARMSTATE_LOOPS_H_
