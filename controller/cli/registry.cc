#include "controller/cli/registry.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "controller/cli/suggest.h"
#include "proto/base/errno_text.h"
#include "proto/base/whole_file.h"

namespace everstep::cli {
namespace fs = std::filesystem;
namespace {

std::string Lookup(const Environment& environment, const std::string& name) {
  const auto it = environment.find(name);
  return it == environment.end() ? "" : it->second;
}

std::string FirstWord(const std::string& text) {
  std::istringstream in(text);
  std::string word;
  in >> word;
  return word;
}

CliError Failed(const std::string& what, const std::string& path, int error) {
  return {ExitCode::kFailed, "FAILED",
          fmt::format("cannot {} {}: {}", what, path, ErrnoText(error)),
          error == ENOSPC ? "free some space, or choose another place with --state-dir"
          : error == EACCES || error == EROFS
              ? "choose a directory that you may write, with --state-dir or XDG_STATE_HOME"
              : ""};
}

}  // namespace

Registry::Registry(const Environment& environment) {
  const std::string xdg = Lookup(environment, "XDG_STATE_HOME");
  const std::string home = Lookup(environment, "HOME");
  if (!xdg.empty() && xdg[0] == '/') {
    root_ = xdg + "/everstep";
  } else if (!home.empty()) {
    root_ = home + "/.local/state/everstep";
  } else {
    root_ = fmt::format("/tmp/everstep-{}", ::getuid());
  }
}

std::string Registry::DefaultStateDir(const std::string& name) const {
  return root_ + "/clusters/" + name;
}

std::vector<ClusterInfo> Registry::List() const {
  std::vector<ClusterInfo> out;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(root_ + "/names", error)) {
    std::error_code unreadable;
    const fs::path target = fs::read_symlink(entry.path(), unreadable);
    if (unreadable) continue;
    out.push_back(ReadCluster(entry.path().filename(), target));
  }
  std::sort(out.begin(), out.end(),
            [](const ClusterInfo& a, const ClusterInfo& b) { return a.name < b.name; });
  return out;
}

Result<ClusterInfo> Registry::Find(const std::string& name) const {
  std::vector<std::string> names;
  for (ClusterInfo& cluster : List()) {
    if (cluster.name == name) return std::move(cluster);
    names.push_back(cluster.name);
  }
  const std::string near = Nearest(name, names);
  return CliError{ExitCode::kNotFound, "NOT_FOUND",
                  fmt::format("no local cluster is named \"{}\"", name),
                  !near.empty()   ? fmt::format("did you mean: {}", near)
                  : names.empty() ? "start one: everstep cluster up --nodes 4"
                                  : fmt::format("there are: {}", fmt::join(names, ", "))};
}

Result<ClusterInfo> Registry::Only() const {
  std::vector<ClusterInfo> running;
  std::vector<std::string> names;
  for (ClusterInfo& cluster : List()) {
    if (!cluster.running) continue;
    names.push_back(cluster.name);
    running.push_back(std::move(cluster));
  }
  if (running.size() == 1) return std::move(running.front());
  if (running.empty()) {
    return CliError{ExitCode::kUsage, "INVALID_ARGUMENT",
                    "no controller is named, and no local cluster runs",
                    "give --controller host:port, or set EVERSTEP_CONTROLLER, or start a local "
                    "cluster: everstep cluster up --nodes 4"};
  }
  return CliError{ExitCode::kUsage, "INVALID_ARGUMENT",
                  fmt::format("{} local clusters run: {}", names.size(), fmt::join(names, ", ")),
                  fmt::format("say which: --cluster {}", names.front())};
}

Result<ClusterInfo> Registry::ByController(const std::string& address) const {
  for (ClusterInfo& cluster : List()) {
    if (!cluster.controller.empty() &&
        ("," + address + ",").find("," + cluster.controller + ",") != std::string::npos) {
      return std::move(cluster);
    }
  }
  return CliError{ExitCode::kNotFound, "NOT_FOUND",
                  fmt::format("the controller at {} is of no local cluster of this user", address),
                  "drills on processes work where the processes are; `everstep cluster list` "
                  "shows the local ones"};
}

