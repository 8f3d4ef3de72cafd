// Commands that ask nobody: version, help, completion, docs, and those that become another program.
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include <fmt/format.h>

#include "controller/cli/manual.h"
#include "controller/cli/suggest.h"
#include "controller/cli/tree.h"
#include "controller/cli/verbs.h"
#include "proto/base/errno_text.h"
#include "proto/base/version.h"

namespace everstep::cli {
namespace {

bool Executable(const std::string& path) {
  return ::access(path.c_str(), X_OK) == 0;
}

// The folder this program was called from, links not followed, so that what stands beside the link
// (a virtual environment's python) is found beside it.
std::string CalledFolder(const std::string& called_as, const Environment& environment) {
  if (const std::size_t slash = called_as.rfind('/'); slash != std::string::npos) {
    return called_as.substr(0, slash);
  }
  const auto path = environment.find("PATH");
  if (path == environment.end()) return "";
  for (std::size_t at = 0; at <= path->second.size();) {
    const std::size_t colon = std::min(path->second.find(':', at), path->second.size());
    std::string folder = path->second.substr(at, colon - at);
    if (!folder.empty() && Executable(fmt::format("{}/{}", folder, called_as))) return folder;
    at = colon + 1;
  }
  return "";
}

// The words of `everstep run` ask for help, or for a node of their own: EVERSTEP_CLUSTER, which may
// name one that is gone, is not looked at then. Flags end where the script begins: at a word that
// is no flag and may be no flag's value.
bool AsksNoCluster(const std::vector<std::string>& words) {
  bool value = false;  // the word before may take this one
  for (const std::string& word : words) {
    const bool flag = word.size() > 1 && word[0] == '-';
    if (word == "--" || word.ends_with(".py") || (!flag && !value)) return false;
    if (word == "--help" || word == "-h" || word == "--version" || word == "--standalone") {
      return true;
    }
    value = flag && word.find('=') == std::string::npos;
  }
  return false;
}

}  // namespace

VerbResult RunVersion(Context& context) {
  if (context.json()) {
    context.Out(
        fmt::format("{{\"apiVersion\":\"everstep/v1\",\"kind\":\"Version\",\"version\":\"{}\","
                    "\"protocol\":{}}}\n",
                    kVersion, kProtocolVersion));
  } else {
    context.Out(context.output == Output::kName ? fmt::format("{}\n", kVersion)
                                                : fmt::format("everstep {}\n", kVersion));
  }
  return ExitCode::kOk;
}

VerbResult RunHelp(Context& context) {
  const std::vector<std::string>& words = context.args.words;
  if (words.empty()) {
    context.Out(ProgramHelp(Program(), Topics()));
    return ExitCode::kOk;
  }
  std::vector<std::string> names;
  for (const Topic& topic : Topics()) {
    if (words.size() == 1 && words[0] == topic.name) {
      context.Out(topic.summary + "\n\n" + topic.text);
      return ExitCode::kOk;
    }
    names.push_back(topic.name);
  }
  std::vector<const CommandSpec*> path;
  std::vector<std::string> so_far;
  for (const std::string& word : words) {
    so_far.push_back(word);
    path.push_back(FindCommand(Program().root, so_far));
    if (path.back() != nullptr) continue;
    const CommandSpec* parent = path.size() > 1 ? path[path.size() - 2] : &Program().root;
    if (parent != &Program().root) names.clear();
    for (const CommandSpec& child : parent->children) {
      if (!child.hidden) names.push_back(child.name);
    }
    const std::string near = Nearest(word, names);
    return CliError{ExitCode::kUsage, "INVALID_ARGUMENT",
                    fmt::format("there is no help on \"{}\"", word),
                    near.empty() ? "everstep help lists commands and topics"
                                 : fmt::format("did you mean: {}", near)};
  }
  context.Out(CommandHelp(Program(), path));
  return ExitCode::kOk;
}

VerbResult RunCompletion(Context& context) {
  context.Out(CompletionScript(context.args.words[0]));
  return ExitCode::kOk;
}

VerbResult RunComplete(Context& context) {
  Names kind = Names::kNone;
  const std::string last = context.args.words.empty() ? "" : context.args.words.back();
  for (const std::string& name : Candidates(Program(), Topics(), context.args.words, &kind)) {
    context.Out(name + "\n");
  }
  const auto offer = [&](const std::string& name) {
    if (name.rfind(last, 0) == 0) context.Out(name + "\n");
  };
  // A shell waits for this at each Tab: half a second, and silence rather than an error.
  context.timeout = std::chrono::milliseconds(500);
  if (kind == Names::kFiles) context.Out("__files__\n");
  if (kind == Names::kClusters) {
    for (const ClusterInfo& cluster : context.registry.List()) offer(cluster.name);
  }
  if (kind == Names::kJobs || kind == Names::kNodes) {
    Result<std::unique_ptr<AdminClient>> client = context.Client();
    if (!client.ok()) return ExitCode::kOk;
    if (kind == Names::kJobs) {
      Result<v1::JobList> jobs = client.value()->ListJobs();
      if (!jobs.ok()) return ExitCode::kOk;
      for (const v1::JobStatus& job : jobs.value().items()) offer(job.job());
    } else {
      Result<v1::NodeList> nodes = client.value()->ListNodes();
      if (!nodes.ok()) return ExitCode::kOk;
      for (const v1::NodeStatus& node : nodes.value().items()) offer(node.node());
    }
  }
  return ExitCode::kOk;
}

VerbResult RunDocs(Context& context) {
  context.Out(ReferencePage(Program(), Topics()));
  return ExitCode::kOk;
}

VerbResult RunProgramBeside(Context& context, const std::string& called_as) {
  // `everstep --cluster demo run ...`: the program beside knows addresses only.
  Environment environment = context.env;
  const bool named =
      context.args.Has("controller") || context.args.Has("cluster") ||
      (context.env.count("EVERSTEP_CLUSTER") > 0 && context.env.count("EVERSTEP_CONTROLLER") == 0 &&
       !AsksNoCluster(context.args.words));
  if (named) {
    const Result<std::string> address = context.ControllerAddress();
    if (!address.ok()) return address.error();
    environment["EVERSTEP_CONTROLLER"] = address.value();
  }
  const std::string name = "everstep-" + context.args.command()->name;
  const std::string beside = CalledFolder(called_as, context.env) + "/" + name;
  const std::string own = OwnFolder() + "/" + name;
  const std::string program = Executable(beside) ? beside : own;
  std::vector<char*> argv{const_cast<char*>(program.c_str())};
  for (const std::string& word : context.args.words) {
    argv.push_back(const_cast<char*>(word.c_str()));
  }
  argv.push_back(nullptr);
  std::vector<std::string> entries;
  entries.reserve(environment.size());
  for (const auto& [variable, value] : environment) {
    entries.push_back(fmt::format("{}={}", variable, value));
  }
  std::vector<char*> envp;
  envp.reserve(entries.size() + 1);
  for (std::string& entry : entries) envp.push_back(entry.data());
  envp.push_back(nullptr);
  ::execve(program.c_str(), argv.data(), envp.data());
  return CliError{ExitCode::kFailed, "NOT_FOUND",
                  fmt::format("cannot start {}: {}", program, ErrnoText(errno)),
                  fmt::format("{} belongs beside everstep; is the installation whole?", name)};
}

}  // namespace everstep::cli
