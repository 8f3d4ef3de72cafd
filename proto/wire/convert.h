// The values of proto/base/plan.h as proto/agent.proto, and back: the only place that knows both.
// Agents, the controller and its store all write these messages by it. Pure functions, thread-safe.
#pragma once

#include <cstddef>

#include "agent.pb.h"
#include "proto/base/plan.h"

namespace everstep::wire {

// Of an exit's error_json; what is longer is cut, both ways.
inline constexpr std::size_t kMaxErrorJson = 64u << 10;
inline constexpr std::size_t kMaxRefusal = 4u << 10;

// False: it holds no Command; *to is then not to be used.
bool ToProto(const CommandSpec& from, v1::Command* to);
CommandSpec FromProto(const v1::Command& from);

void ToProto(const ExitInfo& from, v1::ExitInfo* to);
ExitInfo FromProto(const v1::ExitInfo& from);

// A running worker's message has no exit.
void ToProto(const WorkerOnNode& from, v1::WorkerOnNode* to);
WorkerOnNode FromProto(const v1::WorkerOnNode& from);

void ToProto(const HeldShard& from, v1::HeldShard* to);
HeldShard FromProto(const v1::HeldShard& from);

void ToProto(const JobOnNode& from, v1::JobOnNode* to);
JobOnNode FromProto(const v1::JobOnNode& from);

void ToProto(const Cut& from, v1::Cut* to);
Cut FromProto(const v1::Cut& from);

// A worker without a restore starts from nothing (step kNoStep).
void ToProto(const NodePlan& from, v1::NodePlan* to);
NodePlan FromProto(const v1::NodePlan& from);

// Callers leave the message out when there are no groups.
void ToProto(const ParityPlan& from, v1::ParityPlan* to);
ParityPlan FromProto(const v1::ParityPlan& from);

void ToProto(const CutShard& from, v1::CutShard* to);
CutShard FromProto(const v1::CutShard& from);

// Callers leave the message out when there are no shards.
void ToProto(const RestoreCut& from, v1::RestoreCut* to);
RestoreCut FromProto(const v1::RestoreCut& from);

}  // namespace everstep::wire
