// nanobind only: check arguments, release the GIL, call the engine.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "machine_limits.h"
#include "program.h"
#include "quantize.h"
#include "vocabulary.h"
#include "weight_loader.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace autoglm;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<const float, nb::numpy, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints2 = nb::ndarray<const int32_t, nb::numpy, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

using Offsets = nb::ndarray<const uint32_t, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

Strings to_strings(const nb::bytes& data, const Offsets& offsets) {
  require(offsets.size() >= 1, "offsets must hold an entry more than there are strings");
  const uint32_t* o = offsets.data();
  for (size_t i = 1; i < offsets.size(); ++i)
    require((uint64_t)o[i] >= (uint64_t)o[i - 1] + 8 && o[i] <= data.size(), "offsets must rise within data");
  return {data.c_str(), o, offsets.size() - 1};
}

QuantType to_type(int id) {
  require(known_type(id), "unknown weight type id");
  return (QuantType)id;
}

KvType to_kv(const std::string& name) {
  if (name == "f32") return KvType::F32;
  if (name == "f16") return KvType::F16;
  if (name == "i16") return KvType::I16;
  if (name == "q8_0") return KvType::Q8;
  throw std::invalid_argument("KV cache type must be f32, f16, i16 or q8_0");
}

std::vector<float> to_vector(const std::optional<Floats>& a) {
  return a ? std::vector<float>(a->data(), a->data() + a->size()) : std::vector<float>();
}

nb::ndarray<nb::numpy, float> make_array(std::vector<size_t> dims) {
  size_t n = 1;
  for (size_t d : dims) n *= d;
  float* data = new float[n];
  nb::capsule owner(data, [](void* p) noexcept { delete[] (float*)p; });
  return nb::ndarray<nb::numpy, float>(data, dims.size(), dims.data(), owner);
}

nb::ndarray<nb::numpy, uint32_t, nb::ndim<1>> offsets_of_strings(Bytes buffer, size_t first, size_t end, size_t count) {
  require(first <= end && end <= buffer.size(), "first and end must lie within the buffer");
  auto offsets = std::make_unique<std::vector<uint32_t>>();
  {
    nb::gil_scoped_release release;
    const size_t size = std::min<size_t>(end - first, UINT32_MAX);
    *offsets = string_offsets((const char*)buffer.data() + first, size, std::min(count, size / 8));
  }
  std::vector<uint32_t>* data = offsets.release();
  nb::capsule owner(data, [](void* p) noexcept { delete (std::vector<uint32_t>*)p; });
  return nb::ndarray<nb::numpy, uint32_t, nb::ndim<1>>(data->data(), {data->size()}, owner);
}

// The kernel table and the threads that everything else runs on.
struct Runtime {
  const KernelTable* kernels;
  ThreadPool pool;
  std::mutex in_use;  // the pool serves one caller at a time; taken only without the GIL
  Slabs slabs;        // where matrices are put
  Runtime(int num_threads, const KernelTable* table, double slow_page_s)
      : kernels(table), pool(num_threads), slabs(slow_page_s) {}
};

std::shared_ptr<Runtime> make_runtime(int num_threads, std::string isa, double slow_page_s) {
  require(num_threads >= 1 && num_threads <= 1024, "num_threads must be 1 to 1024");
  if (isa.empty()) {
    const char* env = std::getenv("AUTOGLM_ISA");
    isa = env ? env : "";
  }
  const KernelTable* table = select_table(isa.c_str());
  if (!table) {
    std::string able = table_name(0);
    for (size_t i = 1; const char* name = table_name(i); ++i) able += std::string(" or ") + name;
    throw std::invalid_argument("AUTOGLM_ISA '" + isa + "' cannot run on this machine; use " + able + ", or leave it unset");
  }
  return std::make_shared<Runtime>(num_threads, table, slow_page_s);
}

std::shared_ptr<Matrix> make_matrix(Runtime& rt, int type_id, int rows, int cols, bool in_floats) {
  require(rows > 0 && cols > 0, "a matrix needs rows and columns");
  return std::make_shared<Matrix>(to_type(type_id), rows, cols, in_floats, rt.slabs);
}

