#include "controller/cli/manual.h"

#include <algorithm>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace everstep::cli {
namespace {

using Path = std::vector<const CommandSpec*>;

std::string FullName(const Path& path) {
  std::string name = "everstep";
  for (const CommandSpec* command : path) name += " " + command->name;
  return name;
}

std::string WordUsage(const WordSpec& word) {
  switch (word.count) {
    case WordSpec::Count::kOptional: return "[" + word.name + "]";
    case WordSpec::Count::kMany: return word.name + "...";
    case WordSpec::Count::kAny: return "[" + word.name + "...]";
    default: return word.name;
  }
}

std::string UsageLine(const Path& path) {
  const CommandSpec& command = *path.back();
  std::string line = FullName(path);
  if (command.passes_on) return line + " ARGUMENTS...";
  if (command.verb == Verb::kGroup) return line + " COMMAND";
  for (const WordSpec& word : command.words) line += " " + WordUsage(word);
  return line + " [options]";
}

std::string OptionLeft(const OptionSpec& option) {
  std::string left = option.letter != 0 ? fmt::format("-{}, ", option.letter) : "    ";
  left += "--" + option.name;
  if (!option.value.empty()) left += " " + option.value;
  return left;
}

std::string OptionRight(const OptionSpec& option) {
  return option.fallback.empty() ? option.help
                                 : fmt::format("{} (default: {})", option.help, option.fallback);
}

using Rows = std::vector<std::pair<std::string, std::string>>;

// Two columns; a left side too long for its column stands alone on its line.
std::string Columns(const Rows& rows) {
  std::size_t width = 0;
  for (const auto& row : rows) {
    if (row.first.size() <= 28) width = std::max(width, row.first.size());
  }
  std::string out;
  for (const auto& [left, right] : rows) {
    const std::string indent(width + 4, ' ');
    std::string text = Wrap(right, 90, indent);
    if (left.size() <= width && !text.empty()) {
      out += "  " + left + text.substr(left.size() + 2);
    } else {
      out += fmt::format("  {}\n{}", left, text);
    }
  }
  return out;
}

std::string ExampleLines(const std::vector<Example>& examples) {
  std::string out;
  for (const Example& example : examples) {
    if (!example.says.empty()) out += "  # " + example.says + "\n";
    out += "  " + example.line + "\n";
  }
  return out;
}

Rows ChildRows(const CommandSpec& command) {
  Rows rows;
  for (const CommandSpec& child : command.children) {
    if (!child.hidden) rows.emplace_back(child.name, child.summary);
  }
  return rows;
}

Rows OptionRows(const std::vector<OptionSpec>& options,
                const std::vector<OptionSpec>& overridden_by) {
  Rows rows;
  for (const OptionSpec& option : options) {
    const bool overridden =
        std::any_of(overridden_by.begin(), overridden_by.end(),
                    [&](const OptionSpec& own) { return own.name == option.name; });
    if (!option.hidden && !overridden) rows.emplace_back(OptionLeft(option), OptionRight(option));
  }
  return rows;
}

std::string MarkdownCell(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '|') out += '\\';
    out += c;
  }
  return out;
}

void OptionTable(const std::vector<OptionSpec>& options, std::string* out) {
  *out += "| option | meaning | default |\n|---|---|---|\n";
  for (const OptionSpec& option : options) {
    if (option.hidden) continue;
    const std::string left =
        fmt::format("{}`--{}{}{}`", option.letter != 0 ? fmt::format("`-{}` ", option.letter) : "",
                    option.name, option.value.empty() ? "" : " ", option.value);
    *out += fmt::format("| {} | {} | {} |\n", MarkdownCell(left), MarkdownCell(option.help),
                        MarkdownCell(option.fallback));
  }
  *out += "\n";
}

