// The core's state as people read it: the messages of proto/admin.proto. Pure functions; call on
// the thread that owns the state.
#pragma once

#include <string>

#include "admin.pb.h"
#include "controller/core/state.h"

namespace everstep::controller {

v1::NodeStatus NodeStatusOf(const ClusterState& state, const NodeState& node, Timestamp now);
v1::JobStatus JobStatusOf(const ClusterState& state, const JobStateView& job, Timestamp now);
v1::Event EventOf(const JournalRecord& record);

// Where the job's command wants its logs; empty: each agent's own place.
std::string LogDirOf(const CommandSpec& command);

// Every record but the journal, for a successor controller.
v1::StoreSnapshot SnapshotOf(const ClusterState& state, const std::string& cluster);

// The job of that id, or the only one whose id starts with it (4 characters or more). Null: *error
// says why, with what there is.
const JobStateView* FindJobByPrefix(const ClusterState& state, const std::string& id,
                                    std::string* error);

}  // namespace everstep::controller
