// TensorFlow's operations for an LSTM layer on a CPU: they check their operands, pack the matrices
// and share the rows among threads. loops.h has the loops, for the instruction set that was chosen.
// Everything is float32, but the recurrent products' factors may be bfloat16, and so what goes into
// the loops and comes out of them at every step.
//
// The rows of a batch do not depend on each other, so each thread takes some of them through all
// steps and never waits for another.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <mutex>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "loops.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/platform/denormal.h"
#include "tensorflow/core/util/work_sharder.h"

namespace {

using namespace warmstate;
using absl::Status;
using tensorflow::bfloat16;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// ---- Instruction sets ----

struct InstructionSet {
  const char* name;
  const Loops* loops;
  bool is_there;
};

#if defined(__x86_64__)
// Returns whether the processor multiplies matrices of bfloat16, and Linux lets this process do so:
// their registers are eight KiB, which it saves only for processes that asked.
bool has_matrix_registers() {
#if defined(__linux__)
  constexpr unsigned kBfloat16 = 1 << 22, kTile = 1 << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBfloat16 | kTile)) != (kBfloat16 | kTile)) {
    return false;
  }
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, of Linux 5.16
  return !syscall(SYS_arch_prctl, kRequestPermission, kTileData);
#else
  return false;
#endif
}
#endif

// Returns those of this build, the best one last.
const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = {
#if defined(__aarch64__)
      {"neon", &neon, true},
#else
      {"portable", &portable, true},
#endif
#if defined(__x86_64__)
      {"avx2", &avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {"avx512", &avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma")},
      {"avx512_bf16", &avx512_bf16,
       __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma")},
      {"amx_bf16", &amx_bf16, __builtin_cpu_supports("avx512bf16") && has_matrix_registers()},
#endif
  };
  return sets;
}

std::atomic<const Loops*> chosen{instruction_sets().front().loops};

// ---- Checks of operands ----

template <typename... Parts>
Status InvalidArgument(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

// Returns an error unless a tensor has the expected shape, which `names` puts in words.
Status has_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected,
                 const char* names) {
  const absl::Span<const int64_t> sizes(expected.begin(), expected.size());
  const auto found = tensor.shape().dim_sizes();
  if (std::equal(found.begin(), found.end(), sizes.begin(), sizes.end())) return absl::OkStatus();
  return InvalidArgument(name, " has shape ", tensor.shape().DebugString(), "; expected ", names,
                         " = [", absl::StrJoin(sizes, ","), "]");
}

// The same for an operand that may be left out, as an empty vector.
Status has_shape_or_none(const char* name, const Tensor& tensor,
                         std::initializer_list<int64_t> expected, const char* names) {
  if (tensor.dims() == 1 && tensor.dim_size(0) == 0) return absl::OkStatus();
  return has_shape(name, tensor, expected, names);
}

Status has_rank(const char* name, const Tensor& tensor, int rank, const char* names) {
  if (tensor.dims() == rank) return absl::OkStatus();
  return InvalidArgument(name, " has shape ", tensor.shape().DebugString(), "; expected ", names);
}

// Returns an error unless it is a recurrent matrix, whose rows are units that the loops can take.
Status is_recurrent(const Tensor& recurrent) {
  TF_RETURN_IF_ERROR(has_rank("recurrent", recurrent, 2, "[units, 4 * units]"));
  const int64_t units = recurrent.dim_size(0);
  TF_RETURN_IF_ERROR(
      has_shape("recurrent", recurrent, {units, 4 * units}, "[units, 4 * units]"));
  if (units > 0 && units % kUnitsMultiple == 0) return absl::OkStatus();
  return InvalidArgument("recurrent has ", units, " units; expected a multiple of ",
                         kUnitsMultiple);
}

template <typename Number>
const Number* data_or_null(const Tensor& tensor) {
  return tensor.NumElements() ? tensor.flat<Number>().data() : nullptr;
}

constexpr size_t kHugePage = 2 << 20;

// Has the huge pages that lie within new memory be real ones: 512 page faults fewer in each.
void use_huge_pages(void* address, size_t bytes) {
#if defined(__linux__)
  const auto first = (reinterpret_cast<uintptr_t>(address) + kHugePage - 1) / kHugePage;
  const auto last = (reinterpret_cast<uintptr_t>(address) + bytes) / kHugePage;
  if (first >= last) return;
  madvise(reinterpret_cast<void*>(first * kHugePage), (last - first) * kHugePage, MADV_HUGEPAGE);
#endif
}

template <typename Number, typename Pointer>
Status allocate(OpKernelContext* context, int output, std::initializer_list<int64_t> sizes,
                Pointer* data) {
  TensorShape shape;
  TF_RETURN_IF_ERROR(TensorShape::BuildTensorShape(sizes, &shape));
  Tensor* tensor = nullptr;
  TF_RETURN_IF_ERROR(context->allocate_output(output, shape, &tensor));
  *data = tensor->flat<Number>().data();
  use_huge_pages(*data, sizeof(Number) * tensor->NumElements());
  return absl::OkStatus();
}

// An output of an input's shape, in its memory if nobody else reads that and the types are equal.
template <typename Number, typename Pointer>
Status reuse_or_allocate(OpKernelContext* context, int input, int output, Pointer* data) {
  Tensor* tensor = nullptr;
  TF_RETURN_IF_ERROR(context->forward_input_or_allocate_output(
      {input}, output, context->input(input).shape(), &tensor));
  *data = tensor->flat<Number>().data();
  use_huge_pages(*data, sizeof(Number) * tensor->NumElements());
  return absl::OkStatus();
}

Status allocate_scratch(OpKernelContext* context, int64_t size, Tensor* tensor, float** data) {
  TF_RETURN_IF_ERROR(
      context->allocate_temp(tensorflow::DT_FLOAT, TensorShape({size}), tensor));
  *data = tensor->flat<float>().data();
  return absl::OkStatus();
}

// ---- Threads ----

// Runs work(first, last) on parts of 0..total; `cost` is one's in cycles, about.
void in_threads(OpKernelContext* context, int64_t total, int64_t cost,
                const std::function<void(int64_t, int64_t)>& work) {
  const auto& workers = *context->device()->tensorflow_cpu_worker_threads();
  tensorflow::Shard(workers.num_threads, workers.workers, total, cost,
                    [&](int64_t first, int64_t last) {
                      // Denormal numbers cost a hundred times what others do, and gradients end
                      // in them.
                      const tensorflow::port::ScopedFlushDenormal flush;
                      work(first, last);
                    });
}

// Runs work(rows, count, scratch) on all rows of a batch, each thread with its own; of all lengths,
// where they are sorted. A row needs so many floats of scratch, and costs so many cycles.
Status on_rows(OpKernelContext* context, int64_t batch, int64_t scratch_of_row, int64_t cost,
               const std::function<void(const int64_t*, int64_t, float*)>& work) {
  const int64_t threads =
      std::min<int64_t>(context->device()->tensorflow_cpu_worker_threads()->num_threads, batch);
  if (!threads) return absl::OkStatus();
  const int64_t most = std::min(kMostRows, (batch + threads - 1) / threads);
  Tensor tensor;
  float* scratch = nullptr;
  TF_RETURN_IF_ERROR(
      allocate_scratch(context, threads * most * scratch_of_row, &tensor, &scratch));
  in_threads(context, threads, cost * batch / threads, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      int64_t rows[kMostRows], count = 0;
      for (int64_t row = thread; row < batch; row += threads) {
        rows[count++] = row;
        if (count < most && row + threads < batch) continue;
        work(rows, count, scratch + thread * most * scratch_of_row);
        count = 0;
      }
    }
  });
  return absl::OkStatus();
}

