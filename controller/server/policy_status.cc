#include "controller/server/policy_status.h"

#include <algorithm>
#include <map>

#include <fmt/format.h>

#include "checkpoint/core/policy_prices.h"
#include "controller/server/pace.h"

namespace everstep::controller {
namespace {

// Bytes a second that one core adds to a parity or decodes: about what memory bears
// (docs/reference/performance.md, Parity, has what was measured).
constexpr double kAssumedCodec = 4.0 * (1 << 30);

// Of the newest commit, on the member that has most; 0: nothing is committed.
std::uint64_t BytesOfANode(const JobStateView& job) {
  if (job.commits.commits.empty()) return 0;
  std::map<Rank, std::uint64_t> bytes;
  for (const HeldShard& s : job.commits.commits.front().shards) bytes[s.rank] = s.bytes;
  std::uint64_t most = 0;
  for (const NodePlan& member : job.plan.nodes) {
    std::uint64_t sum = 0;
    for (const WorkerPlan& w : member.workers) {
      if (const auto found = bytes.find(w.rank); found != bytes.end()) sum += found->second;
    }
    most = std::max(most, sum);
  }
  return most;
}

}  // namespace

void FillSurvival(const checkpoint::Estimate& e, v1::Survival* to) {
  to->set_probability(e.probability);
  to->set_low(e.low);
  to->set_high(e.high);
  to->set_exact(e.exact);
}

void FillPolicies(const FailureDomains& domains, const JobStateView& job, bool replicated,
                  std::uint32_t max_lost, v1::CheckpointPlacement* to) {
  const auto nodes = static_cast<std::uint32_t>(job.plan.nodes.size());
  checkpoint::PlacementInput where{.nodes = nodes};
  for (const FailureDomains::Level& level : domains.levels) {
    if (level.name == "host" && level.values.size() == nodes) continue;  // each its own: as nodes
    where.levels.push_back(level.of);
  }
  for (const auto& [name, members] : domains.evicted) where.together.push_back(members);
  const checkpoint::Redundancy in_force = RedundancyOf(job.record.spec, nodes);
  const Pace pace = PaceOf(job);
  const std::uint64_t bytes = BytesOfANode(job);
  to->set_node_bytes(bytes);
  to->set_price_basis(fmt::format("{}; parity at {:.0f} GiB/s a core assumed", pace.rate_basis,
                                  kAssumedCodec / (1 << 30)));
  for (const checkpoint::Redundancy& policy : checkpoint::PoliciesToCompare(in_force, nodes)) {
    const checkpoint::PolicyPrice priced =
        checkpoint::PricePolicy(where, policy, replicated, max_lost);
    v1::PolicyPrice* p = to->add_policies();
    p->set_policy(checkpoint::PrintRedundancy(policy));
    p->set_in_force(policy == in_force);
    p->set_memory(priced.price.memory);
    p->set_sent(priced.price.sent);
    p->set_encoded(priced.price.encoded);
    p->set_restored(priced.price.restored);
    // Decoding goes on while bytes come.
    const auto size = static_cast<double>(bytes);
    p->set_restore_seconds(std::max(priced.price.restored * size / pace.bytes_a_second,
                                    priced.price.decoded * size / kAssumedCodec));
    p->set_encode_seconds(priced.price.encoded * size / kAssumedCodec);
    p->set_survives_any(priced.price.survives);
    p->set_fatal_domains(priced.fatal);
    p->set_groups(priced.groups);
    p->set_least_group(priced.least);
    p->set_largest_group(priced.largest);
    for (std::uint32_t k = 1; k <= priced.survival.size(); ++k) {
      v1::Survival* s = p->add_survival();
      s->set_domains(nodes);
      s->set_lost(k);
      FillSurvival(priced.survival[k - 1], s);
    }
  }
}

}  // namespace everstep::controller
