// CPU kernels of pseudo_score_sink: the closed form of core/sink.h for every head and row.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "core/sink.h"

namespace moda_ext {
namespace cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Rows {
  const char* op;  // the operator that was called, for errors
  int64_t count, start;
  std::optional<int64_t> length;

  bool infinite() const { return !length.has_value(); }
  // Pseudo scores left for the row: n - i with i = start + r + 1.
  int64_t remaining(int64_t row) const { return infinite() ? 0 : *length - (start + row + 1); }
};

void require(const Rows& rows, bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(std::string(rows.op) + ": " + message);
}

template <class T>
void check_decay(const Tensor& decay, const Rows& rows) {
  const T* values = static_cast<const T*>(decay.const_data_ptr());
  for (int64_t h = 0; h < decay.size(0); ++h) {
    const T value = values[h * decay.stride(0)];
    require(rows, !(value < T(0)), "decay: expected values >= 0, got " + std::to_string(value));
    require(rows, !(rows.infinite() && value == T(0)),
            "decay: expected values > 0 when length is None (the sum diverges), got 0");
  }
}

void check(const Tensor& decay, const Tensor& base, const Rows& rows) {
  require(rows, decay.dim() == 1 && base.dim() == 1 && base.size(0) == decay.size(0),
          "base: expected shape (H,) equal to decay's");
  require(rows, decay.scalar_type() == ScalarType::Float || decay.scalar_type() == ScalarType::Double,
          "decay: expected float32 or float64");
  require(rows, base.scalar_type() == decay.scalar_type(), "base: expected the dtype of decay");
  require(rows, rows.count >= 0, "num_rows: expected a number >= 0, got " + std::to_string(rows.count));
  require(rows, rows.start >= 0, "start: expected a number >= 0, got " + std::to_string(rows.start));
  if (decay.scalar_type() == ScalarType::Double) {
    check_decay<double>(decay, rows);
  } else {
    check_decay<float>(decay, rows);
  }
}

template <class T>
void forward(const Tensor& decay, const Tensor& base, const Rows& rows, const Tensor& result) {
  const T* decays = static_cast<const T*>(decay.const_data_ptr());
  const T* bases = static_cast<const T*>(base.const_data_ptr());
  T* out = static_cast<T*>(result.mutable_data_ptr());
  for (int64_t h = 0; h < decay.size(0); ++h)
    for (int64_t r = 0; r < rows.count; ++r)
      *out++ = moda_ext::pseudo_score_sink<T>(bases[h * base.stride(0)], decays[h * decay.stride(0)], rows.remaining(r),
                                              rows.infinite());
}

template <class T>
void backward(const Tensor& grad, const Tensor& decay, const Rows& rows, const Tensor& grad_decay,
              const Tensor& grad_base) {
  const T* grads = static_cast<const T*>(grad.const_data_ptr());
  const T* decays = static_cast<const T*>(decay.const_data_ptr());
  for (int64_t h = 0; h < decay.size(0); ++h) {
    double decay_sum = 0, base_sum = 0;
    for (int64_t r = 0; r < rows.count; ++r) {
      if (!rows.infinite() && rows.remaining(r) <= 0) continue;  // c = -inf whatever the parameters
      const double g = grads[h * grad.stride(0) + r * grad.stride(1)];
      base_sum += g;
      decay_sum += g * pseudo_score_sink_decay_grad<T>(decays[h * decay.stride(0)], rows.remaining(r), rows.infinite());
    }
    static_cast<T*>(grad_decay.mutable_data_ptr())[h] = static_cast<T>(decay_sum);
    static_cast<T*>(grad_base.mutable_data_ptr())[h] = static_cast<T>(base_sum);
  }
}

Tensor pseudo_score_sink(const Tensor& decay, const Tensor& base, int64_t num_rows, std::optional<int64_t> length,
                         int64_t start) {
  const Rows rows{"pseudo_score_sink", num_rows, start, length};
  check(decay, base, rows);
  Tensor result = torch::stable::new_empty(decay, {decay.size(0), num_rows});
  if (decay.scalar_type() == ScalarType::Double) {
    forward<double>(decay, base, rows, result);
  } else {
    forward<float>(decay, base, rows, result);
  }
  return result;
}

std::tuple<Tensor, Tensor> pseudo_score_sink_backward(const Tensor& grad, const Tensor& decay, const Tensor& base,
                                                      int64_t num_rows, std::optional<int64_t> length, int64_t start) {
  const Rows rows{"pseudo_score_sink_backward", num_rows, start, length};
  check(decay, base, rows);
  require(rows,
          grad.dim() == 2 && grad.size(0) == decay.size(0) && grad.size(1) == num_rows &&
              grad.scalar_type() == decay.scalar_type(),
          "grad: expected shape (H, num_rows) and the dtype of decay");
  Tensor grad_decay = torch::stable::new_empty(decay, {decay.size(0)});
  Tensor grad_base = torch::stable::new_empty(decay, {decay.size(0)});
  if (decay.scalar_type() == ScalarType::Double) {
    backward<double>(grad, decay, rows, grad_decay, grad_base);
  } else {
    backward<float>(grad, decay, rows, grad_decay, grad_base);
  }
  return {grad_decay, grad_base};
}

}  // namespace
}  // namespace cpu
}  // namespace moda_ext

STABLE_TORCH_LIBRARY_IMPL(moda_ext, CPU, m) {
  m.impl("pseudo_score_sink", TORCH_BOX(&moda_ext::cpu::pseudo_score_sink));
  m.impl("pseudo_score_sink_backward", TORCH_BOX(&moda_ext::cpu::pseudo_score_sink_backward));
}
