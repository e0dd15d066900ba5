// Byte-level BPE out of a GGUF's string arrays: where the strings lie, text -> token ids, token id -> bytes.
//
// Merges as Hugging Face's tokenizers library does them: of all neighbours in a piece the pair with the lowest rank is
// joined first, the leftmost of equals. A character without a token is left out, and its neighbours become neighbours.
// The hash is seeded anew for each vocabulary, so that no file can hold strings chosen to collide.
// Left out: splitting text into pieces, which needs Unicode's tables; special tokens.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace autoglm {

// Strings one after the other, each behind its length in 8 bytes; offsets has one entry more than there are strings.
struct Strings {
  const char* data;
  const uint32_t* offsets;
  size_t count;

  std::string_view operator[](size_t i) const { return {data + offsets[i] + 8, offsets[i + 1] - offsets[i] - 8u}; }
};

// Where count strings of data[0, size) begin; fewer, and the end of the last good one, if one is not UTF-8 or leads
// beyond size, which is at most 4 GB.
std::vector<uint32_t> string_offsets(const char* data, size_t size, size_t count);

class Vocabulary {
 public:
  // is_hidden: a byte a token; text never becomes a hidden one. Of equal tokens the last counts. Copies the strings.
  Vocabulary(const Strings& tokens, const uint8_t* is_hidden, bool ignore_merges);

  // The first merge that is not two tokens with a space between that make a third, or their count. Call once.
  size_t add_merges(const Strings& merges);

  // pieces: in GPT-2's byte alphabet, with spaces between.
  std::vector<int32_t> encode(std::string_view pieces) const;

  // The bytes a token stands for; a token that is not spelled in the byte alphabet stands for itself.
  std::string bytes(size_t id) const;

  size_t size() const { return offsets_.size() - 1; }
  size_t longest_bytes() const { return longest_bytes_; }  // of those that are not hidden

 private:
  struct Merge {
    uint64_t pair;
    uint32_t rank;
    int32_t id;
  };
  struct Symbol {
    int32_t id;  // -1: joined to the one before
    int32_t previous, next;
  };

  std::string_view spelling(size_t id) const {
    return std::string_view(data_).substr(offsets_[id], offsets_[id + 1] - offsets_[id]);
  }
  uint64_t hash(std::string_view text) const;
  int32_t find(std::string_view text) const;
  const Merge* find_merge(int32_t left, int32_t right) const;
  void join(std::vector<Symbol>& symbols) const;

  std::string data_;
  std::vector<uint32_t> offsets_;
  std::vector<int32_t> slots_;  // token ids by hash of their spelling; -1: free
  std::vector<Merge> merges_;   // by hash of their pair
  uint64_t seed_, factor_;
  size_t longest_bytes_ = 0;
  bool ignore_merges_;
};

}  // namespace autoglm