// ---- Packed matrices ----

// Memory for packed matrices, in huge pages, kept from call to call: a matrix that streams through
// the caches at each step is read twice as fast where the processor need not look up small pages.
class Memory {
 public:
  void* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->bytes >= bytes && (best == free_.end() || it->bytes < best->bytes)) best = it;
    }
    if (best == free_.end()) {  // those that are free are too small: larger ones take their place
      for (const Block& block : free_) std::free(block.address);
      free_.clear();
      return allocated(bytes);
    }
    const Block found = *best;
    free_.erase(best);
    taken_.push_back(found);
    return found.address;
  }

  void give_back(void* address) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto it = std::find_if(taken_.begin(), taken_.end(),
                                 [=](const Block& block) { return block.address == address; });
    free_.push_back(*it);
    taken_.erase(it);
  }

 private:
  struct Block {
    void* address;
    size_t bytes;
  };

  void* allocated(size_t bytes) {
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* address = nullptr;
    if (posix_memalign(&address, kHugePage, bytes)) return nullptr;
    use_huge_pages(address, bytes);
    taken_.push_back({address, bytes});
    return address;
  }

  std::mutex mutex_;
  std::vector<Block> free_, taken_;
};

Memory* memory() {
  static auto* const made = new Memory;  // never freed: threads may run until the process is gone
  return made;
}

// A matrix [depth, columns] in tiles, as loops.h says.
class Packed {
 public:
  Packed(const Loops& loops, Factor factor, const float* matrix, int64_t depth, int64_t columns)
      : loops_(loops), factor_(factor), matrix_(matrix), depth_(depth), columns_(columns) {}
  ~Packed() {
    if (taken_) memory()->give_back(taken_);
  }
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;

  // `matrix` is [columns, depth].
  Status transposed(OpKernelContext* context) {
    along_ = 1, across_ = depth_;
    return pack(context);
  }
  // The columns are units of four gates.
  Status of_gates(OpKernelContext* context) {
    units_ = columns_ / 4;
    return plain(context);
  }
  Status plain(OpKernelContext* context) {
    along_ = columns_, across_ = 1;
    return pack(context);
  }
  // Takes an operand that WarmstatePack has packed, if it belongs to these loops and sizes.
  Status ready(const char* name, const Tensor& operand, bool of_gates) {
    units_ = of_gates ? columns_ / 4 : 0;
    const uint32_t* numbers = reinterpret_cast<const uint32_t*>(operand.flat<float>().data());
    const auto expected = tag();
    if (operand.NumElements() != size() + kTag ||
        !std::equal(expected.begin(), expected.end(), numbers + size())) {
      return InvalidArgument(name, " was packed for other sizes or another instruction set");
    }
    numbers_ = numbers;
    return absl::OkStatus();
  }
  // Has the next call pack into a tensor for `ready`, of size_kept() numbers.
  void keep_in(float* numbers) { kept_ = reinterpret_cast<uint32_t*>(numbers); }
  int64_t size_kept() const { return size() + kTag; }
  const void* numbers() const { return numbers_; }