Outcome Registry::Add(const std::string& name, const std::string& state_dir) const {
  std::error_code error;
  fs::create_directories(root_ + "/names", error);
  if (error) return Failed("make", root_ + "/names", error.value());
  const std::string link = root_ + "/names/" + name;
  if (::symlink(state_dir.c_str(), link.c_str()) == 0) return Done{};
  if (errno != EEXIST) return Failed("make", link, errno);
  const Result<ClusterInfo> there = Find(name);
  const bool running = there.ok() && there.value().running;
  return CliError{
      ExitCode::kConflict, "ALREADY_EXISTS",
      running ? fmt::format("a cluster named \"{}\" runs already", name)
              : fmt::format("a stale cluster is named \"{}\": its supervisor is gone", name),
      running ? fmt::format("choose another --name, or end it: everstep cluster down {}", name)
              : fmt::format("clean it up: everstep cluster down {}", name)};
}

void Registry::Remove(const std::string& name) const {
  std::error_code ignored;
  fs::remove(root_ + "/names/" + name, ignored);
  ::rmdir((root_ + "/names").c_str());
  ::rmdir((root_ + "/clusters").c_str());
  ::rmdir(root_.c_str());
}

ClusterInfo ReadCluster(const std::string& name, const std::string& state_dir) {
  ClusterInfo info;
  info.name = name;
  info.state_dir = state_dir;
  std::istringstream pid(ReadSmallFile(state_dir + "/supervisor.pid"));
  pid >> info.supervisor.pid >> info.supervisor.start_time;
  info.running = Alive(info.supervisor);
  info.controller = FirstWord(ReadSmallFile(state_dir + "/controller/address"));
  info.http = FirstWord(ReadSmallFile(state_dir + "/controller/http.address"));
  if (Result<ClusterPlan> plan = ReadPlan(state_dir); plan.ok()) info.plan = plan.value();
  return info;
}

Outcome WritePlan(const std::string& state_dir, const ClusterPlan& plan) {
  return WriteSmallFile(state_dir + "/cluster",
                        fmt::format("name={}\ncreated={}\nprograms={}\nlisten={}\nnodes={}\n"
                                    "slots={}\n",
                                    plan.name, plan.created, plan.programs, plan.listen,
                                    fmt::join(plan.nodes, " "), plan.slots),
                        Durable::kYes);
}

Result<ClusterPlan> ReadPlan(const std::string& state_dir) {
  ClusterPlan plan;
  std::istringstream in(ReadSmallFile(state_dir + "/cluster"));
  for (std::string line; std::getline(in, line);) {
    const std::size_t equals = line.find('=');
    if (equals == std::string::npos) continue;
    const std::string key = line.substr(0, equals);
    const std::string value = line.substr(equals + 1);
    if (key == "name") plan.name = value;
    if (key == "created") plan.created = value;
    if (key == "programs") plan.programs = value;
    if (key == "listen") plan.listen = value;
    if (key == "slots")
      plan.slots = static_cast<unsigned>(std::strtoul(value.c_str(), nullptr, 10));
    if (key == "nodes") {
      std::istringstream names(value);
      for (std::string node; names >> node;) plan.nodes.push_back(node);
    }
  }
  if (plan.name.empty() || plan.nodes.empty()) {
    return CliError{ExitCode::kFailed, "FAILED",
                    fmt::format("{} is no cluster's state directory: its file \"cluster\" is "
                                "missing or damaged",
                                state_dir),
                    "everstep cluster list shows the clusters and where they are"};
  }
  return plan;
}

std::string ReadSmallFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::string out(1 << 20, '\0');
  in.read(out.data(), static_cast<std::streamsize>(out.size()));
  out.resize(static_cast<std::size_t>(in.gcount()));
  return out;
}

Outcome WriteSmallFile(const std::string& path, const std::string& content, Durable durable) {
  const int error = WriteWhole(path, content, durable);
  if (error != 0) return Failed("write", path, error);
  return Done{};
}

std::string LastLines(const std::string& path, std::size_t lines) {
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  if (!in) return "";
  const std::streamoff size = in.tellg();
  const std::streamoff from = std::max<std::streamoff>(0, size - 4096);
  in.seekg(from);
  std::string text(static_cast<std::size_t>(size - from), '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  while (!text.empty() && text.back() == '\n') text.pop_back();
  std::size_t at = text.size();
  for (std::size_t n = 0; n < lines && at != std::string::npos; ++n) {
    at = at == 0 ? std::string::npos : text.rfind('\n', at - 1);
  }
  return at == std::string::npos ? text : text.substr(at + 1);
}

}  // namespace everstep::cli
