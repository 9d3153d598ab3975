// Launches of the operators on a cache in pages. Keys and values are read where they lie: the plan of the kernels names
// the keys of a tile one by one anyway (key_row, token_row), so pages cost one row number for each key. What is copied
// is the modality of each key, for the plan.
//
// A call mixes sequences that decode with sequences that are filled in. Each has the kernels for its own number of rows.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/gram_family_launch.h"
#include "cpu/launch.h"
#include "cpu/modular_attention_launch.h"
#include "ops/modular_attention_operators.h"
#include "ops/paged_attention_checks.h"

namespace moda_ext {
namespace cpu {
namespace {

// Keys whose modality a thread reads at a time, and cells that it asks for ahead: each is a cache line of its own.
constexpr int64_t kKeysOfPiece = 1024;
constexpr int64_t kCellsAhead = 32;
// Splitting the keys of few heads: how many items are wanted, and the fewest tiles of one.
constexpr int64_t kDecodedItems = 16;
constexpr int64_t kTilesOfItem = 4;
// Keys before the rows from which on their Gram comes first.
constexpr int64_t kKeysOfGram = 256;
// Tokens that a thread writes at a time.
constexpr int64_t kTokensOfPiece = 64;

int32_t integer_at(const Tensor& tensor, int64_t i) {
  return static_cast<const int32_t*>(tensor.const_data_ptr())[i * tensor.stride(0)];
}

template <class Got>
[[noreturn]] void fail(const char* op, const char* argument, const std::string& expected, Got got) {
  throw std::invalid_argument(std::string(op) + ": " + argument + ": expected " + expected + ", got " +
                              std::to_string(got));
}

// ------------------------------------------------------------------------------------------------------------------
// paged_cache_update

template <class Storage>
void write_cells(const PagedCacheInputs& in, int64_t first, int64_t last) {
  const int64_t heads = in.key.size(1), head_dim = in.key.size(2), block = in.kv_cache.size(2);
  const Input key = input(in.key, true, Last::kPresent), value = input(in.value, true, Last::kPresent);
  const int64_t* slots = static_cast<const int64_t*>(in.slot_mapping.const_data_ptr());
  Storage* cells = static_cast<Storage*>(in.kv_cache.mutable_data_ptr());
  const size_t bytes = sizeof(Storage) * static_cast<size_t>(head_dim);
  for (int64_t i = first; i < last; ++i) {
    const int64_t slot = slots[i * in.slot_mapping.stride(0)];
    if (slot < 0) continue;
    const Storage modality = static_cast<Storage>(static_cast<float>(integer_at(in.modality, i)));
    for (int64_t h = 0; h < heads; ++h) {
      Storage* cell = cells + slot / block * in.kv_cache.stride(0) + h * in.kv_cache.stride(1) +
                      slot % block * in.kv_cache.stride(2);
      std::memcpy(cell, row_of<Storage>(key, 0, h, i), bytes);
      std::memcpy(cell + head_dim, row_of<Storage>(value, 0, h, i), bytes);
      cell[2 * head_dim] = modality;
    }
  }
}

// Checks what is written, and where to; nothing is written before.
void check_tokens(const PagedCacheInputs& in) {
  check_paged_cache_update(in);
  const int64_t slots = in.kv_cache.size(0) * in.kv_cache.size(2);
  const int64_t* slot_mapping = static_cast<const int64_t*>(in.slot_mapping.const_data_ptr());
  for (int64_t i = 0; i < in.key.size(0); ++i) {
    const int64_t slot = slot_mapping[i * in.slot_mapping.stride(0)];
    if (slot >= slots) fail(in.op, "slot_mapping", "slots below " + std::to_string(slots), slot);
    const int32_t id = integer_at(in.modality, i);
    if (id < -1 || id >= in.num_modalities)
      fail(in.op, "modality", "ids from -1 to " + std::to_string(in.num_modalities - 1), id);
  }
}

Phase write_tokens(const PagedCacheInputs& in) {
  const int64_t tokens = in.key.size(0);
  const Storage storage = storage_of(in.key.scalar_type());
  const auto write = storage == Storage::kFloat64    ? write_cells<double>
                     : storage == Storage::kBFloat16 ? write_cells<torch::headeronly::BFloat16>
                     : storage == Storage::kFloat16  ? write_cells<torch::headeronly::Half>
                                                     : write_cells<float>;
  return {(tokens + kTokensOfPiece - 1) / kTokensOfPiece, [&in, write, tokens](int64_t piece, int64_t) {
            write(in, piece * kTokensOfPiece, std::min(tokens, (piece + 1) * kTokensOfPiece));
          }};
}

void paged_cache_update(const Tensor& key, const Tensor& value, const Tensor& modality, const Tensor& kv_cache,
                        const Tensor& slot_mapping) {
  const PagedCacheInputs in{"paged_cache_update", key, value, modality, kv_cache, slot_mapping, kMaxModalities};
  check_tokens(in);
  const Phase write = write_tokens(in);
  run_phases(threads_for(write.items), {write});
}

// ------------------------------------------------------------------------------------------------------------------
// paged_modular_attention

// One sequence of a call: which of the rows are its last tokens, and of each token its row in the cache and modality.
struct PagedSequence {
  int64_t first_query, num_queries;
  std::vector<int64_t> rows;
  std::vector<int32_t> modality;