 private:
  static constexpr int64_t kTag = 5;  // numbers after a kept matrix, which say what it is

  std::array<uint32_t, kTag> tag() const {
    const auto& sets = instruction_sets();
    const auto used = std::find_if(sets.begin(), sets.end(), [this](const InstructionSet& set) {
      return set.loops == &loops_;
    });
    return {static_cast<uint32_t>(used - sets.begin()), static_cast<uint32_t>(depth_),
            static_cast<uint32_t>(columns_), units_ > 0, static_cast<uint32_t>(factor_)};
  }

  int64_t size() const { return tiles() * loops_.tile * factors(); }
  int64_t tiles() const {
    const int64_t group = 4 * loops_.width;
    return (columns_ + group - 1) / group * group / loops_.tile;
  }
  int64_t factors() const { return (depth_ + steps() - 1) / steps(); }
  int64_t steps() const { return factor_ == Factor::kPair ? 2 : 1; }

  Status pack(OpKernelContext* context) {
    uint32_t* numbers = kept_;
    if (kept_) {
      const auto last = tag();
      std::copy(last.begin(), last.end(), kept_ + size());
    } else {
      numbers = taken_ = static_cast<uint32_t*>(memory()->take(4 * size()));
      if (!taken_) return absl::ResourceExhaustedError("no memory for a packed matrix");
    }
    numbers_ = numbers;
    if (!depth_) return absl::OkStatus();  // any number of tiles, of nothing
    in_threads(context, tiles(), 2 * loops_.tile * depth_, [&](int64_t first, int64_t last) {
      for (int64_t tile = first; tile < last; ++tile) {
        pack_tile(tile, numbers + tile * loops_.tile * factors());
      }
    });
    return absl::OkStatus();
  }

  void pack_tile(int64_t tile, uint32_t* to) {
    if (factor_ == Factor::kFloat && across_ == 1) return copy_tile(tile, to);
    constexpr int64_t kBlock = 16;  // rows of a tile that stay in the first cache meanwhile
    for (int64_t block = 0; block < factors(); block += kBlock) {
      const int64_t end = std::min(factors(), block + kBlock);
      for (int64_t v = 0; v < loops_.tile; ++v) {
        const int64_t column = tile * loops_.tile + v;
        const float* from = matrix_ + place_of(column) * across_;
        for (int64_t k = block; k < end; ++k) {
          to[k * loops_.tile + v] = column < columns_ ? packed(from + k * steps() * along_, k) : 0;
        }
      }
    }
  }

  // The same where columns are neighbours: `width` of them at once, as few rows of text wait for this
  // longer than for their steps.
  void copy_tile(int64_t tile, uint32_t* first) {
    for (int64_t v = 0; v < loops_.tile; v += loops_.width) {
      const int64_t column = tile * loops_.tile + v;
      const int64_t count = std::clamp<int64_t>(columns_ - column, 0, loops_.width);
      const float* from = count ? matrix_ + place_of(column) : nullptr;
      uint32_t* to = first + v;
      for (int64_t k = 0; k < depth_; ++k, to += loops_.tile) {
        if (count) std::memcpy(to, from + k * along_, sizeof(float) * count);
        std::fill(to + count, to + loops_.width, 0);
      }
    }
  }

  // Returns which column of the matrix a column of the packed one is.
  int64_t place_of(int64_t column) const {
    if (!units_) return column;
    const int64_t width = loops_.width, gate = column / width % 4;
    return gate * units_ + column / (4 * width) * width + column % width;
  }

  uint32_t packed(const float* from, int64_t k) const {
    if (factor_ == Factor::kRounded) return nearest_half(*from);
    if (factor_ == Factor::kPair) {
      const bool is_last = 2 * k + 1 == depth_;
      return nearest_half(from[0]) >> 16 | (is_last ? 0 : nearest_half(from[along_]));
    }
    uint32_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return bits;
  }

  const Loops& loops_;
  const Factor factor_;
  const float* const matrix_;
  const int64_t depth_, columns_;
  int64_t along_ = 0, across_ = 0, units_ = 0;
  const uint32_t* numbers_ = nullptr;
  uint32_t *taken_ = nullptr, *kept_ = nullptr;  // memory of this object, or of a tensor
};

// ---- Operations ----

template <typename Kind>
const Factors& factors_of(const Loops& loops);
template <>
const Factors& factors_of<float>(const Loops& loops) {
  return loops.whole;
}
template <>
const Factors& factors_of<bfloat16>(const Loops& loops) {
  return loops.half;
}

// Packs a matrix that does not change, once instead of at each call.
class PackOp : public OpKernel {
 public:
  explicit PackOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("of_gates", &of_gates_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& matrix = context->input(0);
    OP_REQUIRES_OK(context, of_gates_ ? is_recurrent(matrix)
                                      : has_rank("matrix", matrix, 2, "[depth, columns]"));
    Packed packed(*chosen.load(), Factor::kFloat, matrix.flat<float>().data(), matrix.dim_size(0),
                  matrix.dim_size(1));
    float* numbers = nullptr;
    OP_REQUIRES_OK(context, allocate<float>(context, 0, {packed.size_kept()}, &numbers));
    packed.keep_in(numbers);
    OP_REQUIRES_OK(context, of_gates_ ? packed.of_gates(context) : packed.plain(context));
  }

