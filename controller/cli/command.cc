#include "controller/cli/command.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "controller/cli/suggest.h"

namespace everstep::cli {
namespace {

CliError Usage(std::string message, std::string hint) {
  return {ExitCode::kUsage, "INVALID_ARGUMENT", std::move(message), std::move(hint)};
}

std::string FullName(const Parsed& parsed) {
  const std::string name = parsed.CommandName();
  return name.empty() ? "everstep" : "everstep " + name;
}

std::vector<std::string> VisibleNames(const CommandSpec& command) {
  std::vector<std::string> names;
  for (const CommandSpec& child : command.children) {
    if (!child.hidden) names.push_back(child.name);
  }
  return names;
}

const CommandSpec* Child(const CommandSpec& command, const std::string& name) {
  for (const CommandSpec& child : command.children) {
    if (child.name == name ||
        std::find(child.aliases.begin(), child.aliases.end(), name) != child.aliases.end()) {
      return &child;
    }
  }
  return nullptr;
}

bool Many(const WordSpec& word) {
  return word.count == WordSpec::Count::kMany || word.count == WordSpec::Count::kAny;
}

class Reader {
 public:
  Reader(const ProgramSpec& program, const std::vector<std::string>& args)
      : program_(program), args_(args), at_(&program.root) {}

  Result<Parsed> Read() {
    for (next_ = 0; next_ < args_.size();) {
      const std::string& arg = args_[next_++];
      Outcome outcome = Done{};
      if (only_words_ || arg.size() < 2 || arg[0] != '-') {
        outcome = Word(arg);
      } else if (arg == "--") {
        only_words_ = true;
      } else if (arg[1] == '-') {
        outcome = Long(arg.substr(2));
      } else {
        outcome = Letters(arg.substr(1));
      }
      if (!outcome.ok()) return outcome.error();
      if (at_->passes_on) {
        parsed_.words.assign(args_.begin() + static_cast<std::ptrdiff_t>(next_), args_.end());
        return std::move(parsed_);
      }
    }
    if (!parsed_.help) {
      if (Outcome complete = Complete(); !complete.ok()) return complete.error();
    }
    return std::move(parsed_);
  }

 private:
  Outcome Word(const std::string& word) {
    if (at_->verb != Verb::kGroup) {
      const auto& specs = at_->words;
      const bool more = !specs.empty() && Many(specs.back());
      if (parsed_.words.size() >= specs.size() && !more) {
        return Usage(
            specs.empty()
                ? fmt::format("{} takes no argument, got \"{}\"", FullName(parsed_), word)
                : fmt::format("{} takes {} argument{}, \"{}\" is one too many", FullName(parsed_),
                              specs.size(), specs.size() == 1 ? "" : "s", word),
            fmt::format("{} --help", FullName(parsed_)));
      }
      const WordSpec& spec = specs[std::min(parsed_.words.size(), specs.size() - 1)];
      if (!spec.choices.empty()) {
        if (Outcome known = OneOf(spec.name, word, spec.choices); !known.ok()) return known;
      }
      parsed_.words.push_back(word);
      return Done{};
    }
    if (const CommandSpec* child = Child(*at_, word)) {
      at_ = child;
      parsed_.path.push_back(child);
      return Done{};
    }
    const std::vector<std::string> names = VisibleNames(*at_);
    const std::string near = Nearest(word, names);
    return Usage(fmt::format("\"{}\" is not a command of {}", word, FullName(parsed_)),
                 near.empty() ? fmt::format("one of: {}", fmt::join(names, ", "))
                              : fmt::format("did you mean: {} {}", FullName(parsed_), near));
  }

  static Outcome OneOf(const std::string& what, const std::string& value,
                       const std::vector<std::string>& choices) {
    if (std::find(choices.begin(), choices.end(), value) != choices.end()) return Done{};
    const std::string near = Nearest(value, choices);
    return Usage(fmt::format("{} cannot be \"{}\"", what, value),
                 near.empty() ? fmt::format("one of: {}", fmt::join(choices, ", "))
                              : fmt::format("did you mean: {}", near));
  }

  template <typename Match>
  const OptionSpec* Find(const Match& match) const {
    for (const auto* list : {&at_->options, &program_.globals}) {
      for (const OptionSpec& option : *list) {
        if (match(option)) return &option;
      }
    }
    return nullptr;
  }

  Outcome Long(const std::string& text) {
    const std::size_t equals = text.find('=');
    const std::string name = text.substr(0, equals);
    if (name == "help" && equals == std::string::npos) {
      parsed_.help = true;
      return Done{};
    }
    const OptionSpec* option = Find([&](const OptionSpec& o) { return o.name == name; });
    if (option == nullptr) {
      std::vector<std::string> names{"help"};
      for (const auto* list : {&at_->options, &program_.globals}) {
        for (const OptionSpec& o : *list) {
          if (!o.hidden) names.push_back(o.name);
        }
      }
      const std::string near = Nearest(name, names);
      return Usage(fmt::format("{} has no option --{}", FullName(parsed_), name),
                   near.empty() ? fmt::format("{} --help lists them", FullName(parsed_))
                                : fmt::format("did you mean: --{}", near));
    }
    const std::string shown = "--" + name;
    if (equals != std::string::npos) {
      if (option->value.empty()) {
        return Usage(fmt::format("{} is a switch and takes no value", shown),
                     fmt::format("leave out \"{}\"", text.substr(equals)));
      }
      return Set(*option, shown, text.substr(equals + 1));
    }
    return TakeValue(*option, shown);
  }

