#include "proto/wire/convert.h"

#include <utility>

namespace everstep::wire {
namespace {

void ToProto(const CutHolder& from, v1::CutHolder* to) {
  to->set_node(from.node);
  to->set_address(from.address);
}

void ToProto(const RestorePlan& from, v1::Restore* to) {
  to->set_step(from.step);
  to->set_shard_rank(from.shard_rank);
  to->set_shard_generation(from.shard_generation);
  to->set_crc_root(from.crc_root);
  to->set_bytes(from.bytes);
  to->set_source_node(from.source_node);
  to->set_source_address(from.source_address);
  to->set_file(from.file);
  to->set_ranges(from.ranges);
  to->set_relay(from.relay);
  for (const CutHolder& other : from.others) ToProto(other, to->add_others());
}

RestorePlan FromProto(const v1::Restore& from) {
  RestorePlan to{.step = from.step(),
                 .shard_rank = from.shard_rank(),
                 .shard_generation = from.shard_generation(),
                 .crc_root = from.crc_root(),
                 .bytes = from.bytes(),
                 .source_node = from.source_node(),
                 .source_address = from.source_address(),
                 .file = from.file(),
                 .ranges = from.ranges(),
                 .relay = from.relay()};
  to.others.reserve(static_cast<std::size_t>(from.others_size()));
  for (const v1::CutHolder& other : from.others()) {
    to.others.push_back({other.node(), other.address()});
  }
  return to;
}

void ToProto(const WorkerPlan& from, v1::WorkerPlan* to) {
  to->set_rank(from.rank);
  to->set_local_rank(from.local_rank);
  to->set_role_rank(from.rank);
  ToProto(from.restore, to->mutable_restore());
}

WorkerPlan FromProto(const v1::WorkerPlan& from) {
  WorkerPlan to{.rank = from.rank(), .local_rank = from.local_rank()};
  if (from.has_restore()) to.restore = FromProto(from.restore());
  return to;
}

}  // namespace

bool ToProto(const CommandSpec& from, v1::Command* to) {
  return to->ParseFromString(from.opaque);
}

CommandSpec FromProto(const v1::Command& from) {
  return {from.SerializeAsString()};
}

void ToProto(const ExitInfo& from, v1::ExitInfo* to) {
  to->set_code(from.code);
  to->set_oom_killed(from.oom_killed);
  to->set_by_everstep(from.by_everstep);
  to->set_exit_ns(from.occurred.ns);
  to->set_error_json(from.error_json.substr(0, kMaxErrorJson));
  to->set_error_file(from.error_file);
  to->set_error_time_ns(from.error_time.ns);
  to->set_ran_ms(ToMilliseconds(from.ran));
  to->set_refused(from.refused.substr(0, kMaxRefusal));
}

ExitInfo FromProto(const v1::ExitInfo& from) {
  return {.code = from.code(),
          .oom_killed = from.oom_killed(),
          .by_everstep = from.by_everstep(),
          .occurred = {from.exit_ns()},
          .error_json = from.error_json().substr(0, kMaxErrorJson),
          .error_file = from.error_file(),
          .error_time = {from.error_time_ns()},
          .ran = Milliseconds(from.ran_ms()),
          .refused = from.refused().substr(0, kMaxRefusal)};
}

void ToProto(const WorkerOnNode& from, v1::WorkerOnNode* to) {
  to->set_rank(from.rank);
  to->set_local_rank(from.local_rank);
  to->set_pid(from.pid);
  to->set_running(from.running);
  if (!from.running) ToProto(from.exit, to->mutable_exit());
}

WorkerOnNode FromProto(const v1::WorkerOnNode& from) {
  return {.rank = from.rank(),
          .local_rank = from.local_rank(),
          .pid = from.pid(),
          .running = from.running(),
          .exit = FromProto(from.exit())};
}

void ToProto(const HeldShard& from, v1::HeldShard* to) {
  to->set_rank(from.rank);
  to->set_world_size(from.world_size);
  to->set_generation(from.generation);
  to->set_step(from.step);
  to->set_crc_root(from.crc_root);
  to->set_bytes(from.bytes);
  to->set_replica(from.replica);
  to->set_replicated_layout(from.replicated_layout);
  to->set_file(from.file);
  to->set_share(from.share);
  to->set_built(from.built);
}

HeldShard FromProto(const v1::HeldShard& from) {
  return {.rank = from.rank(),
          .world_size = from.world_size(),
          .generation = from.generation(),
          .step = from.step(),
          .crc_root = from.crc_root(),
          .bytes = from.bytes(),
          .replica = from.replica(),
          .replicated_layout = from.replicated_layout(),
          .file = from.file(),
          .share = from.share(),
          .built = from.built()};
}

void ToProto(const JobOnNode& from, v1::JobOnNode* to) {
  to->set_job(from.job);
  to->set_generation(from.generation);
  to->set_activated(from.activated);
  for (const WorkerOnNode& worker : from.workers) ToProto(worker, to->add_workers());
  for (const HeldShard& shard : from.shards) ToProto(shard, to->add_shards());
}

JobOnNode FromProto(const v1::JobOnNode& from) {
  JobOnNode to;
  to.job = from.job();
  to.generation = from.generation();
  to.activated = from.activated();
  for (const v1::WorkerOnNode& worker : from.workers()) to.workers.push_back(FromProto(worker));
  for (const v1::HeldShard& shard : from.shards()) to.shards.push_back(FromProto(shard));
  return to;
}

void ToProto(const Cut& from, v1::Cut* to) {
  to->set_generation(from.generation);
  to->set_step(from.step);
}

Cut FromProto(const v1::Cut& from) {
  return {.generation = from.generation(), .step = from.step()};
}

void ToProto(const NodePlan& from, v1::NodePlan* to) {
  to->set_node(from.node);
  to->set_group_rank(from.group_rank);
  to->set_address(from.address);
  to->set_data_port(from.data_port);
  for (const PeerPlan& peer : from.peers) {
    to->add_replica_nodes(peer.node);
    to->add_replica_addresses(peer.address);
  }
  for (const WorkerPlan& worker : from.workers) ToProto(worker, to->add_workers());
}

NodePlan FromProto(const v1::NodePlan& from) {
  NodePlan to{.node = from.node(),
              .group_rank = from.group_rank(),
              .address = from.address(),
              .data_port = from.data_port(),
              .workers = {},
              .peers = {}};
  const int peers = std::min(from.replica_nodes_size(), from.replica_addresses_size());
  for (int i = 0; i < peers; ++i) {
    to.peers.push_back({from.replica_nodes(i), from.replica_addresses(i)});
  }
  for (const v1::WorkerPlan& worker : from.workers()) to.workers.push_back(FromProto(worker));
  return to;
}

void ToProto(const ParityPlan& from, v1::ParityPlan* to) {
  to->set_parity(from.parity);
  for (const std::vector<Rank>& group : from.groups) {
    v1::ParityPlan::Group* g = to->add_groups();
    for (const Rank rank : group) g->add_ranks(rank);
  }
}

ParityPlan FromProto(const v1::ParityPlan& from) {
  ParityPlan to{.parity = from.parity(), .groups = {}};
  to.groups.reserve(static_cast<std::size_t>(from.groups_size()));
  for (const v1::ParityPlan::Group& g : from.groups()) {
    to.groups.emplace_back(g.ranks().begin(), g.ranks().end());
  }
  return to;
}

void ToProto(const CutShard& from, v1::CutShard* to) {
  to->set_rank(from.rank);
  to->set_crc_root(from.crc_root);
  to->set_bytes(from.bytes);
  to->set_file(from.file);
  for (const CutHolder& holder : from.holders) {
    v1::CutHolder* h = to->add_holders();
    h->set_node(holder.node);
    h->set_address(holder.address);
  }
}

CutShard FromProto(const v1::CutShard& from) {
  CutShard to{.rank = from.rank(),
              .crc_root = from.crc_root(),
              .bytes = from.bytes(),
              .holders = {},
              .file = from.file()};
  to.holders.reserve(static_cast<std::size_t>(from.holders_size()));
  for (const v1::CutHolder& h : from.holders()) to.holders.push_back({h.node(), h.address()});
  return to;
}

void ToProto(const RestoreCut& from, v1::RestoreCut* to) {
  to->set_step(from.step);
  to->set_generation(from.generation);
  to->set_world_size(from.world_size);
  for (const CutShard& shard : from.shards) ToProto(shard, to->add_shards());
}

RestoreCut FromProto(const v1::RestoreCut& from) {
  RestoreCut to{.step = from.step(),
                .generation = from.generation(),
                .world_size = from.world_size(),
                .shards = {}};
  to.shards.reserve(static_cast<std::size_t>(from.shards_size()));
  for (const v1::CutShard& s : from.shards()) to.shards.push_back(FromProto(s));
  return to;
}

}  // namespace everstep::wire
