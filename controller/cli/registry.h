// Which local clusters this user has. A name is a symbolic link below
// $XDG_STATE_HOME/everstep/names to the cluster's state directory, made exclusively: two `cluster
// up` of one name cannot both win.
//
// Stateless: every call looks at the file system. Thread-safe.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "controller/cli/proc.h"
#include "controller/cli/result.h"
#include "proto/base/whole_file.h"

namespace everstep::cli {

using Environment = std::map<std::string, std::string>;

// What `cluster up` decided; the file STATE/cluster, "key=value" lines.
struct ClusterPlan {
  std::string name;
  std::string created;             // RFC 3339 UTC
  std::string programs;            // folder of everstep-controller and everstep-agent
  std::string listen;              // the controller's, as asked for
  std::vector<std::string> nodes;  // names
  unsigned slots = 0;              // workers a node may run; 0: no limit
};

struct ClusterInfo {
  std::string name;
  std::string state_dir;   // absolute
  bool running = false;    // the supervisor lives
  ProcessId supervisor;    // pid 0: unknown
  std::string controller;  // host:port; empty: none yet
  std::string http;        // host:port of /metrics; empty: none
  ClusterPlan plan;        // empty name: unreadable
};

class Registry {
 public:
  // Below XDG_STATE_HOME, HOME, or a directory of this user in /tmp.
  explicit Registry(const Environment& environment);

  const std::string& root() const { return root_; }
  std::string DefaultStateDir(const std::string& name) const;

  // Sorted by name; stale ones too.
  std::vector<ClusterInfo> List() const;
  // kNotFound names the nearest.
  Result<ClusterInfo> Find(const std::string& name) const;
  // The only running one. None or several: an error that says what to do.
  Result<ClusterInfo> Only() const;
  // The running one whose controller is at `address`, else Only()'s error.
  Result<ClusterInfo> ByController(const std::string& address) const;

  // kConflict when the name is taken.
  Outcome Add(const std::string& name, const std::string& state_dir) const;
  // The name, and folders of ours that are empty then.
  void Remove(const std::string& name) const;

 private:
  std::string root_;
};

// Reads what STATE holds. Never fails: what cannot be read is empty.
ClusterInfo ReadCluster(const std::string& name, const std::string& state_dir);

Outcome WritePlan(const std::string& state_dir, const ClusterPlan& plan);
Result<ClusterPlan> ReadPlan(const std::string& state_dir);

// The whole file, at most 1 MiB; empty when it cannot be read.
std::string ReadSmallFile(const std::string& path);
// As WriteWhole (proto/base/whole_file.h). The error names the path.
Outcome WriteSmallFile(const std::string& path, const std::string& content,
                       Durable durable = Durable::kNo);
// The last `lines` lines, at most 4 KiB, without the final line feed.
std::string LastLines(const std::string& path, std::size_t lines);

}  // namespace everstep::cli
