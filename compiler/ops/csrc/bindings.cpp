// Registers the kernels with torch's dispatcher through its stable ABI. Checks every argument that a
// kernel uses as an address; what the kernels do not cover goes to the ops' PyTorch references.

#include "attention.h"
#include "binding.h"
#include "linear.h"
#include "parallel.h"
#include "sample.h"

namespace fxlm {

int num_threads() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return int(threads);
}

void on_threads(int count, void (*body)(void*), void* context) {
  if (count <= 1) {
    if (count == 1) body(context);
    return;
  }
  struct Call {
    void (*body)(void*);
    void* context;
  } call{body, context};
  torch_parallel_for(
      0, count, 1,
      [](int64_t begin, int64_t end, void* opaque) {
        auto* call = static_cast<Call*>(opaque);
        for (; begin < end; ++begin) call->body(call->context);
      },
      &call);
}

namespace {

Strided strided(const Tensor& tensor) {  // [1, heads, tokens, width]
  return {tensor.data_ptr(), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

std::vector<float> floats_of(const MaybeTensor& tensor, int64_t count, const char* name) {
  std::vector<float> out;
  if (!tensor) return out;
  FXLM_CHECK(tensor->dim() == 1 && tensor->size(0) == count, name, " is not [heads]");
  const int64_t stride = tensor->stride(0);
  const auto dtype = dtype_of(*tensor);
  FXLM_CHECK(dtype, name, " has a wrong dtype");
  for (int64_t i = 0; i < count; ++i) {
    const char* base = static_cast<const char*>(tensor->data_ptr());
    if (*dtype == Dtype::f32)
      out.push_back(reinterpret_cast<const float*>(base)[i * stride]);
    else if (*dtype == Dtype::bf16)
      out.push_back(to_float(reinterpret_cast<const Bf16*>(base)[i * stride]));
    else
      out.push_back(to_float(reinterpret_cast<const F16*>(base)[i * stride]));
  }
  return out;
}

void check_sequences(const Attention& args, int64_t blocks, int64_t columns) {
  int64_t before = 0;
  for (int64_t i = 0; i < args.sequences; ++i) {
    const int64_t begin = args.query_start[i], end = args.query_start[i + 1];
    const int64_t length = args.seq_lens[i];
    FXLM_CHECK(begin == before && end >= begin && end <= args.tokens, "query_start[", i, "..",
               i + 1, "] = ", begin, ", ", end, " does not partition ", args.tokens, " tokens");
    before = end;
    if (end == begin) continue;
    FXLM_CHECK(length >= end - begin && length <= columns * args.block_size, "seq_lens[", i,
               "] = ", length, " with ", end - begin, " queries and ", columns, " blocks of ",
               args.block_size);
    const int32_t* row = args.block_table + i * args.table_stride;
    for (int64_t b = 0; b * args.block_size < length; ++b)
      FXLM_CHECK(row[b] >= 0 && row[b] < blocks, "block_table[", i, ", ", b, "] = ", row[b],
                 " of ", blocks, " blocks");
  }
}

void check_slots(const Attention& args, int64_t blocks) {
  for (int64_t t = 0; t < args.tokens; ++t)
    FXLM_CHECK(args.slots[t] < blocks * args.block_size, "slot_mapping[", t, "] = ",
               args.slots[t], " of ", blocks, " blocks of ", args.block_size);
}

void check_shapes(const Tensor& q, const MaybeTensor& k, const MaybeTensor& v,
                  const Tensor& k_cache, const Tensor& v_cache, const Attention& args) {
  FXLM_CHECK(q.size(0) == 1 && q.size(3) == args.dk && args.kv_heads > 0 && args.dk > 0 &&
                 args.dv > 0 && args.block_size > 0 && args.heads % args.kv_heads == 0,
             "q [", q.size(0), ", ", q.size(1), ", ", q.size(2), ", ", q.size(3),
             "] does not fit a cache of ", args.kv_heads, " heads of ", args.dk);
  FXLM_CHECK(k_cache.is_contiguous() && v_cache.is_contiguous(), "the cache is not contiguous");
  for (int64_t i = 0; i < 3; ++i)
    FXLM_CHECK(k_cache.size(i) == v_cache.size(i), "k_cache and v_cache differ in size ", i);
  FXLM_CHECK(k.has_value() == v.has_value(), "one of k and v is None");
  if (!k) return;
  FXLM_CHECK(k->size(1) == args.kv_heads && k->size(2) == args.tokens && k->size(3) == args.dk,
             "k does not fit q and the cache");
  FXLM_CHECK(v->size(1) == args.kv_heads && v->size(2) == args.tokens && v->size(3) == args.dv,
             "v does not fit q and the cache");
}

// The references have the schema of their twins: hand all arguments on, unchanged.
Tensor paged_attention_reference(const Tensor& q, const MaybeTensor& k, const MaybeTensor& v,
                                 const Tensor& k_cache, const Tensor& v_cache,
                                 const Tensor& slot_mapping, const Tensor& query_start,
                                 const Tensor& seq_lens, const Tensor& block_table, double scale,
                                 int64_t window, int64_t chunk, double softcap,
                                 const MaybeTensor& sinks, const MaybeTensor& slopes,
                                 const MaybeTensor& k_scale, const MaybeTensor& v_scale) {
  std::array<StableIValue, 17> stack{
      from(q),           from(k),        from(v),           from(k_cache), from(v_cache),
      from(slot_mapping), from(query_start), from(seq_lens), from(block_table), from(scale),
      from(window),      from(chunk),    from(softcap),     from(sinks),   from(slopes),
      from(k_scale),     from(v_scale)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("fxlm::paged_attention_reference", "", stack.data(),
                                               TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// What a cache of this type holds, beside q of type `dtype`; nothing where no kernel reads it.
std::optional<Store> store_of(const Tensor& cache, const Tensor& q) {
  switch (cache.scalar_type()) {
    case ScalarType::Char:
      return Store::int8;
    case ScalarType::Float8_e4m3fn:
      return Store::fp8;
    default:
      if (cache.scalar_type() == q.scalar_type()) return Store::same;
      return std::nullopt;
  }
}

// One scale for all heads, or one a head.
std::vector<float> scales_of(const MaybeTensor& tensor, int64_t heads, const char* name) {
  if (!tensor) return {};
  FXLM_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() &&
                 (tensor->numel() == 1 || tensor->numel() == heads),
             name, " is not one float32, or one a KV head");
  const float* values = static_cast<const float*>(tensor->data_ptr());
  std::vector<float> out(heads);
  for (int64_t i = 0; i < heads; ++i) out[i] = values[tensor->numel() == 1 ? 0 : i];
  return out;
}

// All arguments but pointers that need a check of their own.
Attention attention_of(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, Dtype dtype,
                       Store store) {
  FXLM_CHECK(q.dim() == 4 && k_cache.dim() == 4 && v_cache.dim() == 4,
             "q and caches have 4 dimensions");
  const int64_t scale_bytes = store == Store::same ? 0 : 4;
  Attention args{};
  args.dtype = dtype;
  args.store = store;
  args.tokens = q.size(2);
  args.heads = q.size(1);
  args.kv_heads = k_cache.size(1);
  args.block_size = k_cache.size(2);
  args.dk = k_cache.size(3) - scale_bytes;
  args.dv = v_cache.size(3) - scale_bytes;
  args.q = strided(q);
  args.k_cache = k_cache.data_ptr();
  args.v_cache = v_cache.data_ptr();
  return args;
}

Tensor paged_attention_cpu(Tensor q, MaybeTensor k, MaybeTensor v, Tensor k_cache, Tensor v_cache,
                           Tensor slot_mapping, Tensor query_start, Tensor seq_lens,
                           Tensor block_table, double scale, int64_t window, int64_t chunk,
                           double softcap, MaybeTensor sinks, MaybeTensor slopes,
                           MaybeTensor k_scale, MaybeTensor v_scale) {
  const auto dtype = dtype_of(q);
  const auto store = store_of(k_cache, q);
  const auto same = [](const Tensor& a, const Tensor& b) {
    return a.scalar_type() == b.scalar_type();
  };
  const auto reference = [&] {
    return paged_attention_reference(q, k, v, k_cache, v_cache, slot_mapping, query_start,
                                     seq_lens, block_table, scale, window, chunk, softcap, sinks,
                                     slopes, k_scale, v_scale);
  };
  if (!dtype || !store || !same(k_cache, v_cache) || (k && !same(*k, q)) || (v && !same(*v, q)))
    return reference();
  Attention args = attention_of(q, k_cache, v_cache, *dtype, *store);
  if (!covers(args)) return reference();
  check_shapes(q, k, v, k_cache, v_cache, args);
  if (k) args.k = strided(*k), args.v = strided(*v);
  args.slots = data_of<int64_t>(slot_mapping, ScalarType::Long, "slot_mapping");
  args.query_start = data_of<int32_t>(query_start, ScalarType::Int, "query_start");
  args.seq_lens = data_of<int32_t>(seq_lens, ScalarType::Int, "seq_lens");
  args.block_table = data_of<int32_t>(block_table, ScalarType::Int, "block_table");
  args.table_stride = block_table.stride(0);
  args.sequences = seq_lens.size(0);
  args.scale = float(scale);
  args.softcap = float(softcap);
  args.window = window;
  args.chunk = chunk;
  FXLM_CHECK(block_table.dim() == 2 && query_start.size(0) == args.sequences + 1 &&
                 block_table.size(0) == args.sequences,
             "query_start, seq_lens and block_table differ in sequences");
  check_sequences(args, k_cache.size(0), block_table.size(1));
  if (k) {
    FXLM_CHECK(slot_mapping.size(0) == args.tokens, "slot_mapping is not [tokens]");
    check_slots(args, k_cache.size(0));
  }
  const auto sink_values = floats_of(sinks, args.heads, "sinks");
  const auto slope_values = floats_of(slopes, args.heads, "slopes");
  const auto k_scales = scales_of(k_scale, args.kv_heads, "k_scale");
  const auto v_scales = scales_of(v_scale, args.kv_heads, "v_scale");
  if (sinks) args.sinks = sink_values.data();
  if (slopes) args.slopes = slope_values.data();
  if (k_scale) args.k_scale = k_scales.data();
  if (v_scale) args.v_scale = v_scales.data();
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(q.get(), &type));
  Tensor out = empty_cpu({1, args.tokens, args.heads, args.dv}, type);
  args.out = out.data_ptr();
  const int64_t used = args.sequences ? args.query_start[args.sequences] : 0;
  const int64_t row = args.heads * args.dv * int64_t(q.element_size());
  std::memset(static_cast<char*>(args.out) + used * row, 0, (args.tokens - used) * row);
  write_cache(args);
  paged_attention(args);
  return out;
}

using Sampled = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Sampled sample_reference(const Tensor& logits, const Tensor& floats, const Tensor& ints,
                         const Tensor& start, const Tensor& ids, const Tensor& counts,
                         const Tensor& bias, int64_t max_logprobs) {
  std::array<StableIValue, 8> stack{from(logits), from(floats), from(ints), from(start),
                                    from(ids),    from(counts), from(bias), from(max_logprobs)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("fxlm::sample_reference", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3])};
}

Sampled sample_cpu(Tensor logits, Tensor floats, Tensor ints, Tensor adjust_start,
                   Tensor adjust_ids, Tensor adjust_counts, Tensor adjust_bias,
                   int64_t max_logprobs) {
  const auto dtype = dtype_of(logits);
  FXLM_CHECK(logits.dim() == 2 && floats.dim() == 2 && ints.dim() == 2, "logits are not [R, V]");
  if (!dtype || (logits.size(1) > 1 && logits.stride(1) != 1))
    return sample_reference(logits, floats, ints, adjust_start, adjust_ids, adjust_counts,
                            adjust_bias, max_logprobs);
  Sample args{};
  args.dtype = *dtype;
  args.logits = logits.data_ptr();
  args.rows = logits.size(0);
  args.vocabulary = logits.size(1);
  args.logits_stride = logits.stride(0);
  args.floats = data_of<float>(floats, ScalarType::Float, "floats");
  args.floats_stride = floats.stride(0);
  args.ints = data_of<int64_t>(ints, ScalarType::Long, "ints");
  args.ints_stride = ints.stride(0);
  args.adjust_start = data_of<int32_t>(adjust_start, ScalarType::Int, "adjust_start");
  args.adjust_ids = data_of<int64_t>(adjust_ids, ScalarType::Long, "adjust_ids");
  args.adjust_counts = data_of<int32_t>(adjust_counts, ScalarType::Int, "adjust_counts");
  args.adjust_bias = data_of<float>(adjust_bias, ScalarType::Float, "adjust_bias");
  args.adjusts = adjust_ids.size(0);
  args.max_logprobs = max_logprobs;
  FXLM_CHECK(args.vocabulary > 0 && args.vocabulary <= INT32_MAX && max_logprobs >= 0 &&
                 floats.size(0) == args.rows && floats.size(1) == 6 &&
                 ints.size(0) == args.rows && ints.size(1) == 5 &&
                 adjust_start.size(0) == args.rows + 1 &&
                 adjust_counts.size(0) == args.adjusts && adjust_bias.size(0) == args.adjusts,
             "sizes differ: logits [", args.rows, ", ", args.vocabulary, "]");
  Tensor token_ids = empty_cpu({args.rows}, aoti_torch_dtype_int64());
  Tensor logprobs = empty_cpu({args.rows, max_logprobs + 1}, aoti_torch_dtype_float32());
  Tensor logprob_ids = empty_cpu({args.rows, max_logprobs + 1}, aoti_torch_dtype_int64());
  Tensor ranks = empty_cpu({args.rows}, aoti_torch_dtype_int64());
  args.token_ids = static_cast<int64_t*>(token_ids.data_ptr());
  args.logprobs = static_cast<float*>(logprobs.data_ptr());
  args.logprob_ids = static_cast<int64_t*>(logprob_ids.data_ptr());
  args.ranks = static_cast<int64_t*>(ranks.data_ptr());
  sample(args);
  return {token_ids, logprobs, logprob_ids, ranks};
}

// ---- linear layers ----------------------------------------------------------------------------

Tensor pack_weight_cpu(Tensor weight, bool gated) {
  const auto dtype = dtype_of(weight);
  const int64_t dim = weight.dim();
  FXLM_CHECK(dim == 2 || dim == 3, "weight is neither [N, K] nor [E, N, K]");
  const int64_t outputs = weight.size(dim - 2), inputs = weight.size(dim - 1);
  FXLM_CHECK(!gated || outputs % 2 == 0, "a gated weight has ", outputs, " outputs, an odd number");
  if (!dtype || (inputs > 1 && weight.stride(dim - 1) != 1))
    return one_result<2>("fxlm::pack_weight_reference", {from(weight), from(gated)});
  const int64_t per_step = inputs_per_step(*dtype);
  std::vector<int64_t> sizes{(outputs + kPanel - 1) / kPanel, (inputs + per_step - 1) / per_step,
                             kPanel, per_step};
  const int64_t units = sizes[0] * sizes[1] * sizes[2] * sizes[3];
  if (dim == 3) sizes.insert(sizes.begin(), weight.size(0));
  Tensor packed = empty_cpu(sizes, type_of(weight));
  const char* from_data = static_cast<const char*>(weight.data_ptr());
  char* to_data = static_cast<char*>(packed.data_ptr());
  const int64_t width = int64_t(weight.element_size());
  for (int64_t i = 0; i < (dim == 3 ? weight.size(0) : 1); ++i)
    pack_weight({*dtype, from_data + (dim == 3 ? i * weight.stride(0) * width : 0), outputs, inputs,
                 weight.stride(dim - 2), gated, to_data + i * units * width});
  return packed;
}

// The last four dimensions are those of one packed weight [n, inputs].
void check_packed(const Tensor& packed, Dtype dtype, int64_t inputs, int64_t n) {
  const int64_t per_step = inputs_per_step(dtype), first = packed.dim() - 4;
  FXLM_CHECK(first >= 0 && packed.is_contiguous() && packed.size(first + 2) == kPanel &&
                 packed.size(first + 3) == per_step &&
                 packed.size(first + 1) == (inputs + per_step - 1) / per_step,
             "packed is no packed weight of ", inputs, " inputs");
  FXLM_CHECK(n >= 0 && (n + kPanel - 1) / kPanel == packed.size(first), "packed has ",
             packed.size(first), " panels, which do not make ", n, " outputs");
}

Tensor packed_linear_cpu(Tensor x, Tensor packed, MaybeTensor bias, int64_t n,
                         std::string epilogue) {
  const auto dtype = dtype_of(x);
  const auto same = [&](const Tensor& t) { return t.scalar_type() == x.scalar_type(); };
  if (!dtype || !same(packed) || (bias && !same(*bias)))
    return one_result<5>("fxlm::packed_linear_reference",
                         {from(x), from(packed), from(bias), from(n), from(epilogue)});
  FXLM_CHECK(x.dim() >= 1, "x has no dimension");
  std::vector<int64_t> sizes;
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i)), rows *= x.size(i);
  PackedLinear args{};
  args.dtype = *dtype;
  args.epilogue = epilogue_of(epilogue, n);
  sizes.push_back(args.epilogue.columns(n));
  args.inputs = x.size(x.dim() - 1);
  args.x_stride = x.stride(x.dim() - 1);
  FXLM_CHECK(packed.dim() == 4, "packed has ", packed.dim(), " dimensions");
  check_packed(packed, *dtype, args.inputs, n);
  FXLM_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == n && (n <= 1 || bias->stride(0) == 1)),
             "bias is not [", n, "] and dense");
  const auto offsets = row_offsets(x, rows);
  Tensor out = empty_cpu(sizes, type_of(x));
  args.x = x.data_ptr();
  args.rows = offsets.data();
  args.num_rows = rows;
  args.outputs = n;
  args.packed = packed.data_ptr();
  args.bias = bias ? bias->data_ptr() : nullptr;
  args.out = out.data_ptr();
  packed_linear(args);
  return out;
}