 private:
  bool of_gates_;
};

class ProductOp : public OpKernel {
 public:
  explicit ProductOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("transpose", &transpose_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor &left = context->input(0), &right = context->input(1), &bias = context->input(2),
                 &mask = context->input(3);
    const bool is_packed = right.dims() == 1;
    OP_REQUIRES_OK(context, has_rank("left", left, 3, "[batch, time, depth]"));
    if (!is_packed) {
      OP_REQUIRES_OK(context, has_rank("right", right, 2, "[depth, columns], or transposed"));
    }
    const int64_t batch = left.dim_size(0), steps = left.dim_size(1), depth = left.dim_size(2),
                  columns = is_packed ? bias.NumElements() : right.dim_size(transpose_ ? 0 : 1);
    OP_REQUIRES(context, is_packed || right.dim_size(transpose_ ? 1 : 0) == depth,
                InvalidArgument("right has shape ", right.shape().DebugString(), "; expected ",
                                transpose_ ? "[columns, " : "[", depth,
                                transpose_ ? "]" : ", columns]"));
    OP_REQUIRES_OK(context, has_shape_or_none("bias", bias, {columns}, "[columns]"));
    OP_REQUIRES_OK(context, has_shape_or_none("mask", mask, {batch, steps}, "[batch, time]"));
    Product call = {depth, columns, data_or_null<bool>(mask), left.flat<float>().data(), nullptr,
                    data_or_null<float>(bias), nullptr};
    const Loops& loops = *chosen.load();
    Packed packed(loops, Factor::kFloat, right.flat<float>().data(), depth, columns);
    if (is_packed) OP_REQUIRES_OK(context, packed.ready("right", right, false));
    OP_REQUIRES_OK(context, allocate<float>(context, 0, {batch, steps, columns}, &call.out));
    if (!(batch && steps && columns)) return;

    if (!is_packed) {
      OP_REQUIRES_OK(context, transpose_ ? packed.transposed(context) : packed.plain(context));
    }
    call.right = packed.numbers();
    const int64_t rows = batch * steps, blocks = (rows + kProductRows - 1) / kProductRows;
    in_threads(context, blocks, kProductRows * columns * (depth / 16 + 1),
               [&](int64_t first, int64_t last) {
                 loops.product(call, first * kProductRows, std::min(rows, last * kProductRows));
               });
  }

 private:
  bool transpose_;
};

template <typename Kind>
class ForwardOp : public OpKernel {
 public:
  explicit ForwardOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("keep", &keep_));
    OP_REQUIRES_OK(context, context->GetAttr("return_sequences", &sequences_));
  }

  void Compute(OpKernelContext* context) override {
    Forward call = {};
    int64_t batch = 0;
    OP_REQUIRES_OK(context, check(context, &batch, &call));
    const Loops& loops = *chosen.load();
    const Factors& factors = factors_of<Kind>(loops);
    Packed packed(loops, factors.factor, context->input(2).template flat<float>().data(),
                  call.units, 4 * call.units);
    const Tensor& recurrent = context->input(2);
    const bool is_packed = recurrent.dims() == 1;
    if (is_packed) OP_REQUIRES_OK(context, packed.ready("recurrent", recurrent, true));
    OP_REQUIRES_OK(context, allocate_results(context, batch, &call));
    if (!batch) return;
    if (!is_packed) OP_REQUIRES_OK(context, packed.of_gates(context));
    call.recurrent = packed.numbers();
    OP_REQUIRES_OK(
        context, on_rows(context, batch, forward_scratch(1, call.units),
                         call.units * call.units * call.steps / 4,
                         [&](const int64_t* rows, int64_t count, float* scratch) {
                           factors.forward(call, rows, count, scratch);
                         }));
  }

 private:
  // Checks the operands, and fills in sizes and inputs.
  Status check(OpKernelContext* context, int64_t* batch, Forward* call) const {
    const Tensor &z = context->input(0), &index = context->input(1), &h = context->input(3),
                 &c = context->input(4), &mask = context->input(5), &bias = context->input(6);
    const Tensor& recurrent = context->input(2);
    const bool is_packed = recurrent.dims() == 1;
    if (is_packed) {
      TF_RETURN_IF_ERROR(has_rank("h", h, 2, "[batch, units]"));
    } else {
      TF_RETURN_IF_ERROR(is_recurrent(recurrent));
    }
    const int64_t units = is_packed ? h.dim_size(1) : recurrent.dim_size(0), depth = 4 * units;
    const bool by_index = index.dims() == 2;
    if (by_index) {
      TF_RETURN_IF_ERROR(has_rank("z", z, 2, "[words, 4 * units], as there is an index"));
      TF_RETURN_IF_ERROR(has_shape("z", z, {z.dim_size(0), depth}, "[words, 4 * units]"));
    } else {
      TF_RETURN_IF_ERROR(has_shape("index", index, {0}, "[batch, time], or none"));
      TF_RETURN_IF_ERROR(has_rank("z", z, 3, "[batch, time, 4 * units], as there is no index"));
      TF_RETURN_IF_ERROR(has_shape("z", z, {z.dim_size(0), z.dim_size(1), depth},
                                   "[batch, time, 4 * units]"));
    }
    const Tensor& sizes = by_index ? index : z;
    *batch = sizes.dim_size(0);
    const int64_t steps = sizes.dim_size(1);
    TF_RETURN_IF_ERROR(has_shape("h", h, {*batch, units}, "[batch, units]"));
    TF_RETURN_IF_ERROR(has_shape("c", c, {*batch, units}, "[batch, units]"));
    TF_RETURN_IF_ERROR(has_shape_or_none("mask", mask, {*batch, steps}, "[batch, time]"));
    TF_RETURN_IF_ERROR(has_shape_or_none("bias", bias, {*batch, depth}, "[batch, 4 * units]"));
    const auto words = index.flat<int32_t>();
    for (int64_t i = 0; i < words.size(); ++i) {
      if (words(i) < 0 || words(i) >= z.dim_size(0)) {
        return InvalidArgument("there is no word ", words(i));
      }
    }
    call->steps = steps;
    call->units = units;
    call->mask = data_or_null<bool>(mask);
    call->z = z.flat<Kind>().data();
    call->index = data_or_null<int32_t>(index);
    call->bias = data_or_null<float>(bias);
    return absl::OkStatus();
  }

  Status allocate_results(OpKernelContext* context, int64_t batch, Forward* call) const {
    const int64_t units = call->units, steps = call->steps;
    TF_RETURN_IF_ERROR(allocate<float>(context, 1, {batch, units}, &call->h));
    TF_RETURN_IF_ERROR(allocate<float>(context, 2, {batch, units}, &call->c));
    std::memcpy(call->h, context->input(3).flat<float>().data(), 4 * batch * units);
    std::memcpy(call->c, context->input(4).flat<float>().data(), 4 * batch * units);
    void* none = nullptr;
    if (keep_ || sequences_) {
      TF_RETURN_IF_ERROR(allocate<Kind>(context, 0, {batch, steps, units}, &call->outputs));
    } else {
      TF_RETURN_IF_ERROR(allocate<Kind>(context, 0, {batch, 0, units}, &none));
    }
    if (!keep_) {
      TF_RETURN_IF_ERROR(allocate<float>(context, 3, {batch, 0, 4 * units}, &none));
      return allocate<float>(context, 4, {batch, 0, units}, &none);
    }
    TF_RETURN_IF_ERROR(allocate<float>(context, 4, {batch, steps, units}, &call->cells));
    if (context->input(1).dims() == 2) {  // z may be read again
      return allocate<float>(context, 3, {batch, steps, 4 * units}, &call->gates);
    }
    return reuse_or_allocate<float>(context, 0, 3, &call->gates);
  }

  bool keep_, sequences_;
};

