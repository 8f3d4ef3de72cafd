// A node's own command line, where each node of a job was given one (`everstep run` on several
// machines): what a worker here is started with comes from this node's shell, not from that of the
// node that handed the job in.
//
// Immutable after Load; thread-safe.
#pragma once

#include <string>

#include "agent.pb.h"

namespace everstep::agent {

class LocalCommand {
 public:
  // A serialised v1::Command. Empty `path`: nothing is overlaid. False: *error says who and what.
  bool Load(const std::string& path, std::string* error);

  // Replaces the command of a Warm, Prepare or Activate; what all nodes must agree on (the run's
  // id, the restart budget, grace times) stays the job's.
  void Overlay(v1::ControllerMessage* message) const;

 private:
  bool given_ = false;
  v1::Command command_;
};

}  // namespace everstep::agent
