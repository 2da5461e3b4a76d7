// flow_file.hpp: reads the flows that lfq saves. The format is safetensors: 8 bytes of little-endian header length, a
// JSON header, raw little-endian data; an lfq flow holds one tensor "weights" of doubles and, in the header's
// __metadata__, "lfq_flow", the JSON of its structure. Nothing in the file is trusted.
#pragma once
#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>

#include "lfq/layers.hpp"
#include "lfq/lfq.hpp"

namespace lfq {

// The file is not what the reader expects; what() names it and says why.
class file_error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {

// A JSON value: just enough to read what lfq writes, at most 16 deep.
struct json {
  enum kind_t { null, boolean, number, string, array, object } kind = null;
  bool truth = false;
  double value = 0;
  std::string text;
  std::vector<json> items;
  std::map<std::string, json> members;

  static json parse(const std::string& s) {
    reader r{s.data(), s.data() + s.size()};
    json v = r.value(0);
    r.space();
    if (r.at != r.end) throw file_error("text after the JSON value");
    return v;
  }
  // Null where there is none.
  const json* find(const std::string& key) const {
    const auto found = members.find(key);
    return found == members.end() ? nullptr : &found->second;
  }
  const json& operator[](const std::string& key) const {
    const json* found = find(key);
    if (!found) throw file_error("\"" + key + "\" is missing");
    return *found;
  }
  int64_t integer(int64_t least, int64_t most, const char* what) const {
    if (kind != number || value < double(least) || value > double(most) || value != std::floor(value))
      throw file_error(std::string(what) + " must be an integer from " + std::to_string(least) + " to " + std::to_string(most));
    return int64_t(value);
  }
  const std::string& word(const char* what) const {
    if (kind != string) throw file_error(std::string(what) + " must be a string");
    return text;
  }
  // Which of the words this is, from 0.
  int32_t one_of(std::initializer_list<const char*> words, const char* what) const {
    const std::string& given = word(what);
    const auto found = std::find(words.begin(), words.end(), given);
    if (found == words.end()) throw file_error("unknown " + std::string(what) + " " + given);
    return int32_t(found - words.begin());
  }
  bool flag(const char* what) const {
    if (kind != boolean) throw file_error(std::string(what) + " must be true or false");
    return truth;
  }