std::shared_ptr<Matrix> pack(Runtime& rt, Bytes data, int type_id, int rows, int cols) {
  auto matrix = make_matrix(rt, type_id, rows, cols, false);
  require(data.size() == matrix->source_bytes(), "data is not rows * row_bytes long");
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(rt.in_use);
  matrix->fill({data.data(), nullptr, 0}, rt.pool);
  return matrix;
}

// Runs f without the GIL; what a file refuses becomes EOFError or OSError.
template <class F>
auto reading(const F& f) {
  try {
    nb::gil_scoped_release release;
    return f();
  } catch (const ReadError& error) {
    if (error.code == TensorFile::kCut) {
      PyErr_SetString(PyExc_EOFError, "the file ends inside a matrix");
    } else {
      errno = error.code;
      PyErr_SetFromErrno(PyExc_OSError);
    }
  }
  throw nb::python_error();
}

// A loader with what it works on.
struct PyWeightLoader {
  std::shared_ptr<Runtime> runtime;
  WeightLoader loader;
  PyWeightLoader(std::shared_ptr<Runtime> rt, int fd) : runtime(rt), loader(fd, rt->pool, rt->in_use) {
    require(loader.file().fd() >= 0, "not an open file");
  }

  std::shared_ptr<Matrix> read(int64_t offset, int type_id, int rows, int cols, bool in_floats) {
    require(offset >= 0, "negative offset");
    auto matrix = make_matrix(*runtime, type_id, rows, cols, in_floats);
    loader.add(matrix, (uint64_t)offset);
    return matrix;
  }
};

nb::ndarray<nb::numpy, uint8_t> quantize_rows(Runtime& rt, Floats2 x, int type_id) {
  const QuantType type = to_type(type_id);
  const int rows = (int)x.shape(0), cols = (int)x.shape(1);
  require(has_quantizer(type), "this type has no quantizer");
  require(cols % block_elements(type) == 0, "a row is not a whole number of blocks");
  const size_t row = row_bytes(type, cols);
  uint8_t* out = new uint8_t[row * (size_t)rows];
  nb::capsule owner(out, [](void* p) noexcept { delete[] (uint8_t*)p; });
  {
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(rt.in_use);
    rt.pool.parallel_for(rows, [&](int r, int) { quantize(type, x.data() + (size_t)r * cols, (size_t)cols, out + row * (size_t)r); });
  }
  const size_t dims[1] = {row * (size_t)rows};
  return nb::ndarray<nb::numpy, uint8_t>(out, 1, dims, owner);
}

nb::ndarray<nb::numpy, float> matmul(Runtime& rt, const Matrix& m, Floats2 x) {
  reading([&] { m.wait(); });
  const PackedMatrix& w = m.view();
  const int rows = (int)x.shape(0);
  require((int)x.shape(1) == w.cols, "x has another number of columns than the matrix");
  auto result = make_array({x.shape(0), (size_t)w.rows});
  float* out = (float*)result.data();
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(rt.in_use);
  Activation act;
  act.width = w.cols;
  act.capacity = rows;
  act.need(activation_kind(w.type));
  const ActView view = act.view();
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < act.chunks(); ++c) rt.kernels->quantize_chunk(x.data() + (size_t)r * w.cols + c * kChunk, c, view, r);
  const size_t per_thread = kGemmScratch + (size_t)rows * kPanelRows * sizeof(float);
  const size_t stride = (per_thread + 4095) / 4096 * 4096;
  Pages scratch(stride * (size_t)rt.pool.size());
  rt.pool.parallel_for(w.panels, [&](int panel, int thread) {
    uint8_t* s = scratch.data() + stride * (size_t)thread;
    float* c = (float*)(s + kGemmScratch);
    rt.kernels->gemm_panels(w, panel, 1, view, 0, rows, c, s);
    for (int t = 0; t < rows; ++t)
      for (int r = 0; r < kPanelRows && panel * kPanelRows + r < w.rows; ++r)
        out[(size_t)t * w.rows + panel * kPanelRows + r] = c[t * kPanelRows + r];
  });
  return result;
}