template <typename Kind>
class BackwardOp : public OpKernel {
 public:
  explicit BackwardOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("clip_norm", &clip_norm_));
    OP_REQUIRES(context, clip_norm_ >= 0, InvalidArgument("clip_norm is ", clip_norm_));
  }

  void Compute(OpKernelContext* context) override {
    Backward call = {};
    call.clip_norm = clip_norm_;
    int64_t batch = 0;
    OP_REQUIRES_OK(context, check(context, &batch, &call));
    OP_REQUIRES_OK(context, reuse_or_allocate<Kind>(context, 0, 0, &call.d_z));
    OP_REQUIRES_OK(context, allocate<float>(context, 1, {batch, call.units}, &call.d_h));
    OP_REQUIRES_OK(context, allocate<float>(context, 2, {batch, call.units}, &call.d_c));
    OP_REQUIRES_OK(context, allocate<float>(context, 3, {batch, 4 * call.units}, &call.d_bias));
    if (!batch) return;
    const int64_t bytes = 4 * batch * call.units;
    std::memcpy(call.d_h, context->input(6).template flat<float>().data(), bytes);
    std::memcpy(call.d_c, context->input(7).template flat<float>().data(), bytes);

    const Loops& loops = *chosen.load();
    const Factors& factors = factors_of<Kind>(loops);
    Packed packed(loops, factors.factor, context->input(1).template flat<float>().data(),
                  4 * call.units, call.units);
    OP_REQUIRES_OK(context, packed.transposed(context));
    call.recurrent = packed.numbers();
    OP_REQUIRES_OK(
        context, on_rows(context, batch, backward_scratch(1, call.units),
                         call.units * call.units * call.steps / 4,
                         [&](const int64_t* rows, int64_t count, float* scratch) {
                           factors.backward(call, rows, count, scratch);
                         }));
  }

 private:
  Status check(OpKernelContext* context, int64_t* batch, Backward* call) const {
    const Tensor &gates = context->input(0), &c = context->input(2), &cells = context->input(3),
                 &mask = context->input(4), &d_outputs = context->input(5),
                 &d_h = context->input(6), &d_c = context->input(7);
    TF_RETURN_IF_ERROR(is_recurrent(context->input(1)));
    TF_RETURN_IF_ERROR(has_rank("gates", gates, 3, "[batch, time, 4 * units]"));
    *batch = gates.dim_size(0);
    const int64_t units = context->input(1).dim_size(0), steps = gates.dim_size(1);
    TF_RETURN_IF_ERROR(has_shape("gates", gates, {*batch, steps, 4 * units},
                                 "[batch, time, 4 * units]"));
    TF_RETURN_IF_ERROR(has_shape("c", c, {*batch, units}, "[batch, units]"));
    TF_RETURN_IF_ERROR(has_shape("cells", cells, {*batch, steps, units}, "[batch, time, units]"));
    TF_RETURN_IF_ERROR(has_shape_or_none("mask", mask, {*batch, steps}, "[batch, time]"));
    TF_RETURN_IF_ERROR(has_shape_or_none("d_outputs", d_outputs, {*batch, steps, units},
                                         "[batch, time, units]"));
    TF_RETURN_IF_ERROR(has_shape("d_h", d_h, {*batch, units}, "[batch, units]"));
    TF_RETURN_IF_ERROR(has_shape("d_c", d_c, {*batch, units}, "[batch, units]"));
    call->steps = steps;
    call->units = units;
    call->mask = data_or_null<bool>(mask);
    call->gates = gates.flat<float>().data();
    call->cells = cells.flat<float>().data();
    call->c = c.flat<float>().data();
    call->d_outputs = data_or_null<Kind>(d_outputs);
    return absl::OkStatus();
  }

  float clip_norm_;
};

