// What the files that register kernels share: tensors of torch's stable ABI, checks, results.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "epilogue.h"
#include "vec.h"

#define FXLM_CHECK STD_TORCH_CHECK

namespace fxlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using torch::stable::detail::from;
using torch::stable::detail::to;

inline std::optional<Dtype> dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      return std::nullopt;
  }
}

inline Tensor empty_cpu(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(),
                                                  strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Of an epilogue's name, behind a layer of n outputs.
inline Epilogue epilogue_of(const std::string& name, int64_t n) {
  constexpr std::pair<const char*, Function> functions[] = {{"relu", Function::relu},
                                                            {"silu", Function::silu},
                                                            {"gelu", Function::gelu},
                                                            {"gelu_tanh", Function::gelu_tanh}};
  if (name == "none") return {};
  for (const auto& [known, function] : functions) {
    if (name == known) return {function, false};
    if (name != known + std::string("_and_mul")) continue;
    FXLM_CHECK(n % 2 == 0, "a gated layer has ", n, " outputs, an odd number");
    return {function, true};
  }
  FXLM_CHECK(false, "epilogue is \"", name, "\"");
}

// A dense last dimension, and the type the schema's comment promises.
template <class T>
const T* data_of(const Tensor& tensor, ScalarType type, const char* name) {
  FXLM_CHECK(tensor.scalar_type() == type, name, " has a wrong dtype");
  const int64_t last = tensor.dim() - 1;
  FXLM_CHECK(last >= 0 && (tensor.size(last) <= 1 || tensor.stride(last) == 1), name,
             " is not dense in its last dimension");
  return static_cast<const T*>(tensor.data_ptr());
}

template <size_t N>
Tensor one_result(const char* name, std::array<StableIValue, N> stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

inline int32_t type_of(const Tensor& tensor) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &type));
  return type;
}

// Where each row of x [..., K] begins, in elements.
inline std::vector<int64_t> row_offsets(const Tensor& x, int64_t count) {
  std::vector<int64_t> offsets(count);
  for (int64_t row = 0; row < count; ++row) {
    int64_t rest = row;
    for (int64_t i = x.dim() - 2; i >= 0; --i) {
      offsets[row] += rest % x.size(i) * x.stride(i);
      rest /= x.size(i);
    }
  }
  return offsets;
}

}  // namespace fxlm
