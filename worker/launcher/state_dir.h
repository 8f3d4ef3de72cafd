// The directory of one run: its controller's store, its node, the workers' logs. One launcher at a
// time.
//
//   STATE/{run,lock}  controller/  nodes/NAME/
//
// Not thread-safe. `run` marks a directory as a launcher's own: what an earlier run left in it may
// be cleared; a cluster's directory, which has no such mark, is refused.
#pragma once

#include <string>

#include "worker/launcher/flags.h"

namespace everstep::launcher {

class StateDir {
 public:
  StateDir() = default;
  ~StateDir();
  StateDir(const StateDir&) = delete;
  StateDir& operator=(const StateDir&) = delete;

  // `wanted` empty: a new directory below $TMPDIR (or /tmp) that Remove may take away. Else that
  // one, made if need be. Empty on success, else the error in the launcher's form.
  std::string Open(const std::string& wanted, const std::string& node,
                   const Environment& environment, const std::string& random);

  const std::string& path() const { return path_; }
  std::string controller() const { return path_ + "/controller"; }
  std::string node_dir() const { return path_ + "/nodes/" + node_; }
  const std::string& node() const { return node_; }
  bool temporary() const { return temporary_; }

  // Takes everything away if it is temporary; else only what means nothing after the run (sockets,
  // pid files). The logs of a directory that the user named stay.
  void Clean();
  // Keeps the workers' and the programs' logs, takes the rest.
  void CleanButLogs();

 private:
  std::string path_;
  std::string node_;
  bool temporary_ = false;
  bool opened_ = false;  // what is not ours is not cleaned
  int lock_ = -1;
};

}  // namespace everstep::launcher
