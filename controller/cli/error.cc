#include "controller/cli/error.h"

#include <cstddef>
#include <system_error>

#include <fmt/format.h>

namespace everstep::cli {
namespace {

std::string Printable(std::string_view text) {
  std::string out(text);
  for (char& c : out) {
    const auto u = static_cast<unsigned char>(c);
    if ((u < 0x20 && c != '\n' && c != '\t') || u == 0x7f) c = '?';
  }
  return out;
}

// Length of the valid UTF-8 sequence at the start of `s`; 0: invalid.
std::size_t Utf8Length(std::string_view s) {
  const auto at = [&](std::size_t i) { return static_cast<unsigned char>(s[i]); };
  const unsigned char lead = at(0);
  const std::size_t n = lead < 0x80   ? 1
                        : lead < 0xC2 ? 0
                        : lead < 0xE0 ? 2
                        : lead < 0xF0 ? 3
                        : lead < 0xF5 ? 4
                                      : 0;
  if (n == 0 || n > s.size()) return 0;
  for (std::size_t i = 1; i < n; ++i) {
    if ((at(i) & 0xC0) != 0x80) return 0;
  }
  if (lead == 0xE0 && at(1) < 0xA0) return 0;  // overlong
  if (lead == 0xED && at(1) > 0x9F) return 0;  // surrogate
  if (lead == 0xF0 && at(1) < 0x90) return 0;  // overlong
  if (lead == 0xF4 && at(1) > 0x8F) return 0;  // above U+10FFFF
  return n;
}

}  // namespace

std::string JsonQuote(std::string_view text) {
  std::string out = "\"";
  for (std::size_t i = 0; i < text.size();) {
    const char c = text[i];
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
      ++i;
    } else if (c == '\n') {
      out += "\\n";
      ++i;
    } else if (c == '\t') {
      out += "\\t";
      ++i;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
      ++i;
    } else if (const std::size_t n = Utf8Length(text.substr(i)); n > 0) {
      out += text.substr(i, n);
      i += n;
    } else {
      out += "\xEF\xBF\xBD";
      ++i;
    }
  }
  return out + '"';
}

std::string FormatError(const CliError& error) {
  std::string out = fmt::format("error: {}\n", Printable(error.message));
  if (!error.hint.empty()) out += fmt::format("  hint: {}\n", Printable(error.hint));
  return out;
}

std::string FormatErrorJson(const CliError& error) {
  std::string out = fmt::format(R"({{"error":{{"code":{},"message":{})", JsonQuote(error.code),
                                JsonQuote(error.message));
  if (!error.hint.empty()) out += fmt::format(R"(,"hint":{})", JsonQuote(error.hint));
  return out + "}}\n";
}

}  // namespace everstep::cli
