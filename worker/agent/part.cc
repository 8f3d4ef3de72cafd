#include "worker/agent/part.h"

#include <memory>
#include <utility>

namespace everstep::agent {

checkpoint::Part PartOf(const Activate& a, const std::string& directory) {
  checkpoint::Part part;
  const auto cut = std::make_shared<const RestoreCut>(a.cut);
  part.job = a.job;
  part.generation = a.generation;
  part.world_size = static_cast<std::int32_t>(a.world_size);
  part.data_key = a.data_key;
  part.peers.reserve(a.plan.peers.size());
  for (const PeerPlan& peer : a.plan.peers) part.peers.push_back(peer.address);
  part.kept_by_parity = a.kept_by_parity;
  part.committed_step = a.committed_step;
  part.given_up = a.given_up;
  for (const WorkerPlan& w : a.plan.workers) {
    checkpoint::WorkerPart worker;
    worker.rank = w.rank;
    worker.restore.step = w.restore.step;
    worker.restore.shard_rank = w.restore.shard_rank;
    worker.restore.shard_generation = w.restore.shard_generation;
    worker.restore.crc_root = w.restore.crc_root;
    worker.restore.bytes = w.restore.bytes;
    if (w.restore.source_node != a.plan.node || w.restore.relay > 0)
      worker.restore.source_address = w.restore.source_address;
    if (w.restore.ranges) {
      worker.restore.cut = cut;
      worker.restore.world_size = part.world_size;
      worker.restore.directory = directory;
    }
    worker.restore.relay = w.restore.relay;
    worker.restore.others.reserve(w.restore.others.size());
    for (const CutHolder& other : w.restore.others) worker.restore.others.push_back(other.address);
    part.workers.push_back(std::move(worker));
  }
  return part;
}

}  // namespace everstep::agent