class WeightGradientOp : public OpKernel {
 public:
  explicit WeightGradientOp(OpKernelConstruction* context) : OpKernel(context) {}

  void Compute(OpKernelContext* context) override {
    WeightGradient call = {};
    OP_REQUIRES_OK(context, check(context, &call));
    const int64_t units = call.units, columns = 4 * units;
    OP_REQUIRES_OK(context, allocate<float>(context, 0, {call.width, columns}, &call.d_kernel));
    OP_REQUIRES_OK(context, allocate<float>(context, 1, {units, columns}, &call.d_recurrent));

    const Loops& loops = *chosen.load();
    const int64_t tiles = columns / loops.tile;
    const int64_t threads = std::min<int64_t>(
        context->device()->tensorflow_cpu_worker_threads()->num_threads, tiles);
    const int64_t of_thread = (tiles + threads - 1) / threads * loops.tile;
    const int64_t size = loops.weight_gradient_scratch(call, of_thread);
    Tensor tensor;
    float* scratch = nullptr;
    OP_REQUIRES_OK(context, allocate_scratch(context, threads * size, &tensor, &scratch));
    const int64_t cost = call.batch * call.steps * (call.width + units) * of_thread / 16;
    in_threads(context, threads, cost, [&](int64_t first, int64_t last) {
      for (int64_t thread = first; thread < last; ++thread) {
        const int64_t begin = thread * of_thread, end = std::min(columns, begin + of_thread);
        if (begin < end) loops.weight_gradient(call, begin, end, scratch + thread * size);
      }
    });
  }

 private:
  Status check(OpKernelContext* context, WeightGradient* call) const {
    const Tensor &inputs = context->input(0), &outputs = context->input(1),
                 &h = context->input(2), &d_z = context->input(3), &mask = context->input(4);
    TF_RETURN_IF_ERROR(has_rank("inputs", inputs, 3, "[batch, time, inputs]"));
    TF_RETURN_IF_ERROR(has_rank("h", h, 2, "[batch, units]"));
    const int64_t batch = inputs.dim_size(0), steps = inputs.dim_size(1), units = h.dim_size(1);
    TF_RETURN_IF_ERROR(has_shape("h", h, {batch, units}, "[batch, units]"));
    TF_RETURN_IF_ERROR(
        has_shape("outputs", outputs, {batch, steps, units}, "[batch, time, units]"));
    TF_RETURN_IF_ERROR(
        has_shape("d_z", d_z, {batch, steps, 4 * units}, "[batch, time, 4 * units]"));
    TF_RETURN_IF_ERROR(has_shape_or_none("mask", mask, {batch, steps}, "[batch, time]"));
    if (units <= 0 || units % kUnitsMultiple) {
      return InvalidArgument("h has ", units, " units; expected a multiple of ", kUnitsMultiple);
    }
    *call = {batch,  steps, inputs.dim_size(2), units, data_or_null<bool>(mask),
             inputs.flat<float>().data(), outputs.flat<float>().data(), h.flat<float>().data(),
             d_z.flat<float>().data(), nullptr, nullptr};
    return absl::OkStatus();
  }
};

// ---- Shapes, as far as they are known before a call ----

// Merges an operand that may be left out, as an empty vector, with [first, second] or more.
Status merge_or_none(InferenceContext* c, int input, const std::vector<DimensionHandle>& sizes) {
  const ShapeHandle shape = c->input(input);
  if (!c->RankKnown(shape) || (c->Rank(shape) == 1 && sizes.size() != 1)) return absl::OkStatus();
  if (sizes.size() == 1 && c->Rank(shape) == 1 && c->Value(c->Dim(shape, 0)) <= 0) {
    return absl::OkStatus();
  }
  ShapeHandle merged;
  return c->Merge(shape, c->MakeShape(sizes), &merged);
}

Status merge(InferenceContext* c, int input, const std::vector<DimensionHandle>& sizes) {
  ShapeHandle merged;
  return c->Merge(c->input(input), c->MakeShape(sizes), &merged);
}

Status pack_shape(InferenceContext* c) {
  c->set_output(0, c->Vector(c->UnknownDim()));
  return absl::OkStatus();
}

bool is_packed(InferenceContext* c, int input) {
  return c->RankKnown(c->input(input)) && c->Rank(c->input(input)) == 1;
}

// Finds the units of a recurrent matrix, and four times as many.
Status units_of(InferenceContext* c, int input, DimensionHandle* units, DimensionHandle* gates) {
  ShapeHandle matrix;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(input), 2, &matrix));
  *units = c->Dim(matrix, 0);
  TF_RETURN_IF_ERROR(c->Multiply(*units, 4, gates));
  return c->Merge(c->Dim(matrix, 1), *gates, gates);
}