  int64_t num_keys() const { return static_cast<int64_t>(rows.size()); }
};

// Throws where a length or a block would lead outside of the tensors, before any page is read.
PagedSequence locate_sequence(const PagedAttentionInputs& in, int64_t i, int64_t num_queries) {
  const int64_t block_size = in.kv_cache.size(2), blocks = in.kv_cache.size(0);
  const int64_t first = integer_at(in.query_start_loc, i), last = integer_at(in.query_start_loc, i + 1);
  if (last < first) fail(in.op, "query_start_loc", "ascending offsets", last);
  if ((i == 0 && first != 0) || last > num_queries)
    fail(in.op, "query_start_loc", "offsets from 0 to at most " + std::to_string(num_queries), i == 0 ? first : last);
  const int64_t length = integer_at(in.seq_lens, i);
  if (length < last - first)
    fail(in.op, "seq_lens", "at least the " + std::to_string(last - first) + " queries of a sequence", length);
  if (length > in.block_table.size(1) * block_size)
    fail(in.op, "seq_lens", "at most the " + std::to_string(in.block_table.size(1) * block_size) + " keys of a table",
         length);
  PagedSequence sequence{first, last - first, std::vector<int64_t>(static_cast<size_t>(length)), {}};
  const int32_t* table = static_cast<const int32_t*>(in.block_table.const_data_ptr()) + i * in.block_table.stride(0);
  const int64_t per_block = rows_per_block(in.kv_cache);
  for (int64_t key = 0; key < length; key += block_size) {
    const int64_t block = table[key / block_size * in.block_table.stride(1)];
    if (block < 0 || block >= blocks)
      fail(in.op, "block_table", "blocks from 0 to " + std::to_string(blocks - 1), block);
    const int64_t end = std::min(length, key + block_size);
    for (int64_t j = key; j < end; ++j) sequence.rows[static_cast<size_t>(j)] = block * per_block + j - key;
  }
  return sequence;
}

// Reads the modalities of keys [first, last) of a sequence. False where one is none; it is then the first of them.
template <class Storage>
bool read_modalities(const PagedAttentionInputs& in, int64_t first, int64_t last, PagedSequence& sequence,
                     double& wrong) {
  const int64_t cell = in.kv_cache.stride(2), head_dim = in.query.size(in.query.dim() - 1);
  const Storage* modality = static_cast<const Storage*>(in.kv_cache.const_data_ptr()) + 2 * head_dim;
  for (int64_t j = first; j < last; ++j) {
    if (j + kCellsAhead < last)
      __builtin_prefetch(modality + sequence.rows[static_cast<size_t>(j + kCellsAhead)] * cell);
    const double id = static_cast<double>(modality[sequence.rows[static_cast<size_t>(j)] * cell]);
    if (!(id >= -1 && id < static_cast<double>(in.num_modalities) && id == std::floor(id))) {
      wrong = id;
      return false;
    }
    sequence.modality[static_cast<size_t>(j)] = static_cast<int32_t>(id);
  }
  return true;
}

// `written` are tokens that come into the pages first, when all that can be wrong with them and the tables is known.
std::vector<PagedSequence> read_sequences(const PagedAttentionInputs& in, int64_t num_queries,
                                          const PagedCacheInputs* written) {
  struct Piece {
    PagedSequence* sequence;
    int64_t first, last;
    double wrong;
    bool read;
  };
  std::vector<PagedSequence> sequences;
  for (int64_t i = 0; i < in.block_table.size(0); ++i) sequences.push_back(locate_sequence(in, i, num_queries));
  std::vector<Piece> pieces;
  for (PagedSequence& sequence : sequences) {
    sequence.modality.resize(sequence.rows.size());
    if (sequence.num_queries == 0) continue;
    for (int64_t first = 0; first < sequence.num_keys(); first += kKeysOfPiece)
      pieces.push_back({&sequence, first, std::min(sequence.num_keys(), first + kKeysOfPiece), 0, false});
  }
  const Storage storage = storage_of(in.kv_cache.scalar_type());
  const auto read = storage == Storage::kFloat64    ? read_modalities<double>
                    : storage == Storage::kBFloat16 ? read_modalities<torch::headeronly::BFloat16>
                    : storage == Storage::kFloat16  ? read_modalities<torch::headeronly::Half>
                                                    : read_modalities<float>;
  const Phase write = written != nullptr ? write_tokens(*written) : Phase{0, nullptr};
  const auto read_piece = [&](int64_t i, int64_t) {
    Piece& piece = pieces[static_cast<size_t>(i)];
    piece.read = read(in, piece.first, piece.last, *piece.sequence, piece.wrong);
  };
  const int64_t count = static_cast<int64_t>(pieces.size());
  run_phases(threads_for(std::max(write.items, count)), {write, {count, read_piece}});
  for (const Piece& piece : pieces)
    if (!piece.read)
      fail(in.op, "kv_cache", "modalities from -1 to " + std::to_string(in.num_modalities - 1), piece.wrong);
  return sequences;
}

// The sequences that the same kernels of attention take.
struct Group {
  const ModularAttentionKernels* kernels;
  std::vector<const PagedSequence*> paged;
  Batch batch;
};

std::vector<Group> group_sequences(const PagedAttentionInputs& in, const std::vector<PagedSequence>& sequences,
                                   int64_t group) {
  std::vector<Group> groups;
  for (const PagedSequence& paged : sequences) {
    if (paged.num_queries == 0) continue;
    const ModularAttentionKernels& kernels = select_forward_kernels(in.query.scalar_type(), paged.num_queries * group);
    const auto same = [&](const Group& other) { return other.kernels == &kernels; };
    auto found = std::find_if(groups.begin(), groups.end(), same);
    if (found == groups.end()) {
      groups.push_back({&kernels, {}, Batch(sequences.size())});
      found = groups.end() - 1;
    }
    Sequence sequence;
    sequence.first_query = paged.first_query;
    sequence.num_queries = paged.num_queries;
    sequence.num_keys = paged.num_keys();
    sequence.rows = paged.rows.data();
    found->paged.push_back(&paged);
    found->batch.add(sequence,
                     plan_keys(paged.modality.data(), 1, paged.num_keys(), static_cast<int>(in.num_modalities),
                               kernels.forward_tile_keys, kernels.panel_keys, in.op));
  }
  return groups;
}

// Rows of sums, (T, Hq) or (T, Hq, M): copied from a table as `pick` says which row of it a row takes, or without one
// the tensor itself.
class RowsOfSums {
 public:
  template <class Pick>
  RowsOfSums(const PagedAttentionInputs& in, const std::optional<Tensor>& table, int64_t count, Last last,
             const Pick& pick) {
    if (!table) return;
    rows_ = input(*table, true, last);
    if (!in.row_modality) return;
    const bool wide = compute_dtype(in.query.scalar_type()) == ScalarType::Double;
    wide ? copy<double>(*table, count, pick) : copy<float>(*table, count, pick);
  }
  const Input& rows() const { return rows_; }

