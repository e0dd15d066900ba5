// Hash tables with open addressing, at most half full; the queue of merges of one piece.
#include "vocabulary.h"

#include <array>
#include <cstring>
#include <queue>
#include <random>

namespace autoglm {
namespace {

constexpr uint64_t kNoPair = ~(uint64_t)0;

// Both halves of the product, so that every bit of it depends on the secret factor.
uint64_t fold(uint64_t a, uint64_t b) {
  const unsigned __int128 product = (unsigned __int128)a * b;
  return (uint64_t)product ^ (uint64_t)(product >> 64);
}

uint64_t pair_of(int32_t left, int32_t right) { return (uint64_t)(uint32_t)left << 32 | (uint32_t)right; }

size_t slots_for(size_t count) {
  size_t slots = 16;
  while (slots < 2 * count) slots *= 2;
  return slots;
}

// Bytes of the character that begins at text[0], from its first byte alone.
size_t character_bytes(std::string_view text) {
  const uint8_t lead = (uint8_t)text[0];
  const size_t size = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  return size < text.size() ? size : text.size();
}

// The Unicode Standard, table 3-7.
bool is_utf8(const uint8_t* p, const uint8_t* end) {
  while (p < end) {
    const uint8_t lead = *p++;
    if (lead < 0x80) continue;
    if (lead < 0xC2 || lead > 0xF4) return false;
    const int more = lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
    if (end - p < more) return false;
    const uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    if (p[0] < low || p[0] > high) return false;
    for (int i = 1; i < more; ++i)
      if ((p[i] & 0xC0) != 0x80) return false;
    p += more;
  }
  return true;
}

// GPT-2's table: printable bytes stand for themselves, the rest from U+0100 up. Character -> byte, -1 for no byte.
const std::array<int16_t, 0x144>& byte_of_character() {
  static const std::array<int16_t, 0x144> table = [] {
    std::array<int16_t, 0x144> t;
    t.fill(-1);
    size_t next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const bool is_printable = (byte >= 0x21 && byte < 0x7F) || (byte >= 0xA1 && byte < 0xAD) || byte >= 0xAE;
      t[is_printable ? (size_t)byte : next++] = (int16_t)byte;
    }
    return t;
  }();
  return table;
}

}  // namespace

std::vector<uint32_t> string_offsets(const char* data, size_t size, size_t count) {
  std::vector<uint32_t> offsets;
  offsets.reserve(count + 1);
  offsets.push_back(0);
  size_t position = 0;
  while (offsets.size() <= count && size - position >= 8) {
    uint64_t length;
    std::memcpy(&length, data + position, 8);
    if (length > size - position - 8) break;
    const uint8_t* text = (const uint8_t*)data + position + 8;
    if (!is_utf8(text, text + length)) break;
    position += 8 + (size_t)length;
    offsets.push_back((uint32_t)position);
  }
  return offsets;
}

Vocabulary::Vocabulary(const Strings& tokens, const uint8_t* is_hidden, bool ignore_merges)
    : slots_(slots_for(tokens.count), -1), merges_(slots_for(0), Merge{kNoPair, 0, 0}), ignore_merges_(ignore_merges) {
  std::random_device random;
  seed_ = (uint64_t)random() << 32 | random();
  factor_ = ((uint64_t)random() << 32 | random()) | 1;
  data_.reserve(tokens.offsets[tokens.count] - tokens.offsets[0]);
  offsets_.reserve(tokens.count + 1);
  offsets_.push_back(0);
  for (size_t id = 0; id < tokens.count; ++id) {
    const std::string_view text = tokens[id];
    data_ += text;
    offsets_.push_back((uint32_t)data_.size());
    if (is_hidden[id]) continue;
    const size_t num_bytes = bytes(id).size();
    if (num_bytes > longest_bytes_) longest_bytes_ = num_bytes;
    size_t slot = hash(text) & (slots_.size() - 1);
    while (slots_[slot] >= 0 && spelling((size_t)slots_[slot]) != text) slot = (slot + 1) & (slots_.size() - 1);
    slots_[slot] = (int32_t)id;
  }
}

size_t Vocabulary::add_merges(const Strings& merges) {
  merges_.assign(slots_for(merges.count), Merge{kNoPair, 0, 0});
  std::string whole;
  for (size_t rank = 0; rank < merges.count; ++rank) {
    const std::string_view line = merges[rank];
    const size_t cut = line.find(' ', 1);  // not at 0: a part may itself begin with a space
    if (cut == line.npos) return rank;
    whole.assign(line.substr(0, cut));
    whole += line.substr(cut + 1);
    const int32_t left = find(line.substr(0, cut)), right = find(line.substr(cut + 1)), joined = find(whole);
    if (left < 0 || right < 0 || joined < 0) return rank;
    const uint64_t pair = pair_of(left, right);
    size_t slot = fold(pair ^ seed_, factor_) & (merges_.size() - 1);
    while (merges_[slot].pair != kNoPair && merges_[slot].pair != pair) slot = (slot + 1) & (merges_.size() - 1);
    merges_[slot] = {pair, (uint32_t)rank, joined};
  }
  return merges.count;
}