Status product_shape(InferenceContext* c) {
  bool transpose;
  TF_RETURN_IF_ERROR(c->GetAttr("transpose", &transpose));
  ShapeHandle left, right;
  DimensionHandle depth;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 3, &left));
  DimensionHandle columns;
  if (is_packed(c, 1)) {
    TF_RETURN_IF_ERROR(c->WithRank(c->input(2), 1, &right));
    columns = c->Dim(right, 0);
  } else {
    TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 2, &right));
    TF_RETURN_IF_ERROR(c->Merge(c->Dim(left, 2), c->Dim(right, transpose ? 1 : 0), &depth));
    columns = c->Dim(right, transpose ? 0 : 1);
    TF_RETURN_IF_ERROR(merge_or_none(c, 2, {columns}));
  }
  const DimensionHandle batch = c->Dim(left, 0), steps = c->Dim(left, 1);
  TF_RETURN_IF_ERROR(merge_or_none(c, 3, {batch, steps}));
  c->set_output(0, c->MakeShape({batch, steps, columns}));
  return absl::OkStatus();
}

Status forward_shape(InferenceContext* c) {
  bool keep, sequences;
  TF_RETURN_IF_ERROR(c->GetAttr("keep", &keep));
  TF_RETURN_IF_ERROR(c->GetAttr("return_sequences", &sequences));
  DimensionHandle units, gates, batch = c->UnknownDim(), steps = c->UnknownDim();
  if (is_packed(c, 2)) {
    ShapeHandle h;
    TF_RETURN_IF_ERROR(c->WithRank(c->input(3), 2, &h));
    units = c->Dim(h, 1);
    TF_RETURN_IF_ERROR(c->Multiply(units, 4, &gates));
  } else {
    TF_RETURN_IF_ERROR(units_of(c, 2, &units, &gates));
  }
  const ShapeHandle index = c->input(1);
  if (c->RankKnown(index) && c->Rank(index) == 2) {
    batch = c->Dim(index, 0), steps = c->Dim(index, 1);
    TF_RETURN_IF_ERROR(merge(c, 0, {c->UnknownDim(), gates}));
  } else if (c->RankKnown(index)) {
    ShapeHandle z;
    TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 3, &z));
    TF_RETURN_IF_ERROR(merge(c, 0, {c->UnknownDim(), c->UnknownDim(), gates}));
    batch = c->Dim(z, 0), steps = c->Dim(z, 1);
  }
  for (const int state : {3, 4}) {
    TF_RETURN_IF_ERROR(merge(c, state, {batch, units}));
    ShapeHandle known;
    TF_RETURN_IF_ERROR(c->WithRank(c->input(state), 2, &known));
    TF_RETURN_IF_ERROR(c->Merge(batch, c->Dim(known, 0), &batch));
  }
  TF_RETURN_IF_ERROR(merge_or_none(c, 5, {batch, steps}));
  TF_RETURN_IF_ERROR(merge_or_none(c, 6, {batch, gates}));
  const DimensionHandle none = c->MakeDim(0), kept = keep ? steps : none;
  c->set_output(0, c->MakeShape({batch, keep || sequences ? steps : none, units}));
  c->set_output(1, c->MakeShape({batch, units}));
  c->set_output(2, c->MakeShape({batch, units}));
  c->set_output(3, c->MakeShape({batch, kept, gates}));
  c->set_output(4, c->MakeShape({batch, kept, units}));
  return absl::OkStatus();
}

Status backward_shape(InferenceContext* c) {
  DimensionHandle units, gates;
  ShapeHandle all;
  TF_RETURN_IF_ERROR(units_of(c, 1, &units, &gates));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 3, &all));
  const DimensionHandle batch = c->Dim(all, 0), steps = c->Dim(all, 1);
  TF_RETURN_IF_ERROR(merge(c, 0, {batch, steps, gates}));
  TF_RETURN_IF_ERROR(merge(c, 3, {batch, steps, units}));
  TF_RETURN_IF_ERROR(merge_or_none(c, 4, {batch, steps}));
  TF_RETURN_IF_ERROR(merge_or_none(c, 5, {batch, steps, units}));
  for (const int state : {2, 6, 7}) TF_RETURN_IF_ERROR(merge(c, state, {batch, units}));
  c->set_output(0, c->MakeShape({batch, steps, gates}));
  c->set_output(1, c->MakeShape({batch, units}));
  c->set_output(2, c->MakeShape({batch, units}));
  c->set_output(3, c->MakeShape({batch, gates}));
  return absl::OkStatus();
}

Status weight_gradient_shape(InferenceContext* c) {
  ShapeHandle inputs, h;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 3, &inputs));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(2), 2, &h));
  const DimensionHandle batch = c->Dim(inputs, 0), steps = c->Dim(inputs, 1),
                        width = c->Dim(inputs, 2), units = c->Dim(h, 1);
  DimensionHandle gates;
  TF_RETURN_IF_ERROR(c->Multiply(units, 4, &gates));
  TF_RETURN_IF_ERROR(merge(c, 1, {batch, steps, units}));
  TF_RETURN_IF_ERROR(merge(c, 2, {batch, units}));
  TF_RETURN_IF_ERROR(merge(c, 3, {batch, steps, gates}));
  TF_RETURN_IF_ERROR(merge_or_none(c, 4, {batch, steps}));
  c->set_output(0, c->MakeShape({width, gates}));
  c->set_output(1, c->MakeShape({units, gates}));
  return absl::OkStatus();
}

}  // namespace