 private:
  template <class T, class Pick>
  void copy(const Tensor& table, int64_t count, const Pick& pick) {
    const int64_t heads = table.size(1), width = table.dim() == 3 ? table.size(2) : 1;
    T* copied = reinterpret_cast<T*>(memory_.emplace(count * heads * width * static_cast<int64_t>(sizeof(T))).at());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = pick(i);
      for (int64_t h = 0; h < heads; ++h) {
        const T* from = row_of<T>(rows_, 0, h, row);
        for (int64_t m = 0; m < width; ++m) *copied++ = from[m * rows_.last];
      }
    }
    rows_ = Input{};
    rows_.data = memory_->at();
    rows_.head = width;
    rows_.row = heads * width;
    rows_.last = 1;
  }

  Input rows_;
  std::optional<Workspace> memory_;
};

// The bias, or condition, of rows: of a table that of their modality. Padding, which has none, takes the first.
RowsOfSums by_modality(const PagedAttentionInputs& in, const std::optional<Tensor>& table, int64_t count) {
  return {in, table, count, Last::kPresent,
          [&](int64_t i) { return std::max<int64_t>(0, integer_at(*in.row_modality, i)); }};
}

// The sink of rows: of a table that of their place in their sequence, of which the last stands for all beyond.
RowsOfSums by_position(const PagedAttentionInputs& in, const std::vector<PagedSequence>& sequences, int64_t count) {
  size_t at = 0;
  return {in, in.sink, count, Last::kNone, [&](int64_t i) {
            while (at < sequences.size() && i >= sequences[at].first_query + sequences[at].num_queries) ++at;
            if (at == sequences.size()) return int64_t{0};  // of no sequence
            const PagedSequence& own = sequences[at];
            return std::min(in.sink->size(0) - 1, own.num_keys() - own.num_queries + i - own.first_query);
          }};
}

// A checked call with its pages read, its results allocated and the arguments that the kernels of attention take.
struct PagedCall {
  ModularAttentionShape shape;
  std::vector<PagedSequence> sequences;
  std::vector<Group> groups;
  RowsOfSums bias, sink;
  Tensor out, lse, mass;
  Workspace residual;  // of lse, which nobody asks for
  ModularAttentionForwardArgs args;