struct PyMemoryReader {
  std::shared_ptr<Runtime> runtime;
  MemoryReader reader;
  PyMemoryReader(std::shared_ptr<Runtime> rt, size_t num_bytes) : runtime(rt), reader(*rt->kernels, rt->pool, num_bytes) {}
};

std::shared_ptr<PyMemoryReader> make_memory_reader(std::shared_ptr<Runtime> rt, size_t num_bytes) {
  require(num_bytes >= 1 && num_bytes <= (size_t)1 << 40, "num_bytes must be 1 to 2^40");
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(rt->in_use);
  return std::make_shared<PyMemoryReader>(rt, num_bytes);
}

// Keeps alive what the program points into, and checks every step before it runs.
struct PyProgram {
  std::shared_ptr<Runtime> runtime;
  Program program;
  std::vector<Bytes> tables;
  std::vector<std::shared_ptr<Matrix>> unread;  // matrices that may still be on their way: none once a step has run
  PyProgram(std::shared_ptr<Runtime> rt, int max_tokens) : runtime(rt), program(*rt->kernels, rt->pool, max_tokens) {}

  void check(const Step& s) const {
    for (int t = 0; t < s.num_tokens; ++t) {
      require(!program.vocab() || (s.token_ids[t] >= -s.num_embeddings && s.token_ids[t] < program.vocab()),
              "token id outside the vocabulary and the embeddings given");
      for (int axis = 0; axis < 3; ++axis) require(s.positions[axis * s.num_tokens + t] >= 0, "negative position");
    }
    for (int i = 0; i < s.num_logits; ++i)
      require(s.logits_rows[i] >= 0 && s.logits_rows[i] < s.num_tokens, "logits row outside the step");
    if (!program.cache()) return;
    const int blocks = program.cache()->num_blocks();
    for (int t = 0; t < s.num_tokens; ++t)
      require(s.slot_mapping[t] >= 0 && s.slot_mapping[t] / kKvBlock < blocks, "slot outside the KV cache");
    require(s.cu_seqlens_q[0] == 0 && s.cu_seqlens_q[s.num_seqs] == s.num_tokens, "cu_seqlens_q must span all tokens");
    for (int i = 0; i < s.num_seqs; ++i) {
      const int n = s.cu_seqlens_q[i + 1] - s.cu_seqlens_q[i], used = (s.context_lens[i] + kKvBlock - 1) / kKvBlock;
      require(n >= 0 && s.context_lens[i] >= n && used <= s.max_blocks, "context_lens do not fit the block tables");
      for (int b = 0; b < used; ++b) {
        const int id = s.block_tables[(size_t)i * (size_t)s.max_blocks + (size_t)b];
        require(id >= 0 && id < blocks, "block id outside the KV cache");
      }
      for (int t = s.cu_seqlens_q[i], last = 1; s.limits && t < s.cu_seqlens_q[i + 1]; last = s.limits[t++])
        require(s.limits[t] >= last && s.limits[t] <= s.context_lens[i], "limits must not fall and stay within context_lens");
    }
  }

  // The arrays a started step reads, kept until the next one.
  struct Inputs {
    Ints token_ids, slots, cu, context, logits;
    Ints2 positions, tables;
    std::optional<Ints> limits;
    std::optional<Floats2> embeddings;
  };
  std::optional<Inputs> inputs;