 private:
  struct reader {
    const char *at, *end;
    [[noreturn]] static void fail() { throw file_error("not JSON"); }
    void space() {
      while (at != end && (*at == ' ' || *at == '\n' || *at == '\r' || *at == '\t')) ++at;
    }
    char next() {
      if (at == end) fail();
      return *at++;
    }
    bool take(char c) {
      space();
      if (at == end || *at != c) return false;
      ++at;
      return true;
    }
    void literal(const char* word) {
      for (; *word; ++word)
        if (next() != *word) fail();
    }
    json value(int depth) {
      if (depth > 16) throw file_error("JSON nested too deeply");
      space();
      if (at == end) fail();
      json v;
      switch (*at) {
        case '{':
          ++at;
          v.kind = object;
          if (take('}')) return v;
          do {
            space();
            std::string key = quoted();
            if (!take(':')) fail();
            if (!v.members.emplace(std::move(key), value(depth + 1)).second) throw file_error("a key occurs twice");
          } while (take(','));
          if (!take('}')) fail();
          return v;
        case '[':
          ++at;
          v.kind = array;
          if (take(']')) return v;
          do v.items.push_back(value(depth + 1));
          while (take(','));
          if (!take(']')) fail();
          return v;
        case '"':
          v.kind = string;
          v.text = quoted();
          return v;
        case 't':
        case 'f':
          v.kind = boolean;
          v.truth = *at == 't';
          literal(v.truth ? "true" : "false");
          return v;
        case 'n':
          literal("null");
          return v;
        default: {
          std::string digits;
          while (at != end && *at && std::strchr("+-0123456789.eE", *at) && digits.size() < 40) digits += *at++;
          char* stop = nullptr;
          v.kind = number;
          v.value = std::strtod(digits.c_str(), &stop);
          if (digits.empty() || stop != digits.c_str() + digits.size()) fail();
          return v;
        }
      }
    }
    unsigned hex4() {
      unsigned u = 0;
      for (int i = 0; i < 4; ++i) {
        const char c = next();
        const char* digits = "0123456789abcdef";
        const char* d = std::strchr(digits, c | 0x20);
        if (!d || !((c >= '0' && c <= '9') || (c | 0x20) >= 'a')) fail();
        u = 16 * u + unsigned(d - digits);
      }
      return u;
    }
    std::string quoted() {
      if (next() != '"') fail();
      std::string s;
      for (char c; (c = next()) != '"';) {
        if (c != '\\') {
          s += c;
          continue;
        }
        switch (c = next()) {
          case 'b': s += '\b'; break;
          case 'f': s += '\f'; break;
          case 'n': s += '\n'; break;
          case 'r': s += '\r'; break;
          case 't': s += '\t'; break;
          case 'u': {  // a code unit; lfq writes none beyond ASCII, so surrogates need no care
            const unsigned u = hex4();
            if (u < 0x80) {
              s += char(u);
            } else if (u < 0x800) {
              s += char(0xc0 | u >> 6);
              s += char(0x80 | (u & 63));
            } else {
              s += char(0xe0 | u >> 12);
              s += char(0x80 | (u >> 6 & 63));
              s += char(0x80 | (u & 63));
            }
            break;
          }
          case '"':
          case '\\':
          case '/': s += c; break;
          default: fail();
        }
      }
      return s;
    }
  };
};

inline lfq_layer layer_on(const std::vector<int32_t>& extent, int32_t kind) {
  lfq_layer l{};
  l.kind = kind;
  l.ndim = int32_t(extent.size());
  for (size_t i = 0; i < extent.size(); ++i) l.extent[i] = extent[i];
  return l;
}

// The sublattices that letters of an order stand for: c those of even coordinates, e the other even ones, o the odd ones.
inline int32_t sublattices_of(const std::string& letters, int ndim) {
  int32_t found = 0;
  for (int s = 0; s < 1 << ndim; ++s) {
    const int n_odd = lfq::count_bits(unsigned(s));
    const char letter = n_odd == 0 ? 'c' : n_odd % 2 ? 'o' : 'e';
    if (letters.find(letter) != std::string::npos) found |= int32_t(1) << s;
  }
  return found;
}
// The couplings of an order like "ce|o o|ce", where `coupling` has all else.
inline std::vector<lfq_layer> couplings_of(const std::string& order, lfq_layer coupling) {
  std::vector<lfq_layer> made;
  std::istringstream words(order);
  for (std::string word; words >> word;) {
    const size_t bar = word.find('|');
    if (bar == std::string::npos || word.find_first_not_of("ceo|") != std::string::npos) throw file_error("no order of couplings: " + order);
    coupling.active = sublattices_of(word.substr(0, bar), coupling.ndim);
    coupling.frozen = sublattices_of(word.substr(bar + 1), coupling.ndim);
    coupling.parity = word[0] == 'o';
    if (unsigned(coupling.active) == lfq::sublattices_of_parity(coupling.ndim, coupling.parity) &&
        unsigned(coupling.frozen) == lfq::sublattices_of_parity(coupling.ndim, !coupling.parity))
      coupling.active = coupling.frozen = 0;
    made.push_back(coupling);
  }
  if (made.empty()) throw file_error("an order without couplings");
  return made;
}

// The couplings of a structure, n_blocks of them one behind the other on a lattice.
inline std::vector<lfq_layer> blocks_on(const std::vector<int32_t>& extent, const json& structure, int32_t activation, bool bias,
                                        bool rescale) {
  lfq_layer coupling = layer_on(extent, LFQ_LAYER_COUPLING);
  coupling.kernel_size = int32_t(structure["kernel_size"].integer(3, 9, "kernel_size"));
  const json& hidden = structure["hidden"];
  if (hidden.kind != json::array || hidden.items.size() > LFQ_MAX_HIDDEN) throw file_error("hidden must be a list of at most 4");
  coupling.n_hidden = int32_t(hidden.items.size());
  for (size_t i = 0; i < hidden.items.size(); ++i)
    coupling.hidden[i] = int32_t(hidden.items[i].integer(1, LFQ_MAX_CHANNELS, "hidden"));
  coupling.activation = activation;
  coupling.bias = bias;
  coupling.scale = structure["scale"].one_of({"exp(-|s|)", "exp(s)", "even", "site"}, "scale");  // as in lfq_scale
  // Written only where they are set, and as null.
  const json *features = structure.find("features"), *sublattices = structure.find("sublattices");
  if (features && features->kind != json::null)
    coupling.n_features = int32_t(features->integer(1, LFQ_MAX_FEATURES, "features"));
  coupling.sublattices = sublattices && sublattices->flag("sublattices");
  const json* const order = structure.find("order");
  std::vector<lfq_layer> block = couplings_of(order ? order->word("order") : "ce|o o|ce", coupling), made;
  if (rescale) block.push_back(layer_on(extent, LFQ_LAYER_RESCALE));
  for (int64_t n = structure["n_blocks"].integer(1, 10000, "n_blocks"); n > 0; --n)
    made.insert(made.end(), block.begin(), block.end());
  return made;
}

// Puts the layers of a structure in front of `layers`; on return `extent` is the lattice that the first one reads.
inline void prepend_layers(const json& structure, std::vector<int32_t>& extent, std::vector<lfq_layer>& layers, int depth = 0) {
  const auto prepend = [&](const std::vector<lfq_layer>& made) {
    layers.insert(layers.begin(), made.begin(), made.end());
    if (layers.size() > 65536) throw file_error("more than 65536 layers");
  };
  const auto prepend_enlarging = [&](int32_t kind) {
    prepend({layer_on(extent, kind)});
    for (int32_t& n : extent) {
      if (n % 2) throw file_error("an extent of " + std::to_string(n) + " cannot be halved");
      n /= 2;
    }
  };
  const std::string& kind = structure["kind"].word("kind");
  if (kind == "compose") {
    const json& parts = structure["flows"];
    if (parts.kind != json::array || depth > 8) throw file_error("flows must be a list, at most 8 deep");
    for (auto part = parts.items.rbegin(); part != parts.items.rend(); ++part) prepend_layers(*part, extent, layers, depth + 1);
    return;
  }
  const int64_t ndim = structure["ndim"].integer(1, LFQ_MAX_DIM, "ndim");
  if (ndim != int64_t(extent.size()))
    throw file_error("the flow has " + std::to_string(ndim) + " axes, the lattice " + std::to_string(extent.size()));
  if (kind == "interleave") {
    prepend_enlarging(LFQ_LAYER_INTERLEAVE);
  } else if (kind == "upsample") {
    prepend_enlarging(LFQ_LAYER_UPSAMPLE);
  } else if (kind == "affine") {
    const int32_t activation = structure["activation"].one_of({"tanh", "leaky_relu"}, "activation");  // as in lfq_activation
    prepend(blocks_on(extent, structure, activation, structure["bias"].flag("bias"), structure["rescale"].flag("rescale")));
  } else if (kind == "multiscale") {
    const json* const said = structure.find("interpolate");  // not by files that know nothing else
    const bool interpolate = !said || said->flag("interpolate");
    for (int64_t level = structure["n_levels"].integer(1, 16, "n_levels"); level > 0; --level) {
      // A site map has a scale of its own.
      prepend(blocks_on(extent, structure, LFQ_TANH, false, structure["scale"].word("scale") != "site"));
      prepend_enlarging(interpolate ? LFQ_LAYER_UPSAMPLE : LFQ_LAYER_INTERLEAVE);
    }
  } else {
    throw file_error("unknown kind of flow " + kind);
  }
}

}  // namespace detail

// The flow of a file for fields of this lattice. Throws file_error where the file is damaged, is no flow, or its flow has
// no form on the lattice.
inline flow load_flow(const std::string& path, const std::vector<int32_t>& extent) {
  using detail::json;
  constexpr uint64_t max_header = 1 << 20, max_bytes = uint64_t(1) << 31;
  try {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (!file) throw file_error(std::strerror(errno));
    const uint64_t size = uint64_t(file.tellg());
    file.seekg(0);
    unsigned char prefix[8];
    if (size < 8 || !file.read(reinterpret_cast<char*>(prefix), 8)) throw file_error("too short for a header length");
    uint64_t length = 0;
    for (int i = 7; i >= 0; --i) length = length << 8 | prefix[i];
    if (length > max_header || 8 + length > size) throw file_error("the header is longer than the file or than 1 MiB");
    if (size > max_bytes) throw file_error("more than 2 GiB");
    std::string header(size_t(length), '\0');
    const uint64_t n_bytes = size - 8 - length;
    if (n_bytes % 8) throw file_error("the data are not a whole number of doubles");
    std::vector<double> weights(size_t(n_bytes / 8));
    file.read(&header[0], std::streamsize(length));
    for (double& w : weights) {
      unsigned char bytes[8];
      if (!file.read(reinterpret_cast<char*>(bytes), 8)) throw file_error("cannot be read to its end");
      uint64_t bits = 0;
      for (int i = 7; i >= 0; --i) bits = bits << 8 | bytes[i];
      std::memcpy(&w, &bits, 8);
    }
    const json head = json::parse(header);
    const json& entry = head["weights"];
    const json &shape = entry["shape"], &offsets = entry["data_offsets"];
    if (head.members.size() != 2 || entry["dtype"].word("dtype") != "F64" || shape.items.size() != 1 || offsets.items.size() != 2 ||
        uint64_t(shape.items[0].integer(0, int64_t(max_bytes), "shape")) != weights.size() ||
        offsets.items[0].integer(0, int64_t(max_bytes), "data_offsets") != 0 ||
        uint64_t(offsets.items[1].integer(0, int64_t(max_bytes), "data_offsets")) != n_bytes)
      throw file_error("not one vector of doubles that fills the file");
    std::vector<int32_t> reads = extent;
    std::vector<lfq_layer> layers;
    detail::prepend_layers(json::parse(head["__metadata__"]["lfq_flow"].word("lfq_flow")), reads, layers);
    int64_t volume = 1, offset = 0;
    for (int32_t n : extent) volume *= n;
    for (lfq_layer& l : layers) {
      l.weight_offset = offset;
      offset += lfq_layer_n_weights(&l);
    }
    return flow(std::move(layers), std::move(weights), volume);
  } catch (const std::runtime_error& e) {
    throw file_error(path + ": not an lfq flow on this lattice: " + e.what());
  }
}

}  // namespace lfq