  // Writes to `into` if there is one.
  PagedCall(const PagedAttentionInputs& in, const ModularAttentionShape& checked, const Tensor* into = nullptr,
            const PagedCacheInputs* written = nullptr)
      : shape(checked),
        sequences(read_sequences(in, shape.num_queries, written)),
        bias(by_modality(in, in.modality_bias, shape.num_queries)),
        sink(by_position(in, sequences, shape.num_queries)),
        out(into != nullptr ? *into : CpuResults::result_like(in.query, shape.out(), true)),
        lse(empty_sums(in.query, shape.rows())),
        mass(empty_sums(in.query, shape.mass())),
        residual(lse.numel() * static_cast<int64_t>(lse.element_size())) {
    args.group = static_cast<int>(shape.kv_heads > 0 ? shape.query_heads / shape.kv_heads : 1);
    groups = group_sequences(in, sequences, args.group);
    int64_t covered = 0;
    for (const PagedSequence& sequence : sequences) covered += sequence.num_queries;
    if (covered < shape.num_queries)  // rows of no sequence, as where a graph has a fixed number of them
      for (Tensor result : {out, lse, mass}) torch::stable::zero_(result);
    args.head_dim = static_cast<int>(shape.head_dim);
    args.num_modalities = static_cast<int>(shape.num_modalities);
    args.num_views = static_cast<int>(shape.num_views);
    args.causal = true;
    args.scale = in.scale;
    args.query = input(in.query, true, Last::kPresent);
    args.key.data = in.kv_cache.const_data_ptr();
    args.key.head = in.kv_cache.stride(1);
    args.key.row = in.kv_cache.stride(2);
    args.value = args.key;
    args.value.data =
        static_cast<const char*>(args.key.data) + shape.head_dim * static_cast<int64_t>(in.kv_cache.element_size());
    args.bias = bias.rows();
    args.sink = sink.rows();
    args.out = output(out, true, Last::kPresent);
    args.lse = output(lse, true, Last::kNone);
    args.mass = output(mass, true, Last::kPresent);
    args.lse_residual = args.lse;
    args.lse_residual.data = residual.at();
  }
};

void attend(const PagedCall& call) {
  for (const Group& group : call.groups)
    run_forward(*group.kernels, call.args, call.shape, group.batch, {0, call.shape.kv_heads});
}

std::tuple<Tensor, Tensor, Tensor> paged_modular_attention(const Tensor& query, const Tensor& kv_cache,
                                                           const Tensor& block_table, const Tensor& seq_lens,
                                                           const Tensor& query_start_loc,
                                                           const std::optional<Tensor>& modality_bias,
                                                           const std::optional<Tensor>& sink, int64_t num_modalities,
                                                           double scale) {
  const PagedAttentionInputs in{"paged_modular_attention", query,         kv_cache, block_table,    seq_lens,
                                query_start_loc,           modality_bias, sink,     num_modalities, scale};
  const PagedCall call(in, check_paged_attention(in));
  attend(call);
  return {call.out, call.lse, call.mass};
}

// ------------------------------------------------------------------------------------------------------------------
// paged_duplex_attention

// An operand of packed rows from a sequence's first row on.
template <class Operand>
Operand from_row(Operand operand, int64_t row, int64_t element_size) {
  using Bytes = std::conditional_t<std::is_same_v<Operand, Output>, char, const char>;
  if (operand.data != nullptr) operand.data = static_cast<Bytes*>(operand.data) + row * operand.row * element_size;
  return operand;
}

// Where the views of the query of a call are, and the phases of work that make them.
struct MadeViews {
  Input views;
  std::vector<Phase> phases;
};

// Makes the views of the query of a call, for some key heads at a time, and the bias where it depends on the indicator.
class PagedViews {
 public:
  PagedViews(const PagedDuplexInputs& in, const PagedCall& call)
      : in_(in),
        shape_(call.shape),
        element_(static_cast<int64_t>(in.query.element_size())),
        vector_(in, call, 0),
        sums_(vector_.kernels.compute_bytes),
        scale_(shape_.kv_heads * shape_.num_queries * shape_.num_modalities * sums_),
        bias_(call.bias.rows()),
        condition_(by_modality(in, in.condition, shape_.num_queries)),
        conditioned_(in.condition ? shape_.query_heads * shape_.num_queries * shape_.num_modalities * sums_ : 0) {
    for (const PagedSequence& sequence : call.sequences)
      if (!tiles_ && &kernels_of(sequence) != &vector_.kernels)
        tiles_.emplace(in, call, sequence.num_queries * call.args.group);
    scale_of_call_.data = scale_.at();
    scale_of_call_.row = shape_.num_modalities;
    scale_of_call_.head = shape_.num_queries * shape_.num_modalities;
    if (!in.condition) return;
    conditioned_bias_.data = conditioned_.at();
    conditioned_bias_.head = shape_.num_modalities;
    conditioned_bias_.row = shape_.query_heads * shape_.num_modalities;
    conditioned_bias_.last = 1;
  }

