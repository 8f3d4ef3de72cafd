// The commit rule for any number of copies and nodes: whatever the order in which copies are
// reported, doubled or with wrong checksums among them, a step is committed by the very report with
// which the last rank has min(m, nodes) holders that agree, and by no earlier one.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include "controller/core/controller.h"
#include "controller/core/copies.h"
#include "proto/base/random.h"

namespace everstep::controller {
namespace {

NodeId Name(std::size_t i) {
  return fmt::format("n{}", i);
}

// A job that runs on `nodes` nodes with `nproc` workers each.
class RunningJob {
 public:
  RunningJob(std::uint32_t copies, std::uint32_t nodes, std::uint32_t nproc)
      : controller_(Options{}) {
    for (std::uint32_t i = 0; i < nodes; ++i) {
      NodeRegistered e{.node = Name(i), .session = 1, .keeper_id = i + 1};
      e.facts.address = "127.0.0.1";
      e.facts.labels["host"] = Name(i);
      Do(e);
    }
    SubmitJob submit{.request = 1};
    submit.spec.job = "j";
    submit.spec.min_nodes = submit.spec.max_nodes = nodes;
    submit.spec.nproc_per_node = nproc;
    submit.spec.copies = copies;
    submit.spec.last_call = {};
    Do(submit);
    for (std::uint32_t i = 0; i < nodes; ++i) {
      Prepared e{.node = Name(i), .incarnation = 1, .store_port = 1};
      e.holds.job = "j";
      e.holds.generation = 1;
      Do(e);
    }
    for (const NodePlan& member : Job().plan.nodes) {
      Activated e{.node = member.node, .incarnation = 1, .job = "j", .generation = 1};
      for (const WorkerPlan& w : member.workers) {
        e.workers.push_back({w.rank, w.local_rank, 1, true, {}});
      }
      Do(e);
    }
  }
  const JobStateView& Job() const { return controller_.state().jobs.at("j"); }
  // True: this report committed the step.
  bool Copied(const NodeId& node, const HeldShard& shard) {
    Decisions out;
    controller_.Step(now_, ShardCopied{node, 1, "j", shard}, &out);
    return std::any_of(out.records.begin(), out.records.end(),
                       [](const Record& r) { return std::holds_alternative<CommitRecord>(r); });
  }

 private:
  void Do(const Event& event) {
    Decisions out;
    controller_.Step(now_, event, &out);
  }
  Controller controller_;
  const Timestamp now_{1'000'000'000};
};

struct Report {
  NodeId node;
  HeldShard shard;
};

TEST(CommitRule, AStepIsCommittedWithTheLastCopyThatIsNeededAndNeverBefore) {
  for (std::uint64_t seed = 1; seed <= 400; ++seed) {
    Random random(seed);
    const auto nodes = static_cast<std::uint32_t>(random.Between(1, 6));
    const auto copies = static_cast<std::uint32_t>(random.Between(0, nodes));
    const auto nproc = static_cast<std::uint32_t>(random.Between(1, 2));
    SCOPED_TRACE(fmt::format("seed {}: {} copies of {} ranks on {} nodes", seed, copies,
                             nodes * nproc, nodes));
    RunningJob job(copies, nodes, nproc);
    ASSERT_EQ(job.Job().record.state, JobState::kRunning);
    const std::uint32_t needed = CopiesOf(job.Job().record.spec, nodes);
    ASSERT_EQ(needed, std::min(copies == 0 ? 2 : copies, nodes));
    const auto world = static_cast<std::int32_t>(nodes * nproc);

    std::vector<Report> reports;
    for (const NodePlan& member : job.Job().plan.nodes) {
      std::set<NodeId> keepers = {member.node};
      for (const PeerPlan& peer : member.peers) keepers.insert(peer.node);
      ASSERT_EQ(keepers.size(), needed) << member.node << " pushes to copies less one peers";
      for (const WorkerPlan& w : member.workers) {
        for (const NodeId& keeper : keepers) {
          HeldShard shard{.rank = w.rank,
                          .world_size = world,
                          .generation = 1,
                          .step = 3,
                          .crc_root = 100u + static_cast<std::uint32_t>(w.rank),
                          .bytes = 64,
                          .replica = keeper != member.node};
          reports.push_back({keeper, shard});
          if (random.Chance(200)) reports.push_back(reports.back());  // said twice
          if (random.Chance(200)) {                                   // and with other bytes
            reports.push_back(reports.back());
            reports[reports.size() - 2].shard.crc_root = 7;
          }
        }
      }
    }
    std::vector<Report> right;
    for (const Report& report : reports) {
      if (report.shard.crc_root != 7) right.push_back(report);
    }
    for (std::size_t i = reports.size(); i > 1; --i) {
      std::swap(reports[i - 1], reports[random.Below(i)]);
    }
    reports.insert(reports.end(), right.begin(), right.end());  // in the end all is well

    std::map<Rank, std::map<NodeId, std::uint32_t>> said;
    bool committed = false;
    for (const Report& report : reports) {
      said[report.shard.rank][report.node] = report.shard.crc_root;
      const bool whole = static_cast<std::int32_t>(said.size()) == world &&
                         std::all_of(said.begin(), said.end(), [&](const auto& rank) {
                           std::map<std::uint32_t, std::uint32_t> equal;
                           std::uint32_t most = 0;
                           for (const auto& [node, crc] : rank.second) {
                             most = std::max(most, ++equal[crc]);
                           }
                           return most >= needed;
                         });
      const bool now = job.Copied(report.node, report.shard);
      ASSERT_EQ(now, whole && !committed)
          << "with rank " << report.shard.rank << " on " << report.node;
      committed = committed || now;
    }
    ASSERT_TRUE(committed);
    const Commit& commit = job.Job().commits.commits.front();
    ASSERT_EQ(commit.copies, needed);
    ASSERT_EQ(commit.shards.size(), static_cast<std::size_t>(world));
  }
}

}  // namespace
}  // namespace everstep::controller