  // "-o json" "-ojson" "-fw"
  Outcome Letters(const std::string& letters) {
    for (std::size_t i = 0; i < letters.size(); ++i) {
      const char letter = letters[i];
      if (letter == 'h') {
        parsed_.help = true;
        continue;
      }
      const OptionSpec* option =
          Find([&](const OptionSpec& o) { return o.letter != 0 && o.letter == letter; });
      if (option == nullptr) {
        return Usage(fmt::format("{} has no option -{}", FullName(parsed_), letter),
                     fmt::format("{} --help lists them", FullName(parsed_)));
      }
      const std::string shown = fmt::format("-{}", letter);
      if (!option->value.empty() && i + 1 < letters.size()) {
        const std::size_t from = letters[i + 1] == '=' ? i + 2 : i + 1;
        return Set(*option, shown, letters.substr(from));
      }
      if (Outcome taken = TakeValue(*option, shown); !taken.ok()) return taken;
    }
    return Done{};
  }

  Outcome TakeValue(const OptionSpec& option, const std::string& shown) {
    if (option.value.empty()) return Set(option, shown, "true");
    if (next_ >= args_.size()) {
      return Usage(fmt::format("{} needs a value ({})", shown, option.value),
                   fmt::format("{} --help", FullName(parsed_)));
    }
    return Set(option, shown, args_[next_++]);
  }

  Outcome Set(const OptionSpec& option, const std::string& shown, const std::string& value) {
    if (!option.choices.empty()) {
      if (Outcome known = OneOf(shown, value, option.choices); !known.ok()) return known;
    }
    if (!option.value.empty() && value.empty()) {
      return Usage(fmt::format("{} has an empty value ({})", shown, option.value),
                   fmt::format("{} --help", FullName(parsed_)));
    }
    std::string& held = parsed_.options[option.name];
    held = option.repeats && !held.empty() ? held + "," + value : value;
    return Done{};
  }

  Outcome Complete() {
    if (at_->verb == Verb::kGroup) {
      if (at_ == &program_.root) {
        parsed_.help = true;
        return Done{};
      }
      return Usage(fmt::format("{} needs a command", FullName(parsed_)),
                   fmt::format("one of: {}", fmt::join(VisibleNames(*at_), ", ")));
    }
    std::size_t needed = 0;
    for (const WordSpec& word : at_->words) {
      needed += word.count == WordSpec::Count::kOne || word.count == WordSpec::Count::kMany;
    }
    if (parsed_.words.size() < needed) {
      return Usage(
          fmt::format("{} needs {}", FullName(parsed_), at_->words[parsed_.words.size()].name),
          fmt::format("{} --help", FullName(parsed_)));
    }
    return Done{};
  }

  const ProgramSpec& program_;
  const std::vector<std::string>& args_;
  const CommandSpec* at_;
  std::size_t next_ = 0;
  bool only_words_ = false;
  Parsed parsed_;
};

}  // namespace

std::string Parsed::Get(const std::string& name, const std::string& fallback) const {
  const auto it = options.find(name);
  return it == options.end() ? fallback : it->second;
}

std::string Parsed::CommandName() const {
  std::string name;
  for (const CommandSpec* command : path) name += (name.empty() ? "" : " ") + command->name;
  return name;
}

Result<Parsed> Parse(const ProgramSpec& program, const std::vector<std::string>& args) {
  return Reader(program, args).Read();
}

const CommandSpec* FindCommand(const CommandSpec& root, const std::vector<std::string>& names) {
  const CommandSpec* at = &root;
  for (const std::string& name : names) {
    at = Child(*at, name);
    if (at == nullptr) return nullptr;
  }
  return at;
}

Result<std::chrono::milliseconds> ParseDuration(const std::string& what, const std::string& text) {
  const auto wrong = [&] {
    return Usage(fmt::format("{} cannot be \"{}\": it is a duration from 0 to 365d", what, text),
                 "for example 500ms, 90s, 5m, 2h; a plain number is seconds");
  };
  double number = 0;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || !std::isfinite(number) || number < 0) return wrong();
  const std::string unit(rest, end);
  const double scale = unit == "ms"                  ? 1
                       : unit.empty() || unit == "s" ? 1e3
                       : unit == "m"                 ? 6e4
                       : unit == "h"                 ? 3.6e6
                       : unit == "d"                 ? 8.64e7
                                                     : -1;
  if (scale < 0 || number * scale > 365 * 8.64e7) return wrong();
  return std::chrono::milliseconds(std::llround(number * scale));
}

Result<std::int64_t> ParseInteger(const std::string& what, const std::string& text,
                                  std::int64_t low, std::int64_t high) {
  std::int64_t number = 0;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || rest != end || number < low || number > high) {
    return Usage(fmt::format("{} cannot be \"{}\"", what, text),
                 fmt::format("an integer from {} to {}", low, high));
  }
  return number;
}

}  // namespace everstep::cli