void CommandSection(Path path, std::string* out) {
  const CommandSpec& command = *path.back();
  if (command.hidden) return;
  *out += fmt::format("{} {}\n\n{}.\n\n",
                      path.size() == 1   ? "##"
                      : path.size() == 2 ? "###"
                                         : "####",
                      FullName(path), command.summary);
  if (!command.description.empty()) *out += Wrap(command.description, 110, "") + "\n";
  if (command.verb != Verb::kGroup) {
    *out += "    " + UsageLine(path) + "\n\n";
    for (const WordSpec& word : command.words) {
      *out += fmt::format("- `{}`: {}\n", word.name, word.help);
    }
    if (!command.words.empty()) *out += "\n";
    if (!command.options.empty()) OptionTable(command.options, out);
    if (!command.examples.empty()) *out += "```sh\n";
    for (const Example& example : command.examples) {
      *out += example.line + (example.says.empty() ? "" : "   # " + example.says) + "\n";
    }
    if (!command.examples.empty()) *out += "```\n\n";
  }
  for (const CommandSpec& child : command.children) {
    Path deeper = path;
    deeper.push_back(&child);
    CommandSection(std::move(deeper), out);
  }
}

constexpr const char* kBash =
    R"(# bash completion for everstep; use: source <(everstep completion bash)
_everstep() {
  local IFS=$'\n'
  COMPREPLY=($(everstep __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
  if [ "${COMPREPLY[0]}" = "__files__" ]; then COMPREPLY=($(compgen -f -- "${COMP_WORDS[COMP_CWORD]}")); fi
}
complete -o nosort -F _everstep everstep 2>/dev/null || complete -F _everstep everstep
)";

constexpr const char* kZsh = R"(#compdef everstep
# zsh completion for everstep; use: source <(everstep completion zsh)
_everstep() {
  local -a found
  found=("${(@f)$(everstep __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
  if [[ "${found[1]}" == "__files__" ]]; then _files; else compadd -- ${found:#}; fi
}
if [[ "${funcstack[1]}" == "_everstep" ]]; then _everstep; else compdef _everstep everstep; fi
)";

constexpr const char* kFish = R"(# fish completion for everstep
function __everstep_complete
    set -l words (commandline -opc) (commandline -ct)
    set -l found (everstep __complete $words[2..-1] 2>/dev/null)
    if test "$found[1]" = __files__
        __fish_complete_path (commandline -ct)
    else
        printf '%s\n' $found
    end
end
complete -c everstep -f -a '(__everstep_complete)'
)";

}  // namespace

std::string Wrap(const std::string& text, std::size_t width, const std::string& indent) {
  std::string out;
  std::string line;
  const auto flush = [&] {
    if (!line.empty()) out += indent + line + "\n";
    line.clear();
  };
  for (std::size_t i = 0; i < text.size();) {
    if (text.compare(i, 2, "\n\n") == 0) {
      flush();
      out += "\n";
      i += 2;
      continue;
    }
    if (text[i] == ' ' || text[i] == '\n') {
      ++i;
      continue;
    }
    const std::size_t end = std::min(text.find_first_of(" \n", i), text.size());
    const std::string word = text.substr(i, end - i);
    if (!line.empty() && indent.size() + line.size() + 1 + word.size() > width) flush();
    line += (line.empty() ? "" : " ") + word;
    i = end;
  }
  flush();
  return out;
}

std::string ProgramHelp(const ProgramSpec& program, const std::vector<Topic>& topics) {
  std::string out =
      "everstep " + program.root.summary + "\n\nUsage: everstep COMMAND [options]\n\n";
  out += "Commands:\n" + Columns(ChildRows(program.root));
  Rows rows;
  for (const Topic& topic : topics) rows.emplace_back(topic.name, topic.summary);
  out += "\nTopics (everstep help TOPIC):\n" + Columns(rows);
  out += "\nOptions of every command:\n" + Columns(OptionRows(program.globals, {}));
  out += "\nExamples:\n" +
         ExampleLines(
             {{"everstep run --standalone --nproc-per-node 2 train.py", "in place of torchrun"},
              {"everstep cluster up --nodes 4", "a cluster on this machine, to try things"},
              {"everstep status", "what is wrong, and what was done"}});
  return out;
}

std::string CommandHelp(const ProgramSpec& program, const Path& path) {
  const CommandSpec& command = *path.back();
  std::string out =
      FullName(path) + ": " + command.summary + "\n\nUsage: " + UsageLine(path) + "\n";
  if (!command.description.empty()) out += "\n" + Wrap(command.description, 90, "");
  if (command.verb == Verb::kGroup) {
    out += "\nCommands:\n" + Columns(ChildRows(command));
  } else if (!command.passes_on) {
    Rows words;
    for (const WordSpec& word : command.words) words.emplace_back(word.name, word.help);
    if (!words.empty()) out += "\nArguments:\n" + Columns(words);
    if (!command.options.empty()) out += "\nOptions:\n" + Columns(OptionRows(command.options, {}));
    out += "\nOptions of every command:\n" + Columns(OptionRows(program.globals, command.options));
  }
  if (!command.examples.empty()) out += "\nExamples:\n" + ExampleLines(command.examples);
  return out;
}