  int64_t bytes_per_head() const {
    const int64_t group = shape_.query_heads / shape_.kv_heads;
    return element_ * shape_.num_modalities * group * shape_.num_queries * shape_.head_dim;
  }

  // The bias with the indicator's share, which is made with the views.
  Input conditioned_bias() const { return read_from(conditioned_bias_); }

  // The views of key heads [heads.first, heads.last) and all rows, as if those of all heads were there.
  MadeViews make(const Group& group, KeyHeads heads, char* memory) const {
    Output views;
    views.row = shape_.head_dim;
    views.head = shape_.num_queries * shape_.head_dim;
    const int64_t of_key_head = views.head * vector_.args.group;
    views.view = of_key_head * (heads.last - heads.first);
    views.data = memory - element_ * of_key_head * heads.first;
    std::vector<Work> filled, decoded;
    for (size_t i = 0; i < group.paged.size(); ++i) {
      const Work work = work_of(*group.paged[i], group.batch.sequences[i], views);
      (work.args.num_queries * work.args.group <= kFewRows ? decoded : filled).push_back(work);
    }
    MadeViews made{read_from(views), {}};
    if (!filled.empty()) fill(std::move(filled), heads, made.phases);
    if (!decoded.empty()) decode(std::move(decoded), heads, made.phases);
    return made;
  }

 private:
  // Kernels for so many rows, with the arguments of all sequences.
  struct Kernels {
    const GramFamilyKernels& kernels;
    DuplexQueryViewsForwardArgs args;
    PackedWeights weights;

