// A small pull reader of JSON for bytes that others wrote: manifests, safetensors headers, tables.
//
// It builds no tree, so a hostile text costs no more memory than the values its caller keeps; depth
// is bounded; the first error sticks, with the byte offset at which it stands. Every call after an
// error returns false. Numbers are integers to the callers here; others can be skipped.
//
//   JsonReader in(text);
//   in.BeginObject();
//   for (std::string key; in.NextKey(&key);) {
//     if (key == "step") in.Signed(&step); else in.Skip();
//   }
//   if (!in.Finish()) return in.error();
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace everstep::checkpoint {

class JsonReader {
 public:
  static constexpr std::size_t kMaxDepth = 512;

  // `text` must outlive the reader.
  explicit JsonReader(std::string_view text) : text_(text) {}

  enum class Kind { kNull, kBool, kNumber, kString, kArray, kObject, kNothing };
  Kind Peek();  // of the value that comes next

  bool BeginObject();
  // The next member's key; its value must be read (or skipped) next. False: the object has ended.
  bool NextKey(std::string* key);
  bool BeginArray();
  bool NextItem();  // false: the array has ended

  // The whole number that comes next, in the type's range.
  bool Unsigned(std::uint64_t* out);
  bool Signed(std::int64_t* out);
  bool Bool(bool* out);
  // Escapes undone; half a surrogate pair becomes U+FFFD.
  bool String(std::string* out);
  bool Skip();  // any value, whole
  // The text of the value that comes next, as it stands.
  bool Raw(std::string_view* out);

  bool Finish();  // nothing but white space is left
  bool ok() const { return error_.empty(); }
  std::size_t offset() const { return at_; }
  // "offset 17: a string has no end"
  const std::string& error() const { return error_; }
  bool Fail(const std::string& what);  // false, always

 private:
  enum class In : char { kObjectFirst, kObject, kArrayFirst, kArray };
  void Space();
  bool Eat(char c);
  bool Word(std::string_view word);
  bool Number(std::string_view* out);
  bool Push(In in);
  bool Escape(std::string* out);
  bool Hex4(std::uint32_t* out);

  std::string_view text_;
  std::size_t at_ = 0;
  std::vector<In> open_;
  std::string error_;
};

// `text` as a JSON string, quotes and all; what is not UTF-8 becomes U+FFFD.
std::string JsonString(std::string_view text);

}  // namespace everstep::checkpoint