  void start(Ints token_ids, Ints2 positions, Ints slots, Ints cu, Ints context, Ints2 tables_, Ints logits,
             std::optional<Ints> limits, std::optional<Floats2> embeddings) {
    Step s;
    s.num_tokens = (int)token_ids.size();
    s.num_seqs = (int)context.size();
    s.max_blocks = (int)tables_.shape(1);
    s.num_logits = (int)logits.size();
    require(s.num_tokens >= 1 && s.num_tokens <= program.max_tokens(), "a step takes 1 to max_tokens tokens");
    require(positions.shape(0) == 3 && (int)positions.shape(1) == s.num_tokens, "positions must be [3, T]");
    require((int)slots.size() == s.num_tokens, "slot_mapping must be [T]");
    require((int)cu.size() == s.num_seqs + 1 && (int)tables_.shape(0) == s.num_seqs, "cu_seqlens_q must be [S + 1], block_tables [S, n]");
    require(s.num_logits <= s.num_tokens, "more logits rows than tokens");
    s.token_ids = token_ids.data();
    s.positions = positions.data();
    s.slot_mapping = slots.data();
    s.cu_seqlens_q = cu.data();
    s.context_lens = context.data();
    s.block_tables = tables_.data();
    s.logits_rows = logits.data();
    if (limits) {
      require((int)limits->size() == s.num_tokens, "limits must be [T]");
      s.limits = limits->data();
    }
    if (embeddings) {
      require((int)embeddings->shape(1) == program.embedding_width(), "embeddings must be as wide as the model");
      s.embeddings = embeddings->data();
      s.num_embeddings = (int)embeddings->shape(0);
    }
    check(s);
    reading([&] {
      for (const auto& matrix : unread) matrix->wait();
    });
    unread.clear();
    inputs.emplace(Inputs{token_ids, slots, cu, context, logits, positions, tables_, limits, embeddings});
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(runtime->in_use);
    program.start(std::move(s));
  }

  bool advance(double seconds) {
    require(inputs.has_value(), "no step was started");
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(runtime->in_use);
    return program.advance(seconds);
  }

  nb::ndarray<nb::numpy, float> result(int rows) {
    require(program.result_width() > 0, "the program has no result");
    const size_t dims[2] = {(size_t)rows, (size_t)program.result_width()};
    return nb::ndarray<nb::numpy, float>((void*)program.result_rows(), 2, dims, nb::find(this));
  }

  nb::ndarray<nb::numpy, float> run(Ints token_ids, Ints2 positions, Ints slots, Ints cu, Ints context, Ints2 tables_, Ints logits,
                                    std::optional<Ints> limits, std::optional<Floats2> embeddings) {
    start(token_ids, positions, slots, cu, context, tables_, logits, limits, embeddings);
    advance(INFINITY);
    return result((int)inputs->logits.size());
  }

  nb::ndarray<nb::numpy, float> view(int i) {
    const Buffer& b = program.buffer_at(i);
    const size_t dims[2] = {(size_t)program.max_tokens(), (size_t)b.width};
    const int64_t strides[2] = {b.stride, 1};
    return nb::ndarray<nb::numpy, float>((void*)b.row(0), 2, dims, nb::find(this), strides);
  }
};

