// A command tree as data, and the parser that reads a command line by it. Help, completion, the
// reference page and the errors all come from the same tree, so they cannot disagree.
//
// Pure: no IO, no globals. Specs are values that live as long as the program.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "controller/cli/result.h"

namespace everstep::cli {

enum class Verb : std::uint8_t {
  kGroup,  // has children, does nothing itself
  kStatus,
  kJobList,
  kJobShow,
  kJobWait,
  kJobCancel,
  kJobLedger,
  kJobPlan,
  kNodeList,
  kNodeShow,
  kNodeDrain,
  kNodeUndrain,
  kCkptPlacement,
  kCkptSurvive,
  kCkptTraffic,
  kEvents,
  kLogs,
  kRun,
  kVersion,
  kHelp,
  kCompletion,
  kComplete,
  kDocs,
  kClusterUp,
  kClusterDown,
  kClusterList,
  kClusterSupervise,
  kClusterStart,
  kKillWorker,
  kKillNode,
  kKillAgent,
  kKillKeeper,
  kKillController,
  kPauseWorker,
  kPauseNode,
  kPauseAgent,
  kPauseKeeper,
  kPauseController,
  kResumeWorker,
  kResumeNode,
  kResumeAgent,
  kResumeKeeper,
  kResumeController,
  kCkptList,
  kCkptShow,
  kCkptVerify,
  kCkptSave,
  kCkptPrune,
  kCkptExport,
  kCkptDiff,
  kCkptPlan,
  kCkptRollback,
  kCkptAnomaly,
  kPlanTemplates,
  kPlanCompose,
  kPlanLose,
  kPlanJoin,
  kPlanExplain,
  kSimulate
};

// What a word completes to in a shell, besides the names of the tree.
enum class Names : std::uint8_t { kNone, kJobs, kNodes, kClusters, kFiles, kTopics };

struct OptionSpec {
  std::string name;                       // "timeout": typed as --timeout
  char letter = 0;                        // 'o': typed as -o; 0: none
  std::string value;                      // "SECONDS" in help; empty: a switch
  std::string help;                       // one sentence, no full stop
  std::string fallback = {};              // what holds when it is not given, for help
  std::vector<std::string> choices = {};  // the only values; empty: any
  Names names = Names::kNone;
  bool hidden = false;
  bool repeats = false;  // may stand there several times: the values, joined with commas
};

struct WordSpec {
  enum class Count : std::uint8_t { kOne, kOptional, kMany, kAny };  // kMany: at least one
  std::string name;                                                  // "JOB"
  std::string help;
  Names names = Names::kNone;
  Count count = Count::kOne;
  std::vector<std::string> choices = {};
};

struct Example {
  std::string line;
  std::string says;
};

struct CommandSpec {
  std::string name;
  Verb verb = Verb::kGroup;
  std::string summary;           // a phrase for lists
  std::string description = {};  // paragraphs, wrapped at 78
  std::vector<WordSpec> words = {};
  std::vector<OptionSpec> options = {};  // its own; global ones come on top
  std::vector<Example> examples = {};
  std::vector<CommandSpec> children = {};
  std::vector<std::string> aliases = {};
  bool hidden = false;
  bool passes_on = false;  // everything after its name belongs to another program
};

struct ProgramSpec {
  CommandSpec root;
  std::vector<OptionSpec>
      globals;  // understood by every command; a command's own of that name wins
};

struct Parsed {
  std::vector<const CommandSpec*> path;  // from the root's child to the command; empty: the root
  std::map<std::string, std::string> options;  // by long name; a switch has "true"; the last wins
  std::vector<std::string> words;
  bool help = false;

  const CommandSpec* command() const { return path.empty() ? nullptr : path.back(); }
  bool Has(const std::string& name) const { return options.count(name) > 0; }
  std::string Get(const std::string& name, const std::string& fallback = "") const;
  // "job show"
  std::string CommandName() const;
};

// `args` without the program's name. An error names the nearest command or option and has exit
// kUsage. `program` must outlive the result.
Result<Parsed> Parse(const ProgramSpec& program, const std::vector<std::string>& args);

// The command that `names` walk to; nullptr: none. Hidden ones and aliases are found too.
const CommandSpec* FindCommand(const CommandSpec& root, const std::vector<std::string>& names);

// "90s" "500ms" "5m" "2h" "1d", a plain number is seconds; 0 to 365 days. The error names `what`.
Result<std::chrono::milliseconds> ParseDuration(const std::string& what, const std::string& text);

// A decimal integer in [low, high]. The error names `what` and both limits.
Result<std::int64_t> ParseInteger(const std::string& what, const std::string& text,
                                  std::int64_t low, std::int64_t high);

}  // namespace everstep::cli
