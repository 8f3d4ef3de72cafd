// Help, the reference page and completion scripts, written from the command tree. Pure.
#pragma once

#include <string>
#include <vector>

#include "controller/cli/command.h"
#include "controller/cli/tree.h"

namespace everstep::cli {

// `everstep --help`.
std::string ProgramHelp(const ProgramSpec& program, const std::vector<Topic>& topics);

// `everstep PATH --help`. REQUIRES a path that Parse or FindCommand gave.
std::string CommandHelp(const ProgramSpec& program, const std::vector<const CommandSpec*>& path);

// docs/reference/cli.md.
std::string ReferencePage(const ProgramSpec& program, const std::vector<Topic>& topics);

// "bash", "zsh", "fish". The scripts ask `everstep __complete WORD...` for candidates, so they do
// not age with the tree.
std::string CompletionScript(const std::string& shell);

// What may stand at the end of `words` (the last one is being typed and may be empty): commands and
// options of the tree, and choices; `names` is filled with the kind of names to add from outside.
std::vector<std::string> Candidates(const ProgramSpec& program, const std::vector<Topic>& topics,
                                    const std::vector<std::string>& words, Names* names);

// Words wrapped at `width`, each line indented; paragraphs are separated by "\n\n".
std::string Wrap(const std::string& text, std::size_t width, const std::string& indent);

}  // namespace everstep::cli