std::string ReferencePage(const ProgramSpec& program, const std::vector<Topic>& topics) {
  std::string out =
      "# everstep, the command line\n\n"
      "This page is written by `everstep docs` from the command tree; a test keeps it equal.\n\n"
      "`everstep` " +
      program.root.summary +
      ".\nEvery command has `--help` with examples; "
      "`everstep completion SHELL` prints completion for bash, zsh and fish.\n\n"
      "## Options of every command\n\n";
  OptionTable(program.globals, &out);
  for (const Topic& topic : topics) {
    out += fmt::format("## {}\n\n```\n{}```\n\n", topic.summary, topic.text);
  }
  for (const CommandSpec& child : program.root.children) CommandSection({&child}, &out);
  while (out.size() > 1 && out.compare(out.size() - 2, 2, "\n\n") == 0) out.pop_back();
  return out;
}

std::string CompletionScript(const std::string& shell) {
  return shell == "bash" ? kBash : shell == "zsh" ? kZsh : kFish;
}

std::vector<std::string> Candidates(const ProgramSpec& program, const std::vector<Topic>& topics,
                                    const std::vector<std::string>& words, Names* names) {
  *names = Names::kNone;
  if (words.empty()) return {};
  const CommandSpec* at = &program.root;
  std::size_t taken = 0;
  const OptionSpec* pending = nullptr;  // waits for its value
  const auto find = [&](const std::string& word) -> const OptionSpec* {
    for (const auto* list : {&at->options, &program.globals}) {
      for (const OptionSpec& option : *list) {
        if (word == "--" + option.name ||
            (option.letter != 0 && word == std::string{'-', option.letter})) {
          return &option;
        }
      }
    }
    return nullptr;
  };
  for (std::size_t i = 0; i + 1 < words.size(); ++i) {
    const std::string& word = words[i];
    if (pending != nullptr) {
      pending = nullptr;
    } else if (!word.empty() && word[0] == '-') {
      const OptionSpec* option = find(word);
      pending = option != nullptr && !option->value.empty() ? option : nullptr;
    } else if (at->verb == Verb::kGroup) {
      const CommandSpec* next = FindCommand(*at, {word});
      if (next == nullptr) return {};
      at = next;
    } else {
      ++taken;
    }
    if (at->passes_on) {
      *names = Names::kFiles;
      return {};
    }
  }
  std::vector<std::string> all;
  if (pending != nullptr) {
    all = pending->choices;
    *names = pending->names;
  } else if (!words.back().empty() && words.back()[0] == '-') {
    for (const auto* list : {&at->options, &program.globals}) {
      for (const OptionSpec& option : *list) {
        if (!option.hidden) all.push_back("--" + option.name);
      }
    }
    all.push_back("--help");
  } else if (at->verb == Verb::kGroup) {
    for (const CommandSpec& child : at->children) {
      if (!child.hidden) all.push_back(child.name);
    }
  } else if (!at->words.empty()) {
    const WordSpec& word = at->words[std::min(taken, at->words.size() - 1)];
    const bool more = word.count == WordSpec::Count::kMany || word.count == WordSpec::Count::kAny;
    if (taken < at->words.size() || more) {
      all = word.choices;
      *names = word.names;
      if (word.names == Names::kTopics) {
        for (const CommandSpec& child : program.root.children) {
          if (!child.hidden) all.push_back(child.name);
        }
        for (const Topic& topic : topics) all.push_back(topic.name);
      }
    }
  }
  std::vector<std::string> fitting;
  for (const std::string& name : all) {
    if (name.rfind(words.back(), 0) == 0 &&
        std::find(fitting.begin(), fitting.end(), name) == fitting.end()) {
      fitting.push_back(name);
    }
  }
  return fitting;
}

}  // namespace everstep::cli