RopeConfig to_rope(int head_dim, int rotary_dim, bool interleaved, std::tuple<int, int, int> sections, Floats inv_freq) {
  return {head_dim, rotary_dim, interleaved, {std::get<0>(sections), std::get<1>(sections), std::get<2>(sections)},
          std::vector<float>(inv_freq.data(), inv_freq.data() + inv_freq.size())};
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "CPU kernels of autoglm. Shapes and arithmetic: native/kernels.h and native/program.h.";

  nb::class_<Runtime>(m, "Runtime", "A kernel table and a thread pool.")
      .def(nb::new_(&make_runtime), "num_threads"_a, "isa"_a = "", "slow_page_s"_a = Pages::kSlow,
           "slow_page_s: once the system took longer to hand out 2 MB, weights come in pages of 4 kB until collapse().")
      .def_prop_ro("isa", [](const Runtime& r) { return std::string(r.kernels->name); })
      .def_prop_ro("num_threads", [](const Runtime& r) { return r.pool.size(); })
      .def("collapse", [](Runtime& r) { return r.slabs.collapse(); }, nb::call_guard<nb::gil_scoped_release>(),
           "Move the next 2 MB of weights that lie in small pages into a huge one; false once there are none. From one thread.");

  nb::class_<Matrix>(m, "Matrix", "A weight matrix [rows, cols] repacked for the kernels.")
      .def_static("pack", &pack, "runtime"_a, "data"_a.noconvert(), "type_id"_a, "rows"_a, "cols"_a)
      .def_prop_ro("type_id", [](const Matrix& x) { return (int)x.view().type; })
      .def_prop_ro("rows", [](const Matrix& x) { return x.view().rows; })
      .def_prop_ro("cols", [](const Matrix& x) { return x.view().cols; })
      .def_prop_ro("nbytes", &Matrix::nbytes);

  nb::class_<PyWeightLoader>(m, "WeightLoader", "Reads and repacks the matrices of one open file while the caller goes on.")
      .def(nb::init<std::shared_ptr<Runtime>, int>(), "runtime"_a, "fd"_a)
      .def("read", &PyWeightLoader::read, "offset"_a, "type_id"_a, "rows"_a, "cols"_a, "in_floats"_a = false,
           "The matrix at the offset, in_floats unpacked to F32. Its contents come later; what computes with it waits for them.")
      .def("wait", [](PyWeightLoader& l, double seconds) { 
        require(seconds >= 0 && seconds <= 3600, "wait for 0 to 3600 seconds");
        return reading([&] { return l.loader.wait(seconds); });
       }, "seconds"_a,
           "Wait for at most so long; whether all is read. Raises EOFError if the file ends too early, OSError if it cannot be read.")
      .def("stop", [](PyWeightLoader& l) { l.loader.stop(); }, nb::call_guard<nb::gil_scoped_release>(),
           "Give up what has not begun, and wait for the matrix that is being read.")
      .def_prop_ro("done_bytes", [](const PyWeightLoader& l) { return l.loader.done_bytes(); });

  nb::class_<KvCache>(m, "KvCache", "The paged keys and values of all layers.")
      .def("__init__", [](KvCache* self, int layers, int blocks, int kv_heads, int head_dim, const std::string& k, const std::string& v) {
        require(layers >= 1 && blocks >= 1 && kv_heads >= 1 && head_dim >= 1, "KV cache sizes must be positive");
        new (self) KvCache(layers, blocks, kv_heads, head_dim, to_kv(k), to_kv(v));
      }, "num_layers"_a, "num_blocks"_a, "num_kv_heads"_a, "head_dim"_a, "type_k"_a, "type_v"_a)
      .def_static("block_bytes", [](int kv_heads, int head_dim, const std::string& k, const std::string& v) {
        return KvCache::block_bytes(kv_heads, head_dim, to_kv(k), to_kv(v));
      }, "num_kv_heads"_a, "head_dim"_a, "type_k"_a, "type_v"_a)
      .def("fill", &KvCache::fill, "Overwrite all keys and values with one small number, so that reads of them can be timed.")
      .def_prop_ro("nbytes", &KvCache::nbytes);

  nb::class_<OpProfile>(m, "OpProfile", "What one operation of a program took, and how much of it there was to do.")
      .def_ro("name", &OpProfile::name)
      .def_ro("rows", &OpProfile::rows, "Of its weights; 0 where it has none.")
      .def_ro("cols", &OpProfile::cols)
      .def_ro("types", &OpProfile::types, "Type ids of its weights, each once.")
      .def_ro("calls", &OpProfile::calls)
      .def_ro("seconds", &OpProfile::seconds, "Wall time.")
      .def_ro("busy_s", &OpProfile::busy_s, "Time at work, summed over the threads.")
      .def_prop_ro("bytes", [](const OpProfile& p) { return p.work.bytes; }, "Of packed weights, table rows, keys and values read.")
      .def_prop_ro("int8_macs", [](const OpProfile& p) { return p.work.int8_macs; })
      .def_prop_ro("int16_macs", [](const OpProfile& p) { return p.work.int16_macs; })
      .def_prop_ro("float_macs", [](const OpProfile& p) { return p.work.float_macs; });

  nb::class_<MachineLimits>(m, "MachineLimits", "What all threads of a runtime reach together at best.")
      .def_ro("read_bytes_per_s", &MachineLimits::read_bytes_per_s)
      .def_ro("int8_macs_per_s", &MachineLimits::int8_macs_per_s)
      .def_ro("int16_macs_per_s", &MachineLimits::int16_macs_per_s)
      .def_ro("float_macs_per_s", &MachineLimits::float_macs_per_s);

  nb::class_<PyMemoryReader>(m, "MemoryReader", "Memory held to be read again and again by all threads of a runtime.")
      .def(nb::new_(&make_memory_reader), "runtime"_a, "num_bytes"_a, "num_bytes: several times what the last cache holds.")
      .def("bytes_per_s", [](PyMemoryReader& r, double seconds) {
        nb::gil_scoped_release release;
        std::lock_guard<std::mutex> lock(r.runtime->in_use);
        return r.reader.bytes_per_s(seconds);
      }, "seconds"_a, "The fastest eighth of what is read in about so many seconds.");

  nb::class_<PyProgram>(m, "Program", "A network as a list of operations over named buffers.")
      .def(nb::init<std::shared_ptr<Runtime>, int>(), "runtime"_a, "max_tokens"_a)
      .def("buffer", [](PyProgram& p, int width) { return p.program.buffer(width); }, "width"_a)
      .def("activation", [](PyProgram& p, int width) { return p.program.activation(width); }, "width"_a)
      .def("embed", [](PyProgram& p, Bytes table, int type_id, int vocab, int width, int out) {
        const QuantType type = to_type(type_id);
        require(vocab > 0 && width > 0 && table.size() == row_bytes(type, width) * (size_t)vocab, "embedding table size");
        p.program.embed(type, table.data(), vocab, width, out);
        p.tables.push_back(table);
      }, "table"_a.noconvert(), "type_id"_a, "vocab"_a, "width"_a, "out"_a)
      .def("norm", [](PyProgram& p, int x, int act, Floats weight, float eps, std::optional<int> branch, std::optional<Floats> post) {
        p.program.norm(x, branch.value_or(-1), to_vector(post), to_vector(weight), eps, act);
      }, "x"_a, "act"_a, "weight"_a.noconvert(), "eps"_a, "branch"_a = nb::none(), "post_weight"_a = nb::none())
      .def("layer_norm", [](PyProgram& p, int x, int act, Floats weight, Floats bias, float eps, std::optional<int> branch) {
        p.program.layer_norm(x, branch.value_or(-1), to_vector(weight), to_vector(bias), eps, act);
      }, "x"_a, "act"_a, "weight"_a.noconvert(), "bias"_a.noconvert(), "eps"_a, "branch"_a = nb::none())
      .def("normalize", [](PyProgram& p, int x, int out, Floats weight, float eps, std::optional<Floats> bias) {
        p.program.normalize(x, to_vector(weight), to_vector(bias), eps, out);
      }, "x"_a, "out"_a, "weight"_a.noconvert(), "eps"_a, "bias"_a = nb::none())
      .def("quantize", [](PyProgram& p, int x, int act, bool gelu) {
        p.program.quantize(x, act, gelu ? Program::Unary::Gelu : Program::Unary::None);
      }, "x"_a, "act"_a, "gelu"_a = false)
      .def("linear", [](PyProgram& p, int act, std::vector<std::shared_ptr<Matrix>> matrices, int out,
                        std::vector<std::optional<Floats>> biases, bool accumulate, float scale, std::string name) {
        std::vector<Program::Part> parts;
        int column = 0;
        for (size_t i = 0; i < matrices.size(); ++i) {
          parts.push_back({matrices[i], i < biases.size() ? to_vector(biases[i]) : std::vector<float>(), column});
          column += matrices[i]->view().rows;
          p.unread.push_back(matrices[i]);
        }
        p.program.linear(act, std::move(parts), out, accumulate, scale, std::move(name));
      }, "act"_a, "matrices"_a, "out"_a, "biases"_a = std::vector<std::optional<Floats>>(),
           "accumulate"_a = false, "scale"_a = 1.0f, "name"_a = "linear")
      .def("gated_mlp", [](PyProgram& p, int act, std::shared_ptr<Matrix> gate, std::shared_ptr<Matrix> up, int result) {
        p.program.gated_mlp(act, gate, up, result);
        p.unread.insert(p.unread.end(), {gate, up});
      }, "act"_a, "gate"_a, "up"_a, "result"_a)
      .def("set_attention", [](PyProgram& p, std::shared_ptr<KvCache> cache, int num_heads, int rotary_dim, bool interleaved,
                               std::tuple<int, int, int> sections, int head_dim, Floats inv_freq) {
        p.program.set_attention(to_rope(head_dim, rotary_dim, interleaved, sections, inv_freq), cache, num_heads);
      }, "cache"_a, "num_heads"_a, "rotary_dim"_a, "interleaved"_a, "sections"_a, "head_dim"_a, "inv_freq"_a.noconvert())
      .def("rope_cache", [](PyProgram& p, int rows, int layer) { p.program.rope_cache(rows, layer); }, "rows"_a, "layer"_a,
           "Rows [q | k | v], or [k | v]: q and k are rotated, q scaled, k and v written into the cache.")
      .def("rope_queries", [](PyProgram& p, int q) { p.program.rope_queries(q); }, "q"_a,
           "Queries alone, rotated and scaled; after gather those of the rows gathered.")
      .def("attention", [](PyProgram& p, int q, int layer, int out) { p.program.attention(q, layer, out); },
           "q"_a, "layer"_a, "out"_a, "Rows that begin with rotated queries; after gather those of the rows gathered.")
      .def("set_full_attention", [](PyProgram& p, int num_heads, int rotary_dim, bool interleaved,
                                    std::tuple<int, int, int> sections, int head_dim, Floats inv_freq) {
        p.program.set_full_attention(to_rope(head_dim, rotary_dim, interleaved, sections, inv_freq), num_heads);
      }, "num_heads"_a, "rotary_dim"_a, "interleaved"_a, "sections"_a, "head_dim"_a, "inv_freq"_a.noconvert())
      .def_static("full_attention_bytes", &Program::full_attention_bytes, "num_rows"_a, "num_heads"_a, "head_dim"_a,
                  "Bytes of what set_full_attention allocates.")
      .def("full_attention", [](PyProgram& p, int qkv, int out) { p.program.full_attention(qkv, out); }, "qkv"_a, "out"_a)
      .def("gather", [](PyProgram& p, int x, int out) { p.program.gather(x, out); }, "x"_a, "out"_a)
      .def("result", [](PyProgram& p, int x) { p.program.result(x); }, "x"_a)
      .def("populate_in_background", [](PyProgram& p, int tokens) { p.program.populate_in_background(tokens); }, "tokens"_a,
           "Have the system hand out the memory of a first step of so many tokens while the caller goes on; once.")
      .def("run", &PyProgram::run, "token_ids"_a.noconvert(), "positions"_a.noconvert(), "slot_mapping"_a.noconvert(),
           "cu_seqlens_q"_a.noconvert(), "context_lens"_a.noconvert(), "block_tables"_a.noconvert(), "logits_rows"_a.noconvert(),
           "limits"_a.noconvert() = nb::none(), "embeddings"_a.noconvert() = nb::none())
      .def("start", &PyProgram::start, "token_ids"_a.noconvert(), "positions"_a.noconvert(), "slot_mapping"_a.noconvert(),
           "cu_seqlens_q"_a.noconvert(), "context_lens"_a.noconvert(), "block_tables"_a.noconvert(), "logits_rows"_a.noconvert(),
           "limits"_a.noconvert() = nb::none(), "embeddings"_a.noconvert() = nb::none())
      .def("advance", &PyProgram::advance, "seconds"_a, "Go on with the started step for about so long; whether it is done.")
      .def("result_rows", [](PyProgram& p) { return p.result(p.program.max_tokens()); },
           "Where a step that is done has its rows, the first of f32 [max_tokens, width], until the next start: shared memory.")
      .def("set_profiling", [](PyProgram& p, bool on) { p.program.set_profiling(on); }, "on"_a)
      .def("profile", [](const PyProgram& p) { return p.program.profile(); },
           "One entry an operation, in order, summed since profiling was switched on; the first, 'plan', is start().")
      .def("view", &PyProgram::view, "buffer"_a, "The buffer as f32 [max_tokens, width], shared memory.")
      .def_prop_ro("nbytes", [](const PyProgram& p) { return p.program.nbytes(); });

  nb::class_<Vocabulary>(m, "Vocabulary", "A byte-level BPE vocabulary. Strings are given as string_offsets found them.")
      .def("__init__", [](Vocabulary* self, nb::bytes tokens, Offsets offsets, nb::bytes is_hidden, bool ignore_merges) {
        const Strings strings = to_strings(tokens, offsets);
        require(is_hidden.size() == strings.count, "is_hidden must hold a byte a token");
        nb::gil_scoped_release release;
        new (self) Vocabulary(strings, (const uint8_t*)is_hidden.c_str(), ignore_merges);
      }, "tokens"_a, "offsets"_a.noconvert(), "is_hidden"_a, "ignore_merges"_a)
      .def("add_merges", [](Vocabulary& v, nb::bytes merges, Offsets offsets) {
        const Strings strings = to_strings(merges, offsets);
        nb::gil_scoped_release release;
        return v.add_merges(strings);
      }, "merges"_a, "offsets"_a.noconvert(), "How many are two tokens that make a third, before the first that is not.")
      .def("encode", [](const Vocabulary& v, nb::str pieces) {
        Py_ssize_t size = 0;
        const char* text = PyUnicode_AsUTF8AndSize(pieces.ptr(), &size);
        if (!text) throw nb::python_error();
        nb::gil_scoped_release release;
        return v.encode(std::string_view(text, (size_t)size));
      }, "pieces"_a, "Token ids of pieces in GPT-2's byte alphabet, with spaces between.")
      .def("token_bytes", [](const Vocabulary& v, size_t id) {
        require(id < v.size(), "token id outside the vocabulary");
        const std::string bytes = v.bytes(id);
        return nb::bytes(bytes.data(), bytes.size());
      }, "token_id"_a, "What a token stands for.")
      .def_prop_ro("longest_bytes", &Vocabulary::longest_bytes);

  m.def("string_offsets", &offsets_of_strings, "buffer"_a.noconvert(), "first"_a, "end"_a, "count"_a,
        "Where the strings of a GGUF array at `first` begin, u32 [count + 1] from there; fewer before the first bad one.");
  m.def("ask_for_files", &ask_for_files, "paths"_a, "Have the system read whole files into its page cache, while the caller goes on.");
  m.def("matmul", &matmul, "runtime"_a, "matrix"_a, "x"_a.noconvert(), "x [T, cols] @ matrix.T with the engine's own arithmetic -> f32 [T, rows].");
  m.def("dequantize", [](Bytes data, int type_id, int64_t num_elements) {
    const QuantType type = to_type(type_id);
    require(num_elements >= 0 && num_elements % block_elements(type) == 0, "num_elements is not a whole number of blocks");
    require(data.size() == (size_t)(num_elements / block_elements(type)) * block_bytes(type), "data does not hold num_elements");
    auto result = make_array({(size_t)num_elements});
    dequantize(type, data.data(), (size_t)num_elements, (float*)result.data());
    return result;
  }, "data"_a.noconvert(), "type_id"_a, "num_elements"_a);
  m.def("quantize", &quantize_rows, "runtime"_a, "x"_a.noconvert(), "type_id"_a,
        "Rows of finite weights [rows, cols] as Q8_0, Q5_0, Q4_K or Q6_K blocks, u8 [rows * row bytes].");
  m.def("measure_limits", [](Runtime& rt, size_t read_bytes, double seconds) {
    require(read_bytes >= 1 && read_bytes <= (size_t)1 << 40, "read_bytes must be 1 to 2^40");
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(rt.in_use);
    return measure_limits(*rt.kernels, rt.pool, read_bytes, seconds);
  }, "runtime"_a, "read_bytes"_a, "seconds"_a,
        "Memory read and multiply-adds a second with the runtime's kernels, about `seconds` for each. read_bytes: more than the last cache holds.");
  m.def("argmax", [](Runtime& rt, Floats x) { return rt.kernels->argmax(x.data(), (int)x.size()); }, "runtime"_a, "x"_a.noconvert(),
        "Index of the largest value, the lowest among equals; -1 if there is a NaN or infinity.");
}