// Ends of the groups, as int64; each at least the one before, the last within `rows`.
std::vector<int64_t> group_ends(const Tensor& offsets, int64_t groups, int64_t rows) {
  const bool wide = offsets.scalar_type() == ScalarType::Long;
  FXLM_CHECK(offsets.dim() == 1 && offsets.size(0) == groups && offsets.is_contiguous() &&
                 (wide || offsets.scalar_type() == ScalarType::Int),
             "offsets are not [", groups, "] integers");
  std::vector<int64_t> ends(groups);
  for (int64_t i = 0, before = 0; i < groups; before = ends[i++]) {
    ends[i] = wide ? static_cast<const int64_t*>(offsets.data_ptr())[i]
                   : static_cast<const int32_t*>(offsets.data_ptr())[i];
    FXLM_CHECK(ends[i] >= before && ends[i] <= rows, "offsets[", i, "] = ", ends[i], " after ",
               before, " of ", rows, " rows");
  }
  return ends;
}

Tensor packed_grouped_linear_cpu(Tensor x, Tensor packed, Tensor offsets, int64_t n) {
  const auto dtype = dtype_of(x);
  if (!dtype || packed.scalar_type() != x.scalar_type())
    return one_result<4>("fxlm::packed_grouped_linear_reference",
                         {from(x), from(packed), from(offsets), from(n)});
  FXLM_CHECK(x.dim() == 2 && packed.dim() == 5, "x is not [S, K], or packed holds no experts");
  const int64_t rows = x.size(0), width = int64_t(x.element_size());
  check_packed(packed, *dtype, x.size(1), n);
  const auto ends = group_ends(offsets, packed.size(0), rows);
  const auto begins = row_offsets(x, rows);
  Tensor out = empty_cpu({rows, n}, type_of(x));
  char* to = static_cast<char*>(out.data_ptr());
  PackedLinear args{};
  args.dtype = *dtype;
  args.inputs = x.size(1);
  args.x = x.data_ptr();
  args.x_stride = x.stride(1);
  args.outputs = n;
  int64_t row = 0;
  for (int64_t group = 0; group < packed.size(0); row = ends[group++]) {
    args.num_rows = ends[group] - row;
    args.rows = begins.data() + row;
    args.packed = static_cast<const char*>(packed.data_ptr()) + group * packed.stride(0) * width;
    args.out = to + row * n * width;
    packed_linear(args);
  }
  std::memset(to + row * n * width, 0, (rows - row) * n * width);
  return out;
}