    Kernels(const PagedDuplexInputs& in, const PagedCall& call, int64_t rows_per_key_head)
        : kernels(select_gram_family_kernels(in.query, rows_per_key_head)),
          args(arguments(in, call)),
          weights(kernels, args) {}
    static DuplexQueryViewsForwardArgs arguments(const PagedDuplexInputs& in, const PagedCall& call) {
      DuplexQueryViewsForwardArgs args;
      args.head_dim = call.args.head_dim;
      args.num_modalities = call.args.num_modalities;
      args.unit_keys = in.unit_keys;
      args.eps = in.eps;
      args.kv_heads = call.shape.kv_heads;
      args.key = call.args.key;
      args.modality_token = 1;
      args.group = call.args.group;
      args.query = call.args.query;
      GramShape weights{};
      weights.rank = in.a1.size(2);
      fill_args(static_cast<const DuplexWeights&>(in), weights, args);
      return args;
    }
  };

  // One sequence: what the kernels are called with.
  struct Work {
    const GramFamilyKernels* kernels;
    DuplexQueryViewsForwardArgs args;
    DecodedViewsArgs decoded;
    Input bias, condition;
  };

  const GramFamilyKernels& kernels_of(const PagedSequence& paged) const {
    return select_gram_family_kernels(in_.query, paged.num_queries * vector_.args.group);
  }

  Work work_of(const PagedSequence& paged, const Sequence& sequence, const Output& views) const {
    const int64_t first = paged.first_query;
    const Kernels& chosen = &kernels_of(paged) == &vector_.kernels ? vector_ : *tiles_;
    Work work{&chosen.kernels, chosen.args, {}, {}, {}};
    work.args.num_keys = paged.num_keys();
    work.args.num_queries = paged.num_queries;
    work.args.modality = paged.modality.data();
    work.args.key_rows = paged.rows.data();
    work.args.query = from_row(work.args.query, first, element_);
    work.args.views = from_row(views, first, element_);
    work.args.indicator = from_row(conditioned_bias_, first, sums_);
    work.decoded.sequence = &sequence;
    work.decoded.query_modality_token = in_.query_modality.stride(0);
    work.decoded.query_modality =
        static_cast<const int32_t*>(in_.query_modality.const_data_ptr()) + first * work.decoded.query_modality_token;
    work.decoded.by_trace = in_.by_trace;
    work.decoded.scale = from_row(scale_of_call_, first, sums_);
    work.args.row_scale.data = work.decoded.scale.data;
    work.args.row_scale.head = work.decoded.scale.head;
    work.args.row_scale.row = work.decoded.scale.row;
    work.bias = from_row(bias_, first, sums_);
    work.condition = from_row(condition_.rows(), first, sums_);
    return work;
  }

  void condition(const Work& work, int64_t head) const {
    if (in_.condition) add_condition(*work.kernels, work.args, work.bias, work.condition, work.args.indicator, 0, head);
  }

  // Adds a phase. The Gram of the keys before the rows, where they are many, is one product; the rows start from it.
  void fill(std::vector<Work> works, KeyHeads heads, std::vector<Phase>& phases) const {
    const int64_t count = heads.last - heads.first, items = count * static_cast<int64_t>(works.size());
    const int64_t gram_bytes = shape_.num_modalities * shape_.head_dim * shape_.head_dim * sums_;
    int64_t bytes = 0;
    for (Work work : works) {
      work.args.initial = &work;  // room for one, whether there is one or not
      bytes = std::max({bytes, work.kernels->duplex_query_views_scratch_bytes(work.args),
                        work.kernels->modality_gram_scratch_bytes(work.args)});
    }
    const auto scratch = std::make_shared<Scratch>(bytes, num_threads());
    const auto grams = std::make_shared<Scratch>(gram_bytes, num_threads());
    auto make = [this, heads, count, gram_bytes, scratch, grams, works = std::move(works)](int64_t item,
                                                                                           int64_t thread) {
      const Work& work = works[static_cast<size_t>(item / count)];
      const int64_t head = heads.first + item % count;
      DuplexQueryViewsForwardArgs args = work.args;
      const int64_t before = args.num_keys - args.num_queries;
      if (before >= kKeysOfGram) {
        void* gram = grams->of(thread);
        work.kernels->modality_gram(args, {0, head, 0, before, gram}, scratch->of(thread));
        args.initial = static_cast<char*>(gram) - head * gram_bytes;  // as if those of all heads were there
        args.num_keys = args.num_queries;
        args.key_rows += before;
        args.modality += before;
      }
      work.kernels->causal_scale(args, work.decoded, head);
      work.kernels->duplex_query_views(args, 0, head, scratch->of(thread));
      condition(work, head);
    };
    phases.push_back({items, std::move(make)});
  }

