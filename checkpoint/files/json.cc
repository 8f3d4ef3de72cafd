#include "checkpoint/files/json.h"

#include <fmt/format.h>

#include <charconv>

namespace everstep::checkpoint {
namespace {

void AppendUtf8(std::uint32_t code, std::string* out) {
  if (code < 0x80) {
    out->push_back(static_cast<char>(code));
  } else if (code < 0x800) {
    out->push_back(static_cast<char>(0xC0 | (code >> 6)));
    out->push_back(static_cast<char>(0x80 | (code & 0x3F)));
  } else if (code < 0x10000) {
    out->push_back(static_cast<char>(0xE0 | (code >> 12)));
    out->push_back(static_cast<char>(0x80 | ((code >> 6) & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (code & 0x3F)));
  } else {
    out->push_back(static_cast<char>(0xF0 | (code >> 18)));
    out->push_back(static_cast<char>(0x80 | ((code >> 12) & 0x3F)));
    out->push_back(static_cast<char>(0x80 | ((code >> 6) & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (code & 0x3F)));
  }
}

// Bytes of the UTF-8 sequence that `text` begins with; 0: it begins with none.
std::size_t Utf8Length(std::string_view text) {
  const auto byte = [text](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return 1;
  const std::size_t n = first >= 0xF0 && first <= 0xF4  ? 4
                        : first >= 0xE0 && first < 0xF0 ? 3
                        : first >= 0xC2 && first < 0xE0 ? 2
                                                        : 0;
  if (n == 0 || text.size() < n) return 0;
  for (std::size_t i = 1; i < n; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
  }
  if (first == 0xE0 && byte(1) < 0xA0) return 0;
  if (first == 0xED && byte(1) >= 0xA0) return 0;  // surrogates
  if (first == 0xF0 && byte(1) < 0x90) return 0;
  if (first == 0xF4 && byte(1) >= 0x90) return 0;
  return n;
}

bool Digit(char c) {
  return c >= '0' && c <= '9';
}

}  // namespace

bool JsonReader::Fail(const std::string& what) {
  if (error_.empty()) error_ = fmt::format("offset {}: {}", at_, what);
  return false;
}

void JsonReader::Space() {
  while (at_ < text_.size() &&
         (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r')) {
    ++at_;
  }
}

bool JsonReader::Eat(char c) {
  Space();
  if (at_ >= text_.size() || text_[at_] != c) return false;
  ++at_;
  return true;
}

JsonReader::Kind JsonReader::Peek() {
  Space();
  if (!ok() || at_ >= text_.size()) return Kind::kNothing;
  const char c = text_[at_];
  if (c == '{') return Kind::kObject;
  if (c == '[') return Kind::kArray;
  if (c == '"') return Kind::kString;
  if (c == 't' || c == 'f') return Kind::kBool;
  if (c == 'n') return Kind::kNull;
  if (c == '-' || Digit(c)) return Kind::kNumber;
  return Kind::kNothing;
}

bool JsonReader::Push(In in) {
  if (open_.size() >= kMaxDepth) return Fail(fmt::format("nested deeper than {}", kMaxDepth));
  open_.push_back(in);
  return true;
}

bool JsonReader::BeginObject() {
  if (!ok()) return false;
  if (!Eat('{')) return Fail("an object was expected");
  return Push(In::kObjectFirst);
}

bool JsonReader::BeginArray() {
  if (!ok()) return false;
  if (!Eat('[')) return Fail("an array was expected");
  return Push(In::kArrayFirst);
}

bool JsonReader::NextKey(std::string* key) {
  if (!ok()) return false;
  if (open_.empty() || (open_.back() != In::kObjectFirst && open_.back() != In::kObject)) {
    return Fail("not within an object");
  }
  if (Eat('}')) {
    open_.pop_back();
    return false;
  }
  if (open_.back() == In::kObject && !Eat(',')) return Fail("',' or '}' was expected");
  open_.back() = In::kObject;
  if (!String(key)) return false;
  return Eat(':') || Fail("':' was expected");
}

bool JsonReader::NextItem() {
  if (!ok()) return false;
  if (open_.empty() || (open_.back() != In::kArrayFirst && open_.back() != In::kArray)) {
    return Fail("not within an array");
  }
  if (Eat(']')) {
    open_.pop_back();
    return false;
  }
  if (open_.back() == In::kArray && !Eat(',')) return Fail("',' or ']' was expected");
  open_.back() = In::kArray;
  return true;
}

bool JsonReader::Word(std::string_view word) {
  if (text_.substr(at_, word.size()) != word) return Fail("a value was expected");
  at_ += word.size();
  return true;
}

bool JsonReader::Number(std::string_view* out) {
  Space();
  std::size_t i = at_;
  const auto digits = [&] {
    const std::size_t from = i;
    while (i < text_.size() && Digit(text_[i])) ++i;
    return i > from;
  };
  if (i < text_.size() && text_[i] == '-') ++i;
  const std::size_t whole = i;
  if (!digits()) return Fail("a number was expected");
  if (text_[whole] == '0' && i > whole + 1) return Fail("a number begins with 0");
  if (i < text_.size() && text_[i] == '.') {
    ++i;
    if (!digits()) return Fail("a number ends in its middle");
  }
  if (i < text_.size() && (text_[i] == 'e' || text_[i] == 'E')) {
    ++i;
    if (i < text_.size() && (text_[i] == '+' || text_[i] == '-')) ++i;
    if (!digits()) return Fail("a number ends in its middle");
  }
  *out = text_.substr(at_, i - at_);
  at_ = i;
  return true;
}

bool JsonReader::Unsigned(std::uint64_t* out) {
  if (!ok()) return false;
  const std::size_t from = at_;
  std::string_view text;
  if (!Number(&text)) return false;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *out);
  if (error == std::errc() && end == text.data() + text.size()) return true;
  at_ = from;
  return Fail(fmt::format("{:.40} is no whole number of 64 bits without a sign", text));
}

bool JsonReader::Signed(std::int64_t* out) {
  if (!ok()) return false;
  const std::size_t from = at_;
  std::string_view text;
  if (!Number(&text)) return false;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *out);
  if (error == std::errc() && end == text.data() + text.size()) return true;
  at_ = from;
  return Fail(fmt::format("{:.40} is no whole number of 64 bits", text));
}

bool JsonReader::Bool(bool* out) {
  if (Peek() != Kind::kBool) return Fail("true or false was expected");
  *out = text_[at_] == 't';
  return Word(*out ? "true" : "false");
}

bool JsonReader::Hex4(std::uint32_t* out) {
  if (text_.size() - at_ < 4) return Fail("an escape ends in its middle");
  *out = 0;
  const auto [end, error] = std::from_chars(text_.data() + at_, text_.data() + at_ + 4, *out, 16);
  if (error != std::errc() || end != text_.data() + at_ + 4) return Fail("an escape with no hex");
  at_ += 4;
  return true;
}

bool JsonReader::Escape(std::string* out) {
  if (at_ >= text_.size()) return Fail("a string has no end");
  const char c = text_[at_++];
  switch (c) {
    case '"':
    case '\\':
    case '/': out->push_back(c); return true;
    case 'b': out->push_back('\b'); return true;
    case 'f': out->push_back('\f'); return true;
    case 'n': out->push_back('\n'); return true;
    case 'r': out->push_back('\r'); return true;
    case 't': out->push_back('\t'); return true;
    case 'u': break;
    default: --at_; return Fail("an unknown escape");
  }
  std::uint32_t code = 0;
  if (!Hex4(&code)) return false;
  if (code >= 0xD800 && code < 0xDC00 && text_.substr(at_, 2) == "\\u") {
    const std::size_t mark = at_;
    at_ += 2;
    std::uint32_t low = 0;
    if (!Hex4(&low)) return false;
    if (low >= 0xDC00 && low < 0xE000) {
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else {
      at_ = mark;
    }
  }
  if (code >= 0xD800 && code < 0xE000) code = 0xFFFD;
  AppendUtf8(code, out);
  return true;
}

bool JsonReader::String(std::string* out) {
  if (!ok()) return false;
  if (!Eat('"')) return Fail("a string was expected");
  out->clear();
  while (at_ < text_.size()) {
    const char c = text_[at_];
    if (c == '"') {
      ++at_;
      return true;
    }
    if (c == '\\') {
      ++at_;
      if (!Escape(out)) return false;
      continue;
    }
    if (static_cast<unsigned char>(c) < 0x20) return Fail("a control character in a string");
    const std::size_t n = Utf8Length(text_.substr(at_));
    if (n == 0) return Fail("a string that is not UTF-8");
    out->append(text_.substr(at_, n));
    at_ += n;
  }
  return Fail("a string has no end");
}

bool JsonReader::Skip() {
  const std::size_t depth = open_.size();
  std::string scratch;
  bool value = true;  // a value comes next, else what is open goes on
  while (ok()) {
    if (value) {
      std::string_view number;
      switch (Peek()) {
        case Kind::kObject: BeginObject(); break;
        case Kind::kArray: BeginArray(); break;
        case Kind::kString: String(&scratch); break;
        case Kind::kNumber: Number(&number); break;
        case Kind::kBool: Word(text_[at_] == 't' ? "true" : "false"); break;
        case Kind::kNull: Word("null"); break;
        case Kind::kNothing: return Fail("a value was expected");
      }
    }
    if (!ok()) return false;
    if (open_.size() == depth) return true;
    const bool object = open_.back() == In::kObject || open_.back() == In::kObjectFirst;
    value = object ? NextKey(&scratch) : NextItem();
  }
  return false;
}

bool JsonReader::Raw(std::string_view* out) {
  Space();
  const std::size_t from = at_;
  if (!Skip()) return false;
  *out = text_.substr(from, at_ - from);
  return true;
}

bool JsonReader::Finish() {
  if (!ok()) return false;
  Space();
  if (!open_.empty()) return Fail("the text ends within a value");
  return at_ == text_.size() || Fail("something follows the value");
}

std::string JsonString(std::string_view text) {
  std::string out = "\"";
  out.reserve(text.size() + 2);
  while (!text.empty()) {
    const char c = text.front();
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) {
      out += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
    } else {
      const std::size_t n = Utf8Length(text);
      out += n == 0 ? std::string_view("\xEF\xBF\xBD") : text.substr(0, n);
      text.remove_prefix(n == 0 ? 1 : n);
      continue;
    }
    text.remove_prefix(1);
  }
  return out + '"';
}

}  // namespace everstep::checkpoint