Tensor packed_rows_cpu(Tensor packed, Tensor ids, int64_t k) {
  const auto dtype = dtype_of(packed);
  if (!dtype || ids.scalar_type() != ScalarType::Long || !ids.is_contiguous())
    return one_result<3>("fxlm::packed_rows_reference", {from(packed), from(ids), from(k)});
  FXLM_CHECK(packed.dim() == 4, "packed has ", packed.dim(), " dimensions");
  check_packed(packed, *dtype, k, packed.size(0) * kPanel);
  std::vector<int64_t> sizes;
  int64_t count = 1;
  for (int64_t i = 0; i < ids.dim(); ++i) sizes.push_back(ids.size(i)), count *= ids.size(i);
  sizes.push_back(k);
  const int64_t* values = static_cast<const int64_t*>(ids.data_ptr());
  for (int64_t i = 0; i < count; ++i)
    FXLM_CHECK(values[i] >= 0 && values[i] < packed.size(0) * kPanel, "ids[", i, "] = ", values[i],
               " of ", packed.size(0) * kPanel, " rows");
  Tensor out = empty_cpu(sizes, type_of(packed));
  packed_rows({*dtype, packed.data_ptr(), values, count, k, out.data_ptr()});
  return out;
}

}  // namespace
}  // namespace fxlm

STABLE_TORCH_LIBRARY_IMPL(fxlm, CPU, library) {
  library.impl("pack_weight", TORCH_BOX(&fxlm::pack_weight_cpu));
  library.impl("packed_linear", TORCH_BOX(&fxlm::packed_linear_cpu));
  library.impl("packed_grouped_linear", TORCH_BOX(&fxlm::packed_grouped_linear_cpu));
  library.impl("packed_rows", TORCH_BOX(&fxlm::packed_rows_cpu));
  library.impl("paged_attention", TORCH_BOX(&fxlm::paged_attention_cpu));
  library.impl("sample", TORCH_BOX(&fxlm::sample_cpu));
}
