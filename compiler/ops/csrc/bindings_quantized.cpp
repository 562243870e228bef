// Registers the kernels of quantized weights (see bindings.cpp). Not here: the making of codes,
// which ../quantized.py does.

#include "binding.h"
#include "quantized.h"

namespace fxlm {
namespace {

Code code_of(ScalarType stored, int64_t bits, bool table) {
  if (stored == ScalarType::Float8_e4m3fn) return Code::fp8;
  return bits == 8 ? Code::int8 : table ? Code::table4 : Code::int4;
}

Tensor pack_codes_cpu(Tensor codes, int64_t bits, bool table, bool gated) {
  const auto type = codes.scalar_type();
  FXLM_CHECK(codes.dim() == 2, "codes are not [N, K]");
  const int64_t outputs = codes.size(0), inputs = codes.size(1);
  FXLM_CHECK(!gated || outputs % 2 == 0, "a gated weight has ", outputs, " outputs, an odd number");
  const bool known = type == ScalarType::Char || (type == ScalarType::Float8_e4m3fn && bits == 8);
  if (!known || (bits != 4 && bits != 8) || (inputs > 1 && codes.stride(1) != 1))
    return one_result<4>("fxlm::pack_codes_reference",
                         {from(codes), from(bits), from(table), from(gated)});
  const Code code = code_of(type, bits, table);
  const int64_t per_word = inputs_per_word(code);
  Tensor packed = empty_cpu(
      {(outputs + kPanel - 1) / kPanel, (inputs + per_word - 1) / per_word, kPanel, 4},
      bits == 4 ? aoti_torch_dtype_uint8() : type_of(codes));
  pack_codes({code, codes.data_ptr(), outputs, inputs, codes.stride(0), gated, packed.data_ptr()});
  return packed;
}

bool is_floats(const MaybeTensor& tensor) {
  return !tensor || (tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous());
}

// [panels, groups, kPanel]
void check_scale(const MaybeTensor& scale, int64_t n, int64_t inputs, int64_t group,
                 const char* name) {
  if (!scale) return;
  const int64_t panels = (n + kPanel - 1) / kPanel, groups = (inputs + group - 1) / group;
  FXLM_CHECK(scale->dim() == 3 && scale->size(0) == panels && scale->size(1) == groups &&
                 scale->size(2) == kPanel,
             name, " is not [", panels, ", ", groups, ", ", kPanel, "]");
}

void check_words(const Tensor& packed, Code code, int64_t n, int64_t inputs) {
  const int64_t panels = (n + kPanel - 1) / kPanel, per_word = inputs_per_word(code);
  const int64_t steps = (inputs + per_word - 1) / per_word;
  FXLM_CHECK(packed.dim() == 4 && packed.is_contiguous() && packed.size(0) == panels &&
                 packed.size(1) == steps && packed.size(2) == kPanel && packed.size(3) == 4,
             "packed is not [", panels, ", ", steps, ", ", kPanel, ", 4], as ", n, " outputs of ",
             inputs, " inputs are");
}

Tensor quantized_linear_cpu(Tensor x, Tensor packed, Tensor scale, MaybeTensor offset,
                            MaybeTensor table, MaybeTensor bias, int64_t n, int64_t bits,
                            int64_t group, std::string activation, std::string epilogue) {
  FXLM_CHECK(x.dim() >= 1 && n >= 0 && group >= 0, "x has no dimension, or n or group is negative");
  const auto dtype = dtype_of(x);
  const int64_t inputs = x.size(x.dim() - 1);
  const Code code = code_of(packed.scalar_type(), bits, table.has_value());
  const int64_t size = group == 0 ? std::max<int64_t>(inputs, 1) : group;
  const bool known = dtype && (!bias || bias->scalar_type() == x.scalar_type()) &&
                     is_floats(scale) && is_floats(offset) && is_floats(table) &&
                     (bits == 4 || !table) && segment_inputs(code, size, inputs) > 0;
  if (!known)
    return one_result<11>(
        "fxlm::quantized_linear_reference",
        {from(x), from(packed), from(scale), from(offset), from(table), from(bias), from(n),
         from(bits), from(group), from(activation), from(epilogue)});
  check_words(packed, code, n, inputs);
  check_scale(scale, n, inputs, size, "scale");
  check_scale(offset, n, inputs, size, "offset");
  FXLM_CHECK(!table || (table->dim() == 1 && table->size(0) == 16), "table is not [16]");
  FXLM_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == n && (n <= 1 || bias->stride(0) == 1)),
             "bias is not [", n, "] and dense");
  FXLM_CHECK(activation == "none" || activation == "int8", "activation is \"", activation, "\"");
  std::vector<int64_t> sizes;
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i)), rows *= x.size(i);
  const Epilogue after = epilogue_of(epilogue, n);
  sizes.push_back(after.columns(n));
  const auto offsets = row_offsets(x, rows);
  Tensor out = empty_cpu(sizes, type_of(x));
  const auto floats = [](const MaybeTensor& t) {
    return t ? static_cast<const float*>(t->data_ptr()) : nullptr;
  };
  quantized_linear({*dtype, code, after, activation == "int8", x.data_ptr(),
                    offsets.data(), x.stride(x.dim() - 1), rows, inputs, n, size,
                    packed.data_ptr(), floats(scale), floats(offset), floats(table),
                    bias ? bias->data_ptr() : nullptr, out.data_ptr()});
  return out;
}

}  // namespace
}  // namespace fxlm

STABLE_TORCH_LIBRARY_IMPL(fxlm, CPU, library) {
  library.impl("pack_codes", TORCH_BOX(&fxlm::pack_codes_cpu));
  library.impl("quantized_linear", TORCH_BOX(&fxlm::quantized_linear_cpu));
}