// ---- What Python calls directly ----

// Writes the names of the instruction sets that this processor has, the best one last, with commas.
extern "C" void warmstate_instruction_sets(char* to, int64_t size) {
  std::string names;
  for (const InstructionSet& set : instruction_sets()) {
    if (set.is_there) names += (names.empty() ? "" : ",") + std::string(set.name);
  }
  std::strncpy(to, names.c_str(), size - 1);
  to[size - 1] = 0;
}

// Makes all loops of this process use an instruction set; returns whether the processor has it.
extern "C" int warmstate_use(const char* name) {
  for (const InstructionSet& set : instruction_sets()) {
    if (!set.is_there || std::strcmp(set.name, name)) continue;
    chosen = set.loops;
    return 1;
  }
  return 0;
}

// A matrix in the form that the loops read, for operations that are called often. of_gates: it is a
// recurrent one. Only for the instruction set that is in use, and for products in float32.
REGISTER_OP("WarmstatePack")
    .Attr("of_gates: bool")
    .Input("matrix: float")
    .Output("packed: float")
    .SetShapeFn(pack_shape);
REGISTER_KERNEL_BUILDER(Name("WarmstatePack").Device(tensorflow::DEVICE_CPU), PackOp);

// left * right + bias of the rows that the mask shows, 0 elsewhere. left: [batch, time, depth].
// right: [depth, columns], or transposed, or packed, which takes a bias. bias: [columns], or empty.
// mask: [batch, time], or empty.
REGISTER_OP("WarmstateProduct")
    .Attr("transpose: bool")
    .Input("left: float")
    .Input("right: float")
    .Input("bias: float")
    .Input("mask: bool")
    .Output("product: float")
    .SetShapeFn(product_shape);
REGISTER_KERNEL_BUILDER(Name("WarmstateProduct").Device(tensorflow::DEVICE_CPU), ProductOp);

// z: [batch, time, 4 * units], what the inputs and the bias give the gates, which are input, forget,
// candidate and output. Or, with an index [batch, time], [words, 4 * units]: what each different
// word gives. recurrent: [units, 4 * units], or packed. mask: [batch, time], or empty. bias:
// [batch, 4 * units], added to the z of each row's steps, or empty. factors: of the recurrent
// products, and of z and outputs. keep: what the gradient needs, which are all outputs, gates and
// cells; they have no steps otherwise.
REGISTER_OP("WarmstateLstm")
    .Attr("factors: {float, bfloat16}")
    .Attr("keep: bool")
    .Attr("return_sequences: bool")
    .Input("z: factors")
    .Input("index: int32")
    .Input("recurrent: float")
    .Input("h: float")
    .Input("c: float")
    .Input("mask: bool")
    .Input("bias: float")
    .Output("outputs: factors")
    .Output("final_h: float")
    .Output("final_c: float")
    .Output("gates: float")
    .Output("cells: float")
    .SetShapeFn(forward_shape);
REGISTER_KERNEL_BUILDER(
    Name("WarmstateLstm").Device(tensorflow::DEVICE_CPU).TypeConstraint<float>("factors"),
    ForwardOp<float>);
REGISTER_KERNEL_BUILDER(
    Name("WarmstateLstm").Device(tensorflow::DEVICE_CPU).TypeConstraint<bfloat16>("factors"),
    ForwardOp<bfloat16>);

// d_outputs: [batch, time, units], or empty where only the final states have a gradient. clip_norm:
// the largest norm of a row of d_h that a step gives the step before it; 0: any. d_bias: d_z summed
// over time, [batch, 4 * units], before it is rounded.
REGISTER_OP("WarmstateLstmGrad")
    .Attr("factors: {float, bfloat16}")
    .Attr("clip_norm: float = 0.0")
    .Input("gates: float")
    .Input("recurrent: float")
    .Input("c: float")
    .Input("cells: float")
    .Input("mask: bool")
    .Input("d_outputs: factors")
    .Input("d_h: float")
    .Input("d_c: float")
    .Output("d_z: factors")
    .Output("d_first_h: float")
    .Output("d_first_c: float")
    .Output("d_bias: float")
    .SetShapeFn(backward_shape);
REGISTER_KERNEL_BUILDER(
    Name("WarmstateLstmGrad").Device(tensorflow::DEVICE_CPU).TypeConstraint<float>("factors"),
    BackwardOp<float>);
REGISTER_KERNEL_BUILDER(
    Name("WarmstateLstmGrad").Device(tensorflow::DEVICE_CPU).TypeConstraint<bfloat16>("factors"),
    BackwardOp<bfloat16>);

REGISTER_OP("WarmstateLstmWeightGrad")
    .Input("inputs: float")
    .Input("outputs: float")
    .Input("h: float")
    .Input("d_z: float")
    .Input("mask: bool")
    .Output("d_kernel: float")
    .Output("d_recurrent: float")
    .SetShapeFn(weight_gradient_shape);
REGISTER_KERNEL_BUILDER(Name("WarmstateLstmWeightGrad").Device(tensorflow::DEVICE_CPU),
                        WeightGradientOp);