std::vector<int32_t> Vocabulary::encode(std::string_view pieces) const {
  std::vector<int32_t> ids;
  std::vector<Symbol> symbols;
  while (!pieces.empty()) {
    std::string_view piece = pieces.substr(0, pieces.find(' '));
    pieces.remove_prefix(piece.size() < pieces.size() ? piece.size() + 1 : pieces.size());
    const int32_t whole = ignore_merges_ ? find(piece) : -1;
    if (whole >= 0) {
      ids.push_back(whole);
      continue;
    }
    symbols.clear();
    while (!piece.empty()) {
      const size_t size = character_bytes(piece);
      const int32_t id = find(piece.substr(0, size)), at = (int32_t)symbols.size();
      if (id >= 0) symbols.push_back({id, at - 1, at + 1});
      piece.remove_prefix(size);
    }
    join(symbols);
    for (const Symbol& symbol : symbols)
      if (symbol.id >= 0) ids.push_back(symbol.id);
  }
  return ids;
}

void Vocabulary::join(std::vector<Symbol>& symbols) const {
  struct Waiting {
    uint32_t rank;
    int32_t at, id;
    bool operator<(const Waiting& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }
  };
  const int32_t end = (int32_t)symbols.size();
  std::priority_queue<Waiting> queue;
  const auto wait = [&](int32_t at) {
    if (at < 0 || at >= end || symbols[(size_t)at].next >= end) return;
    const Symbol& symbol = symbols[(size_t)at];
    if (const Merge* merge = find_merge(symbol.id, symbols[(size_t)symbol.next].id))
      queue.push({merge->rank, at, merge->id});
  };
  for (int32_t at = 0; at < end; ++at) wait(at);
  while (!queue.empty()) {
    const Waiting first = queue.top();
    queue.pop();
    Symbol& symbol = symbols[(size_t)first.at];
    if (symbol.id < 0 || symbol.next >= end) continue;
    Symbol& joined = symbols[(size_t)symbol.next];
    const Merge* merge = find_merge(symbol.id, joined.id);
    if (!merge || merge->id != first.id) continue;  // one of the two has changed since
    symbol.id = first.id;
    joined.id = -1;
    symbol.next = joined.next;
    if (symbol.next < end) symbols[(size_t)symbol.next].previous = first.at;
    wait(symbol.previous);
    wait(first.at);
  }
}

std::string Vocabulary::bytes(size_t id) const {
  const std::string_view text = spelling(id);
  std::string result;
  result.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    size_t character = (uint8_t)text[i];
    if (character >= 0x80) {  // two bytes reach up to U+07FF, beyond the table
      if (character >= 0xE0 || i + 1 == text.size()) return std::string(text);
      character = (character & 0x1F) << 6 | ((uint8_t)text[++i] & 0x3F);
    }
    const int byte = character < byte_of_character().size() ? byte_of_character()[character] : -1;
    if (byte < 0) return std::string(text);
    result += (char)byte;
  }
  return result;
}

uint64_t Vocabulary::hash(std::string_view text) const {
  uint64_t h = seed_ ^ text.size();
  while (!text.empty()) {
    uint64_t word = 0;
    const size_t size = text.size() < 8 ? text.size() : 8;
    std::memcpy(&word, text.data(), size);
    h = fold(h ^ word, factor_);
    text.remove_prefix(size);
  }
  return h;
}

int32_t Vocabulary::find(std::string_view text) const {
  size_t slot = hash(text) & (slots_.size() - 1);
  while (slots_[slot] >= 0 && spelling((size_t)slots_[slot]) != text) slot = (slot + 1) & (slots_.size() - 1);
  return slots_[slot];
}

const Vocabulary::Merge* Vocabulary::find_merge(int32_t left, int32_t right) const {
  const uint64_t pair = pair_of(left, right);
  size_t slot = fold(pair ^ seed_, factor_) & (merges_.size() - 1);
  while (merges_[slot].pair != kNoPair && merges_[slot].pair != pair) slot = (slot + 1) & (merges_.size() - 1);
  return merges_[slot].pair == kNoPair ? nullptr : &merges_[slot];
}

}  // namespace autoglm
