// Replies as text: the tables people read and the JSON scripts read. Pure.
#pragma once

#include <cstddef>
#include <string>

#include <google/protobuf/message.h>

#include "admin.pb.h"

namespace everstep::cli {

enum class Output { kTable, kJson, kJsonl, kName };

struct RenderOptions {
  bool headers = true;
  std::size_t max_width = 0;  // of the terminal; 0: not a terminal, cut nothing
};

std::string RenderStatus(const v1::ClusterStatus& status, const RenderOptions& options);
std::string RenderJobs(const v1::JobList& jobs, const RenderOptions& options);
std::string RenderJob(const v1::JobStatus& job, const RenderOptions& options);
std::string RenderNodes(const v1::NodeList& nodes, const RenderOptions& options);
std::string RenderNode(const v1::NodeStatus& node, const RenderOptions& options);

// One line, never cut: events come one at a time, so their columns are fixed, and the end is what
// counts.
//   14:02:11.482 WARNING node_lost            node_died         n7: message [evidence]
std::string RenderEvent(const v1::Event& event);

// The message as protobuf JSON on one line, fields named as in admin.proto, defaults written out.
std::string ToJsonLine(const google::protobuf::Message& message);

// The contract of -o json: {"apiVersion":"everstep/v1","kind":KIND, then the message's fields}.
std::string ToJson(const std::string& kind, const google::protobuf::Message& message);

}  // namespace everstep::cli
