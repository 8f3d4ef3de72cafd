// What `everstep ckpt placement` and `survive` say, from states written by hand.
#include "controller/server/checkpoint_status.h"

#include <gtest/gtest.h>

#include <fmt/format.h>

namespace everstep::controller {
namespace {

constexpr std::uint64_t kMiB = 1 << 20;

// Nodes n1.. in zones as given, one rank each, node i's copy on peer[i]; step 7 committed.
struct World {
  ClusterState state;
  JobStateView job;

  World(const std::vector<std::string>& zones, const std::vector<int>& peer,
        bool replicated = false) {
    job.record.spec.job = "gpt";
    job.record.spec.min_nodes = 1;
    job.record.spec.max_nodes = static_cast<std::uint32_t>(zones.size());
    job.record.state = JobState::kRunning;
    job.record.generation = 2;
    job.plan.job = "gpt";
    job.plan.generation = 2;
    job.step = 8;
    Commit commit{.generation = 2, .step = 7, .copies = 2, .replicated_layout = replicated};
    const int n = static_cast<int>(zones.size());
    commit.world_size = n;
    for (int i = 0; i < n; ++i) {
      const NodeId id = Name(i);
      NodeState& node = state.nodes[id];
      node.record.node = id;
      node.record.health = NodeHealth::kAlive;
      node.record.facts.address = fmt::format("10.0.0.{}", i + 1);
      if (!zones[static_cast<std::size_t>(i)].empty()) {
        node.record.facts.labels["zone"] = zones[static_cast<std::size_t>(i)];
      }
      node.lease = Milliseconds(1500);
      NodePlan member{.node = id, .group_rank = i};
      member.workers.push_back({.rank = i});
      member.peers = {{Name(peer[static_cast<std::size_t>(i)]), ""}};
      job.plan.nodes.push_back(member);
      HeldShard shard{.rank = i,
                      .world_size = n,
                      .generation = 2,
                      .step = 7,
                      .crc_root = 100,
                      .bytes = 64 * kMiB,
                      .replicated_layout = replicated};
      commit.shards.push_back(shard);
      job.holdings[id].shards.push_back(shard);
      shard.replica = true;
      job.holdings[member.peers.front().node].shards.push_back(shard);
    }
    job.commits.commits = {commit};
  }
  static NodeId Name(int i) { return fmt::format("n{}", i + 1); }
};

TEST(CheckpointStatus, PlacementTellsWhereCopiesLieAndWhatTheySurvive) {
  World w({"a", "a", "b", "b"}, {2, 3, 0, 1});
  const v1::CheckpointPlacement p = PlacementOf(w.state, w.job, 3);
  EXPECT_EQ(p.shape(), "group");
  EXPECT_EQ(p.host_sets(), 2u);
  EXPECT_EQ(p.layout(), "sharded");
  EXPECT_EQ(p.committed_step(), 7);
  EXPECT_EQ(p.fatal_size(), 0);
  EXPECT_EQ(p.why(),
            "2 host sets for 4 nodes, the fewest with equal load; copies cross every zone");
  ASSERT_EQ(p.nodes_size(), 4);
  EXPECT_EQ(p.nodes(0).domain(), "zone=a");
  EXPECT_EQ(p.nodes(0).peers(0), "n3");
  EXPECT_EQ(p.nodes(0).keeps(0), 2);
  EXPECT_EQ(p.nodes(0).bytes(), 128 * kMiB);
  ASSERT_EQ(p.by_nodes_size(), 3);
  EXPECT_DOUBLE_EQ(p.by_nodes(0).probability(), 1);
  EXPECT_NEAR(p.by_nodes(1).probability(), 1 - 2. / 6, 1e-12);
  EXPECT_DOUBLE_EQ(p.by_nodes(2).probability(), 0);
  EXPECT_TRUE(p.by_nodes(1).exact());
  ASSERT_EQ(p.by_domain_size(), 2);  // hosts are nodes here
  EXPECT_EQ(p.by_domain(0).level(), "zone");
  EXPECT_DOUBLE_EQ(p.by_domain(0).probability(), 1);
  EXPECT_DOUBLE_EQ(p.by_domain(1).probability(), 0);
}

TEST(CheckpointStatus, PlacementNamesADomainWhoseLossIsFatal) {
  World w({"a", "a", "b", "b"}, {1, 0, 3, 2});  // pairs within zones
  const v1::CheckpointPlacement p = PlacementOf(w.state, w.job, 0);
  ASSERT_EQ(p.fatal_size(), 2);
  EXPECT_EQ(p.fatal(0), "zone=a (2 of 4 nodes)");
  EXPECT_EQ(p.by_nodes_size(), 4);  // as many as there are
  EXPECT_NE(p.why().find("not every zone"), std::string::npos) << p.why();
}

TEST(CheckpointStatus, AnyHolderWillDoWhenEveryRanksStateIsTheSame) {
  World w({"", "", "", ""}, {1, 0, 3, 2}, true);
  const v1::CheckpointPlacement p = PlacementOf(w.state, w.job, 4);
  EXPECT_EQ(p.layout(), "replicated");
  EXPECT_DOUBLE_EQ(p.by_nodes(2).probability(), 1);
  EXPECT_DOUBLE_EQ(p.by_nodes(3).probability(), 0);
}

TEST(CheckpointStatus, SharesOfOneStateSurviveAsAShardedOneAndSaySo) {
  World w({"", "", "", ""}, {1, 0, 3, 2});
  for (HeldShard& shard : w.job.commits.commits.front().shards) shard.share = true;
  const v1::CheckpointPlacement p = PlacementOf(w.state, w.job, 2);
  EXPECT_EQ(p.layout(), "shares");
  EXPECT_NEAR(p.by_nodes(1).probability(), 1 - 2. / 6, 1e-12);
  EXPECT_NE(p.why().find("every restore reads the shares of all ranks"), std::string::npos);
}

TEST(CheckpointStatus, ACopyOnANodeOutsideTheJobOutlivesItsMembers) {
  World w({"", ""}, {1, 0});
  w.state.nodes["spare"] = w.state.nodes["n1"];
  w.job.holdings["spare"] = w.job.holdings["n1"];
  const v1::CheckpointPlacement p = PlacementOf(w.state, w.job, 2);
  EXPECT_DOUBLE_EQ(p.by_nodes(1).probability(), 1);
}

TEST(CheckpointStatus, NothingCommittedIsThePlanAndSaysSo) {
  World w({"", ""}, {1, 0});
  w.job.commits.commits.clear();
  const v1::CheckpointPlacement p = PlacementOf(w.state, w.job, 1);
  EXPECT_EQ(p.layout(), "unknown");
  EXPECT_EQ(p.committed_step(), -1);
  EXPECT_NE(p.why().find("nothing is committed yet"), std::string::npos);
}

std::vector<NodeId> Meant(const World& w, const v1::ForetellLossRequest& request,
                          std::string* error = nullptr, bool* found = nullptr) {
  std::vector<NodeId> lost;
  std::string text;
  bool there = true;
  NodesMeant(w.state, w.job, request, &lost, error == nullptr ? &text : error,
             found == nullptr ? &there : found);
  return lost;
}

TEST(CheckpointStatus, LossesAreNodesDomainsOrTheWorstSoMany) {
  World w({"a", "a", "b", "b"}, {2, 3, 0, 1});
  v1::ForetellLossRequest request;
  request.add_nodes("n4");
  request.add_domains("zone=a");
  EXPECT_EQ(Meant(w, request), (std::vector<NodeId>{"n1", "n2", "n4"}));
  request.Clear();
  request.add_domains("host=10.0.0.2");
  EXPECT_EQ(Meant(w, request), std::vector<NodeId>{"n2"});
  request.Clear();
  request.set_count(2);  // a pair
  EXPECT_EQ(Meant(w, request), (std::vector<NodeId>{"n1", "n3"}));
  request.set_count(1);
  EXPECT_EQ(Meant(w, request).size(), 1u);

  std::string error;
  bool found = true;
  request.Clear();
  request.add_domains("zone=c");
  EXPECT_TRUE(Meant(w, request, &error, &found).empty());
  EXPECT_FALSE(found);
  EXPECT_NE(error.find("hint: there are: host=10.0.0.1"), std::string::npos) << error;
  EXPECT_NE(error.find("zone=a"), std::string::npos) << error;
  request.Clear();
  request.add_nodes("n9");
  EXPECT_TRUE(Meant(w, request, &error, &found).empty());
  EXPECT_FALSE(found);
  request.Clear();
  request.set_count(5);
  EXPECT_TRUE(Meant(w, request, &error, &found).empty());
  EXPECT_TRUE(found);
  request.Clear();
  EXPECT_TRUE(Meant(w, request, &error, &found).empty());
  EXPECT_NE(error.find("which nodes"), std::string::npos);
}

Forecast GoesOn(const World& w, const std::string& lost, const std::string& spare,
                const std::string& source) {
  Forecast f{JobState::kActivating, "", w.job.plan};
  f.plan.restore_step = 7;
  for (NodePlan& member : f.plan.nodes) {
    const bool replaced = member.node == lost;
    if (replaced) member.node = spare;
    for (PeerPlan& peer_of : member.peers) {
      if (peer_of.node == lost) peer_of.node = spare;
    }
    for (WorkerPlan& worker : member.workers) {
      worker.restore = {.step = 7,
                        .shard_rank = worker.rank,
                        .shard_generation = 2,
                        .crc_root = 100,
                        .bytes = 64 * kMiB,
                        .source_node = replaced ? source : member.node};
    }
  }
  return f;
}

const v1::PolicyPrice& Priced(const v1::CheckpointPlacement& p, const std::string& policy) {
  static const v1::PolicyPrice none;
  for (const v1::PolicyPrice& price : p.policies()) {
    if (price.policy() == policy) return price;
  }
  ADD_FAILURE() << policy << " is not among the policies";
  return none;
}

TEST(CheckpointStatus, PoliciesArePricedBesideTheOneInForce) {
  World w({"a", "a", "a", "b", "b", "b"}, {3, 4, 5, 0, 1, 2});
  const v1::CheckpointPlacement p = PlacementOf(w.state, w.job, 4);
  EXPECT_EQ(p.node_bytes(), 64 * kMiB);
  EXPECT_EQ(p.price_basis(), "1 GiB/s assumed; parity at 4 GiB/s a core assumed");
  ASSERT_GT(p.policies_size(), 3);
  EXPECT_EQ(p.policies(0).policy(), "replicate(2)");
  for (int i = 0; i < p.policies_size(); ++i) EXPECT_EQ(p.policies(i).in_force(), i == 0);

  const v1::PolicyPrice& two = Priced(p, "replicate(2)");
  EXPECT_DOUBLE_EQ(two.memory(), 1);
  EXPECT_DOUBLE_EQ(two.restored(), 1);
  EXPECT_DOUBLE_EQ(two.restore_seconds(), 64. / 1024);
  EXPECT_EQ(two.fatal_domains(), 0u);
  ASSERT_EQ(two.survival_size(), 4);
  EXPECT_NEAR(two.survival(1).probability(), 1 - 3. / 15, 1e-12);

  // Two groups of three, one node of each zone too many.
  const v1::PolicyPrice& parity = Priced(p, "xor(2+1)");
  EXPECT_DOUBLE_EQ(parity.memory(), 0.5);
  EXPECT_DOUBLE_EQ(parity.sent(), 1);
  EXPECT_DOUBLE_EQ(parity.restored(), 2);
  EXPECT_DOUBLE_EQ(parity.restore_seconds(), 2 * 64. / 1024);
  EXPECT_DOUBLE_EQ(parity.encode_seconds(), 64. / 4096);
  EXPECT_EQ(parity.survives_any(), 1u);
  EXPECT_EQ(parity.groups(), 2u);
  EXPECT_EQ(parity.largest_group(), 3u);
  EXPECT_EQ(parity.fatal_domains(), 2u);
  EXPECT_NEAR(parity.survival(1).probability(), 9. / 15, 1e-12);  // one of each group

  const v1::PolicyPrice& rs = Priced(p, "rs(4+2)");
  EXPECT_DOUBLE_EQ(rs.memory(), 0.5);
  EXPECT_DOUBLE_EQ(rs.survival(1).probability(), 1);
  EXPECT_DOUBLE_EQ(rs.survival(2).probability(), 0);
  EXPECT_EQ(Priced(p, "replicate(1)").survives_any(), 0u);
  EXPECT_EQ(Priced(p, "replicate(1)").fatal_domains(), 2u);  // a host each is as nodes
}

TEST(CheckpointStatus, WhereEveryRanksStateIsTheSameNoPolicyBuysSurvival) {
  World w({"", "", "", ""}, {1, 0, 3, 2}, true);
  const v1::CheckpointPlacement p = PlacementOf(w.state, w.job, 4);
  ASSERT_GT(p.policies_size(), 2);
  for (const v1::PolicyPrice& price : p.policies()) {
    EXPECT_EQ(price.survives_any(), 3u) << price.policy();
    EXPECT_DOUBLE_EQ(price.restored(), 1);
    EXPECT_DOUBLE_EQ(price.survival(2).probability(), 1);
    EXPECT_DOUBLE_EQ(price.survival(3).probability(), 0);
  }
}

TEST(CheckpointStatus, BeforeTheFirstCommitPricesAreInStates) {
  World w({"", ""}, {1, 0});
  w.job.commits.commits.clear();
  const v1::CheckpointPlacement p = PlacementOf(w.state, w.job, 1);
  EXPECT_EQ(p.node_bytes(), 0u);
  EXPECT_DOUBLE_EQ(p.policies(0).memory(), 1);
  EXPECT_DOUBLE_EQ(p.policies(0).restore_seconds(), 0);
  w.job.plan.nodes.clear();
  EXPECT_EQ(PlacementOf(w.state, w.job, 1).policies_size(), 0);
}

TEST(CheckpointStatus, AForecastCountsWhatMovesAndWhatIsCopiedAnew) {
  World w({"a", "a", "b", "b"}, {2, 3, 0, 1});
  w.state.nodes["n5"] = w.state.nodes["n2"];
  const v1::LossForecast f = LossForecastOf(w.state, w.job, {"n2"}, GoesOn(w, "n2", "n5", "n4"), 0);
  EXPECT_TRUE(f.recoverable());
  EXPECT_EQ(f.step(), 7);
  EXPECT_EQ(f.newest_step(), 8);
  EXPECT_EQ(f.bytes_to_move(), 64 * kMiB);  // rank 1's to n5
  EXPECT_EQ(f.bytes_to_copy(), 64 * kMiB);  // rank 3's to n5, which kept it on n2
  ASSERT_EQ(f.sources_size(), 4);
  EXPECT_EQ(f.sources(1).tier(), "peer");
  EXPECT_EQ(f.sources(1).source_node(), "n4");
  EXPECT_EQ(f.sources(2).tier(), "local");
  EXPECT_DOUBLE_EQ(f.detect_seconds(), 1.5);
  EXPECT_DOUBLE_EQ(f.estimated_seconds(), 1 + 64. / 1024);
  EXPECT_EQ(f.basis(), "1 GiB/s assumed, 1 s assumed for the switch");
  EXPECT_EQ(
      f.why(),
      "every rank's state of step 7 is left: 3 in the memory of the rank's own node, 1 on a peer");
}

// The same kept by xor(3+1): a parity of a third of a state on each node, and no copies.
World ByParity() {
  World w({"a", "a", "b", "b"}, {2, 3, 0, 1});
  w.job.record.spec.parity_states = 3;
  w.job.record.spec.copies = 2;
  w.job.plan.parity = {.parity = 1, .groups = {{0, 1, 2, 3}}};
  Commit& commit = w.job.commits.commits.front();
  commit.copies = 1;
  commit.parity = w.job.plan.parity;
  for (int i = 0; i < 4; ++i) {
    w.job.plan.nodes[static_cast<std::size_t>(i)].peers.clear();
    std::vector<HeldShard>& held = w.job.holdings[World::Name(i)].shards;
    std::erase_if(held, [](const HeldShard& s) { return s.replica; });
    HeldShard parity = held.front();
    parity.rank = 4 + i;
    parity.replica = true;
    parity.built = 2;
    parity.crc_root = 200;
    parity.bytes = 22 * kMiB;
    held.push_back(parity);
    commit.parities.push_back(parity);
  }
  return w;
}

TEST(CheckpointStatus, OfAJobOfParitiesItTellsWhatThoseBringBack) {
  World w = ByParity();
  const v1::CheckpointPlacement p = PlacementOf(w.state, w.job, 2);
  EXPECT_EQ(p.redundancy(), "xor(3+1)");
  EXPECT_EQ(p.shape(), "parity");
  EXPECT_EQ(p.copies(), 1u);
  EXPECT_EQ(p.parities(), 4u);
  EXPECT_EQ(p.parities_wanted(), 4u);
  EXPECT_EQ(p.policies(0).policy(), "xor(3+1)");
  EXPECT_TRUE(p.policies(0).in_force());
  EXPECT_DOUBLE_EQ(p.by_nodes(0).probability(), 1);
  EXPECT_DOUBLE_EQ(p.by_nodes(1).probability(), 0);
  EXPECT_EQ(p.fatal_size(), 2) << "a zone is two of the four";
  EXPECT_EQ(p.nodes(0).peers_size(), 3);
  EXPECT_EQ(p.nodes(0).keeps_size(), 3);
  EXPECT_EQ(p.nodes(0).bytes(), 86 * kMiB);
  EXPECT_EQ(p.why().find("1 group of 4 nodes share parities, 1 for each piece of their states"), 0u)
      << p.why();

  // One node: its shard is made anew on n5, of three of three pieces' size each; then its parity.
  w.state.nodes["n5"] = w.state.nodes["n2"];
  Forecast goes_on = GoesOn(w, "n2", "n5", "n5");
  goes_on.lost = {"n2"};
  goes_on.rebuilt = {{1, "n5"}};
  goes_on.plan.parity = w.job.plan.parity;
  const v1::LossForecast f = LossForecastOf(w.state, w.job, {"n2"}, goes_on, 0);
  EXPECT_TRUE(f.recoverable());
  EXPECT_TRUE(f.ranks_lost().empty());
  EXPECT_EQ(f.sources(1).tier(), "parity");
  EXPECT_EQ(f.sources(1).source_node(), "its group of 4");
  EXPECT_EQ(f.bytes_to_move(), std::uint64_t{3} * 64 * kMiB);
  EXPECT_EQ(f.bytes_to_copy(), std::uint64_t{3} * 22 * kMiB);
  EXPECT_EQ(f.why(),
            "every rank's state of step 7 is left: 3 in the memory of the rank's own node, 0 on a "
            "peer, 1 in parities");

  // Two: which ranks are gone, and why.
  Forecast none{JobState::kWaiting, "2 of at least 4 nodes", w.job.plan};
  none.plan.restore_step = kNoStep;
  const v1::LossForecast two = LossForecastOf(w.state, w.job, {"n1", "n3"}, none, 2);
  EXPECT_EQ(std::vector<int>(two.ranks_lost().begin(), two.ranks_lost().end()),
            (std::vector<int>{0, 2}));
  EXPECT_EQ(two.why().find("every copy of ranks 0, 2 goes with these nodes, more than its group's "
                           "parities bring back, and no older step is complete"),
            0u)
      << two.why();
  EXPECT_DOUBLE_EQ(two.survival().probability(), 0);
}

// A parity that is not there any more is not counted on.
TEST(CheckpointStatus, AParityThatLacksLeavesItsRowWithLess) {
  World w = ByParity();
  std::vector<HeldShard>& held = w.job.holdings["n4"].shards;
  std::erase_if(held, [](const HeldShard& s) { return s.replica; });
  const v1::CheckpointPlacement p = PlacementOf(w.state, w.job, 2);
  EXPECT_EQ(p.parities(), 3u);
  EXPECT_DOUBLE_EQ(p.by_nodes(0).probability(), 0) << "a group counts as its weakest row";
}

TEST(CheckpointStatus, AForecastTellsWhoPassesItOn) {
  World w({"a", "a", "b", "b"}, {2, 3, 0, 1});
  for (const char* node : {"n5", "n6"}) w.state.nodes[node] = w.state.nodes["n2"];
  Forecast f = GoesOn(w, "n2", "n5", "n4");
  RestorePlan& second = f.plan.nodes[2].workers[0].restore;
  f.plan.nodes[2].node = "n6";
  second.source_node = "n5";
  second.relay = 1;
  const v1::LossForecast told = LossForecastOf(w.state, w.job, {"n2", "n3"}, f, 0);
  ASSERT_EQ(told.sources_size(), 4);
  EXPECT_EQ(told.sources(2).tier(), "relay");
  EXPECT_EQ(told.sources(2).source_node(), "n5");
  EXPECT_EQ(told.sources(2).why().find("that node takes it, too, and passes it on as it comes"), 0u)
      << told.sources(2).why();
  EXPECT_EQ(told.bytes_to_move(), std::uint64_t{2} * 64 * kMiB);
  // One shard over a link and a chunk more, not two.
  EXPECT_DOUBLE_EQ(told.estimated_seconds(), 1 + 65. / 1024);
}

TEST(CheckpointStatus, AnEstimateUsesWhatThisJobMeasured) {
  World w({"", ""}, {1, 0});
  w.job.copied_bytes = 64 * kMiB;
  w.job.copy_took = Milliseconds(500);
  w.job.record.faults.push_back({.detected = {1'000'000'000}, .recovered = {1'250'000'000}});
  const v1::LossForecast f = LossForecastOf(w.state, w.job, {"n2"}, GoesOn(w, "n2", "n2", "n1"), 0);
  EXPECT_DOUBLE_EQ(f.estimated_seconds(), 0.25 + 0.5);
  EXPECT_EQ(f.basis(),
            "128 MiB/s measured at the newest commit, 0.25 s for the switch: the median of 1 "
            "recovery of this job");
}

TEST(CheckpointStatus, AForecastNamesTheRanksThatAreLost) {
  World w({"a", "a", "b", "b"}, {2, 3, 0, 1});
  Forecast none{JobState::kWaiting, "2 of at least 4 nodes", w.job.plan};
  none.plan.restore_step = kNoStep;
  const v1::LossForecast f = LossForecastOf(w.state, w.job, {"n1", "n3"}, none, 2);
  EXPECT_FALSE(f.recoverable());
  EXPECT_EQ(f.step(), -1);
  EXPECT_EQ(std::vector<int>(f.ranks_lost().begin(), f.ranks_lost().end()),
            (std::vector<int>{0, 2}));
  EXPECT_EQ(f.why(),
            "every copy of ranks 0, 2 goes with these nodes, and no older step is complete; "
            "the job waits for nodes (2 of at least 4 nodes)");
  EXPECT_NEAR(f.survival().probability(), 1 - 2. / 6, 1e-12);
}

TEST(CheckpointStatus, WhatMemoryLosesIsTakenFromFilesWhereTheyAreNewer) {
  World w({"a", "a", "b", "b"}, {2, 3, 0, 1});
  w.job.record.spec.ckpt_dir = "/ck";
  w.job.commits.persisted_generation = 2;
  w.job.commits.persisted_step = 5;
  w.job.commits.persisted = {1};
  Forecast none{JobState::kWaiting, "2 of at least 4 nodes", w.job.plan};
  none.plan.restore_step = kNoStep;
  v1::LossForecast f = LossForecastOf(w.state, w.job, {"n1", "n3"}, none, 2);
  EXPECT_TRUE(f.recoverable());
  EXPECT_EQ(f.step(), 5);
  EXPECT_EQ(
      f.why(),
      "no complete step is left in memory; step 5 is in /ck; the job waits for nodes (2 of at "
      "least 4 nodes)");
  ASSERT_EQ(f.sources_size(), 4);
  EXPECT_EQ(f.sources(0).tier(), "file");
  EXPECT_EQ(f.sources(0).source_node(), "/ck");
  // Memory is newer here: files have no part in it.
  f = LossForecastOf(w.state, w.job, {"n2"}, GoesOn(w, "n2", "n5", "n4"), 0);
  EXPECT_EQ(f.step(), 7);
  EXPECT_NE(f.sources(0).tier(), "file");
}

TEST(CheckpointStatus, AForecastSaysWhenWhatIsLeftIsOfAnotherNumberOfRanks) {
  World w({"", "", ""}, {1, 2, 0});
  w.job.record.spec.nproc_per_node = 1;
  Forecast smaller{JobState::kActivating, "", w.job.plan};
  smaller.plan.nodes.pop_back();
  const v1::LossForecast f = LossForecastOf(w.state, w.job, {"n3"}, smaller, 0);
  EXPECT_FALSE(f.recoverable());
  EXPECT_EQ(f.why(),
            "what is left is the state of 3 ranks, each its own; the job would go on with 2");
}

TEST(CheckpointStatus, AJobThatIsNotTouchedGoesOn) {
  World w({"", ""}, {1, 0});
  w.state.nodes["n9"] = w.state.nodes["n1"];
  const v1::LossForecast f =
      LossForecastOf(w.state, w.job, {"n9"}, {JobState::kRunning, "", w.job.plan}, 0);
  EXPECT_TRUE(f.recoverable());
  EXPECT_EQ(f.step(), 8);
  EXPECT_EQ(f.sources_size(), 0);
}

}  // namespace
}  // namespace everstep::controller