  // Adds two phases. Where there are few heads, each is split over its tiles, and merged in the second.
  void decode(std::vector<Work> decoded, KeyHeads heads, std::vector<Phase>& phases) const {
    struct Item {
      const Work* work;
      DecodedViewsItem item;
    };
    struct Split {
      const Work* work;
      int64_t head;
      std::vector<void*> partials;
    };
    struct Plan {
      std::vector<Work> works;
      Workspace partials;
      Scratch scratch;
      std::vector<Item> items;
      std::vector<Split> splits;

      Plan(std::vector<Work> decoded, int64_t partial_bytes, int64_t scratch_bytes)
          : works(std::move(decoded)), partials(partial_bytes), scratch(scratch_bytes, num_threads()) {}
    };
    const int64_t count = (heads.last - heads.first) * static_cast<int64_t>(decoded.size());
    const int64_t wanted = std::max(kDecodedItems, 2 * num_threads());
    const int64_t most = count > 0 && count < wanted / 2 ? (wanted + count - 1) / count : 1;
    const GramFamilyKernels& kernels = vector_.kernels;
    int64_t scratch_bytes = 0, partial_bytes = 0;
    for (const Work& work : decoded) {
      scratch_bytes = std::max(scratch_bytes, kernels.decoded_query_views_scratch_bytes(work.args));
      partial_bytes = std::max(partial_bytes, round_up(kernels.decoded_query_views_partial_bytes(work.args)));
    }
    const auto plan =
        std::make_shared<Plan>(std::move(decoded), most > 1 ? count * most * partial_bytes : 0, scratch_bytes);
    for (const Work& work : plan->works) {
      const int64_t tiles = work.decoded.sequence->num_tiles;
      const int64_t pieces = std::min(most, std::max<int64_t>(1, tiles / kTilesOfItem));
      for (int64_t head = heads.first; head < heads.last; ++head) {
        if (pieces > 1) plan->splits.push_back({&work, head, {}});
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const int64_t index = static_cast<int64_t>(plan->items.size());
          void* partial = pieces > 1 ? plan->partials.at(index * partial_bytes) : nullptr;
          if (pieces > 1) plan->splits.back().partials.push_back(partial);
          plan->items.push_back({&work, {head, tiles * piece / pieces, tiles * (piece + 1) / pieces, partial}});
        }
      }
    }
    const auto make = [this, plan, &kernels](int64_t i, int64_t thread) {
      const Item& item = plan->items[static_cast<size_t>(i)];
      kernels.decoded_query_views(item.work->args, item.work->decoded, item.item, plan->scratch.of(thread));
      if (item.item.partial == nullptr) condition(*item.work, item.item.kv_head);
    };
    const auto merge = [this, plan, &kernels](int64_t i, int64_t thread) {
      const Split& split = plan->splits[static_cast<size_t>(i)];
      kernels.merge_decoded_query_views(split.work->args, split.work->decoded, split.head, split.partials.data(),
                                        static_cast<int>(split.partials.size()), plan->scratch.of(thread));
      condition(*split.work, split.head);
    };
    phases.push_back({static_cast<int64_t>(plan->items.size()), make});
    phases.push_back({static_cast<int64_t>(plan->splits.size()), merge});
  }

