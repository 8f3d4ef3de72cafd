#include "tests/datadriven/transcript.h"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

namespace everstep::datadriven {
namespace {

std::vector<std::string> Lines(std::string_view text) {
  std::vector<std::string> lines;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    lines.emplace_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return lines;
}

}  // namespace

bool Command::Has(std::string_view word) const {
  return std::find(words.begin(), words.end(), word) != words.end();
}

std::string Command::Get(const std::string& key, const std::string& otherwise) const {
  const auto found = values.find(key);
  return found == values.end() ? otherwise : found->second;
}

bool ParseCommand(std::string_view text, Command* out) {
  std::vector<std::string> tokens;
  std::string token;
  bool quoted = false;
  for (const char c : text) {
    if (c == '"') {
      quoted = !quoted;
    } else if (c == ' ' && !quoted) {
      if (!token.empty()) tokens.push_back(std::exchange(token, ""));
    } else {
      token += c;
    }
  }
  if (!token.empty()) tokens.push_back(token);
  if (quoted || tokens.empty()) return false;
  out->name = tokens[0];
  for (std::size_t i = 1; i < tokens.size(); ++i) {
    const std::size_t equals = tokens[i].find('=');
    if (equals == std::string::npos) {
      out->words.push_back(tokens[i]);
    } else {
      out->values[tokens[i].substr(0, equals)] = tokens[i].substr(equals + 1);
    }
  }
  return true;
}

std::string Replay(std::string_view text,
                   const std::function<std::vector<std::string>(const Command&)>& run) {
  const std::vector<std::string> lines = Lines(text);
  std::string out;
  for (std::size_t i = 0; i < lines.size(); ++i) {
    if (lines[i].empty() || lines[i][0] == '#') {
      out += lines[i] + "\n";
      continue;
    }
    out += lines[i] + "\n----\n";
    Command command;
    command.line = static_cast<int>(i) + 1;
    if (ParseCommand(lines[i], &command)) {
      for (const std::string& line : run(command)) out += line + "\n";
    } else {
      out += "error: a quote is not closed\n";
    }
    if (i + 1 < lines.size() && lines[i + 1] == "----") {  // what it printed last time
      ++i;
      while (i + 1 < lines.size() && !lines[i + 1].empty()) ++i;
    }
    if (i + 1 >= lines.size() || !lines[i + 1].empty()) out += "\n";
  }
  while (out.ends_with("\n\n")) out.pop_back();
  return out;
}

std::string FirstDifference(std::string_view expected, std::string_view actual) {
  const std::vector<std::string> want = Lines(expected), got = Lines(actual);
  std::size_t i = 0;
  while (i < want.size() && i < got.size() && want[i] == got[i]) ++i;
  if (i == want.size() && i == got.size()) return "";
  std::string text;
  for (std::size_t k = i < 4 ? 0 : i - 4; k < i; ++k) text += fmt::format("    {}\n", want[k]);
  for (std::size_t k = i; k < std::min(i + 4, want.size()); ++k) {
    text += fmt::format("  - {}\n", want[k]);
  }
  for (std::size_t k = i; k < std::min(i + 4, got.size()); ++k) {
    text += fmt::format("  + {}\n", got[k]);
  }
  return fmt::format("line {}:\n{}", i + 1, text);
}

}  // namespace everstep::datadriven