  const PagedDuplexInputs& in_;
  const ModularAttentionShape& shape_;
  const int64_t element_;
  const Kernels vector_;
  std::optional<Kernels> tiles_;  // where a sequence has the rows for them
  const int64_t sums_;            // bytes of a number of the compute type
  const Workspace scale_;
  const Input& bias_;
  const RowsOfSums condition_;
  const Workspace conditioned_;
  Output scale_of_call_, conditioned_bias_;
};

void align_and_attend(const PagedDuplexInputs& in, PagedCall& call) {
  if (call.groups.empty() || call.shape.kv_heads == 0) return;
  const PagedViews views(in, call);
  if (in.condition) call.args.bias = views.conditioned_bias();
  call.args.num_views = static_cast<int>(in.num_modalities);
  const int64_t bytes = std::max<int64_t>(1, views.bytes_per_head());
  const int64_t heads = std::min(call.shape.kv_heads, std::max(num_threads(), kViewsBudget / bytes));
  const Workspace memory(heads * bytes);
  for (const Group& group : call.groups)
    for (int64_t first = 0; first < call.shape.kv_heads; first += heads) {
      const KeyHeads now{first, std::min(call.shape.kv_heads, first + heads)};
      MadeViews made = views.make(group, now, memory.at());
      call.args.query = made.views;
      run_forward(*group.kernels, call.args, call.shape, group.batch, now, nullptr, std::move(made.phases));
    }
}

std::tuple<Tensor, Tensor, Tensor> paged_duplex_attention(const Tensor& query, const Tensor& query_modality,
                                                          const Tensor& kv_cache, const Tensor& block_table,
                                                          const Tensor& seq_lens, const Tensor& query_start_loc,
                                                          const Tensor& a1, const Tensor& b1, const Tensor& a2,
                                                          const Tensor& b2, const std::optional<Tensor>& modality_bias,
                                                          const std::optional<Tensor>& condition,
                                                          const std::optional<Tensor>& sink, int64_t num_modalities,
                                                          bool unit_keys, bool by_trace, double eps, double scale) {
  const PagedDuplexInputs in{{"paged_duplex_attention", query, kv_cache, block_table, seq_lens, query_start_loc,
                              modality_bias, sink, num_modalities, scale},
                             {a1, b1, a2, b2},
                             query_modality,
                             condition,
                             unit_keys,
                             by_trace,
                             eps};
  PagedCall call(in, check_paged_duplex_attention(in));
  align_and_attend(in, call);
  return {call.out, call.lse, call.mass};
}

// ------------------------------------------------------------------------------------------------------------------
// paged_attention_step

Tensor paged_attention_step(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& modality,
                            const Tensor& slot_mapping, const Tensor& kv_cache, const Tensor& block_table,
                            const Tensor& seq_lens, const Tensor& query_start_loc, const std::optional<Tensor>& a1,
                            const std::optional<Tensor>& b1, const std::optional<Tensor>& a2,
                            const std::optional<Tensor>& b2, const std::optional<Tensor>& modality_bias,
                            const std::optional<Tensor>& condition, const std::optional<Tensor>& sink,
                            int64_t num_modalities, bool unit_keys, bool by_trace, double eps, double scale,
                            const Tensor& out) {
  const char* op = "paged_attention_step";
  const PagedAttentionInputs plain{
      op,   query,          kv_cache, block_table, seq_lens, query_start_loc, modality_bias,
      sink, num_modalities, scale,    modality};
  const PagedCacheInputs written{op, key, value, modality, kv_cache, slot_mapping, num_modalities};
  const bool aligned = a1 && b1 && a2 && b2;
  ArgumentCheck(op).require(aligned || !(a1 || b1 || a2 || b2 || condition), "a1, b1, a2, b2", "all or none", "some");
  const auto checked = [&](const ModularAttentionShape& shape) {
    check_paged_step(shape, written, out);
    check_tokens(written);
    return shape;
  };
  if (!aligned) {
    const PagedCall call(plain, checked(check_paged_attention(plain)), &out, &written);
    attend(call);
    return call.mass;
  }
  const PagedDuplexInputs in{plain, {*a1, *b1, *a2, *b2}, modality, condition, unit_keys, by_trace, eps};
  PagedCall call(in, checked(check_paged_duplex_attention(in)), &out, &written);
  align_and_attend(in, call);
  return call.mass;
}

}  // namespace
}  // namespace cpu
}  // namespace moda_ext

STABLE_TORCH_LIBRARY_IMPL(moda_ext, CPU, m) {
  m.impl("paged_modular_attention", TORCH_BOX(&moda_ext::cpu::paged_modular_attention));
  m.impl("paged_duplex_attention", TORCH_BOX(&moda_ext::cpu::paged_duplex_attention));
  m.impl("paged_cache_update", TORCH_BOX(&moda_ext::cpu::paged_cache_update));
  m.impl("paged_attention_step", TORCH_BOX(&moda_ext::cpu::paged_attention_step));
}
