// The shell's pure parts: the wire and back, what people read, metrics.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <fstream>
#include <sstream>

#include "controller/server/convert.h"
#include "controller/server/metrics.h"
#include "controller/server/options.h"
#include "controller/server/process_watch.h"
#include "controller/server/status.h"
#include "controller/store/convert.h"
#include "proto/base/version.h"
#include "proto/wire/convert.h"

namespace everstep::controller {
namespace {

v1::Register GoodRegister() {
  v1::Register r;
  r.set_protocol_version(kProtocolVersion);
  r.set_version(kVersion);
  r.set_node("n1");
  r.set_address("10.0.0.1");
  r.set_data_port(4000);
  r.set_slots(8);
  r.set_boot_id("boot");
  r.set_pid_namespace(7);
  r.set_keeper_pid(11);
  r.set_keeper_start_time(12);
  r.set_previous_incarnation(3);
  (*r.mutable_labels())["rack"] = "r1";
  v1::JobOnNode* job = r.add_jobs();
  job->set_job("train");
  job->set_generation(4);
  job->set_activated(true);
  v1::WorkerOnNode* worker = job->add_workers();
  worker->set_rank(2);
  worker->set_local_rank(1);
  worker->set_pid(99);
  worker->mutable_exit()->set_code(-9);
  worker->mutable_exit()->set_exit_ns(5);
  worker->mutable_exit()->set_ran_ms(6);
  v1::HeldShard* shard = job->add_shards();
  shard->set_rank(2);
  shard->set_world_size(4);
  shard->set_generation(4);
  shard->set_step(17);
  shard->set_crc_root(0xabcd);
  shard->set_bytes(1 << 20);
  shard->set_replica(true);
  return r;
}

TEST(Convert, ARegistrationKeepsEverythingTheCoreDecidesOn) {
  const v1::Register r = GoodRegister();
  EXPECT_EQ(CheckRegister(r), "");
  const NodeRegistered e = FromWire(r, 42);
  EXPECT_EQ(e.node, "n1");
  EXPECT_EQ(e.session, 42u);
  EXPECT_EQ(e.previous_incarnation, 3u);
  EXPECT_EQ(e.facts, (NodeFacts{"10.0.0.1", 4000, 8, {{"rack", "r1"}}}));
  ASSERT_EQ(e.jobs.size(), 1u);
  const ExitInfo killed{.code = -9, .occurred = {5}, .ran = Milliseconds(6)};
  const JobOnNode wanted{.job = "train",
                         .generation = 4,
                         .activated = true,
                         .workers = {{2, 1, 99, false, killed}},
                         .shards = {{2, 4, 4, 17, 0xabcd, 1 << 20, true, false}}};
  EXPECT_EQ(e.jobs[0], wanted);
}

TEST(Convert, TheKeepersIdentityIsAllFourOfItsParts) {
  const v1::Register r = GoodRegister();
  const std::uint64_t id = FromWire(r, 1).keeper_id;
  EXPECT_EQ(FromWire(r, 2).keeper_id, id);
  for (const auto& change : std::vector<std::function<void(v1::Register*)>>{
           [](auto* m) { m->set_boot_id("other"); }, [](auto* m) { m->set_pid_namespace(8); },
           [](auto* m) { m->set_keeper_pid(13); }, [](auto* m) { m->set_keeper_start_time(14); }}) {
    v1::Register other = r;
    change(&other);
    EXPECT_NE(FromWire(other, 1).keeper_id, id);
  }
}

TEST(Convert, ARegistrationThatCannotBeIsToldWhy) {
  const auto wrong = [](const std::function<void(v1::Register*)>& change) {
    v1::Register r = GoodRegister();
    change(&r);
    return CheckRegister(r);
  };
  EXPECT_NE(wrong([](auto* r) { r->set_protocol_version(9); }).find("protocol 9"),
            std::string::npos);
  EXPECT_NE(wrong([](auto* r) { r->set_node("A"); }).find("[a-z0-9.-]"), std::string::npos);
  EXPECT_NE(wrong([](auto* r) { r->clear_address(); }).find("--address"), std::string::npos);
  EXPECT_NE(wrong([](auto* r) { r->set_data_port(70000); }).find("70000"), std::string::npos);
  EXPECT_NE(wrong([](auto* r) {
              for (int i = 0; i < 65; ++i) (*r->mutable_labels())[std::to_string(i)] = "x";
            }).find("66 labels"),
            std::string::npos);
}

template <typename T>
T Report(const std::function<void(v1::AgentMessage*)>& fill) {
  v1::AgentMessage m;
  m.set_incarnation(5);
  fill(&m);
  const auto event = FromWire("n1", m, GoodRegister());
  EXPECT_TRUE(event && std::holds_alternative<T>(*event));
  T report = event && std::holds_alternative<T>(*event) ? std::get<T>(*event) : T{};
  EXPECT_EQ(report.node, "n1");
  EXPECT_EQ(report.incarnation, 5u);
  return report;
}

TEST(Convert, EachReportBecomesItsEvent) {
  const auto beat = Report<Heartbeat>([](auto* m) {
    m->mutable_heartbeat()->set_sequence(8);
    m->mutable_heartbeat()->set_sent_ns(9);
    v1::JobProgress* job = m->mutable_heartbeat()->add_jobs();
    job->set_job("train");
    job->set_generation(2);
    job->set_step(-1);
    job->set_running(3);
  });
  EXPECT_EQ(beat.sequence, 8u);
  EXPECT_EQ(beat.sent.ns, 9);
  ASSERT_EQ(beat.jobs.size(), 1u);
  EXPECT_EQ(beat.jobs[0].step, kNoStep);
  EXPECT_EQ(beat.jobs[0].running, 3u);

  const auto prepared = Report<Prepared>([](auto* m) {
    m->mutable_prepared()->set_job("train");
    m->mutable_prepared()->set_generation(7);
    m->mutable_prepared()->set_store_port(29500);
    m->mutable_prepared()->mutable_holds()->set_generation(6);  // what ran before
    m->mutable_prepared()->set_refused(true);
    m->mutable_prepared()->set_message(std::string(100'000, 'x'));
  });
  EXPECT_EQ(prepared.holds.job, "train");
  EXPECT_EQ(prepared.holds.generation, 7u);  // which prepare this answers
  EXPECT_EQ(prepared.store_port, 29500u);
  EXPECT_TRUE(prepared.refused);
  EXPECT_LT(prepared.message.size(), 5000u);  // what an agent writes for people is bounded

  const auto activated = Report<Activated>([](auto* m) {
    m->mutable_activated()->set_job("train");
    m->mutable_activated()->set_generation(7);
    m->mutable_activated()->add_workers()->set_pid(31);
  });
  ASSERT_EQ(activated.workers.size(), 1u);
  EXPECT_EQ(activated.workers[0].pid, 31);

  const auto exited = Report<WorkerExited>([](auto* m) {
    m->mutable_worker_exited()->set_job("train");
    m->mutable_worker_exited()->set_rank(3);
    m->mutable_worker_exited()->mutable_exit()->set_code(7);
    m->mutable_worker_exited()->mutable_exit()->set_oom_killed(true);
    m->mutable_worker_exited()->mutable_exit()->set_error_json(std::string(1 << 20, '{'));
  });
  EXPECT_EQ(exited.rank, 3);
  EXPECT_EQ(exited.exit.code, 7);
  EXPECT_TRUE(exited.exit.oom_killed);
  EXPECT_EQ(exited.exit.error_json.size(), 64u << 10);

  const auto stalled = Report<WorkerStalled>([](auto* m) {
    m->mutable_worker_stalled()->set_kind(v1::WorkerStalled::GROUP_NOT_FORMED);
    m->mutable_worker_stalled()->set_stalled_ms(1500);
  });
  EXPECT_EQ(stalled.kind, StallKind::kGroupNotFormed);
  EXPECT_EQ(stalled.stalled, Milliseconds(1500));

  EXPECT_EQ(Report<ShardCopied>([](auto* m) {
              m->mutable_shard_copied()->mutable_shard()->set_step(9);
            }).shard.step,
            9);
  EXPECT_EQ(Report<Notice>([](auto* m) { m->mutable_notice()->set_deadline_ms(30'000); }).deadline,
            Seconds(30));
  EXPECT_TRUE(Report<NodeWarm>([](auto* m) { m->mutable_node_warm()->set_warm(true); }).warm);
  EXPECT_EQ(Report<Stopped>([](auto* m) { m->mutable_stopped()->set_generation(4); }).generation,
            4u);
  v1::Register renewed = GoodRegister();
  renewed.set_keeper_pid(77);
  renewed.set_keeper_start_time(78);
  EXPECT_EQ(Report<KeeperLost>([](auto* m) {
              m->mutable_keeper_lost()->set_new_keeper_pid(77);
              m->mutable_keeper_lost()->set_new_keeper_start_time(78);
            }).new_keeper_id,
            FromWire(renewed, 1).keeper_id);
}

TEST(Convert, WhatIsNoReportIsNoEvent) {
  v1::AgentMessage m;
  EXPECT_FALSE(FromWire("n1", m, GoodRegister()));
  m.mutable_worker_stalled()->set_kind(static_cast<v1::WorkerStalled::Kind>(9));
  EXPECT_FALSE(FromWire("n1", m, GoodRegister()));
  m.mutable_log_lines()->set_data("x");
  EXPECT_FALSE(FromWire("n1", m, GoodRegister()));
}

GenerationPlan TwoNodes() {
  GenerationPlan plan{.job = "train",
                      .generation = 3,
                      .phase = Phase::kActivate,
                      .master_addr = "10.0.0.1",
                      .master_port = 29500,
                      .restart_count = 2,
                      .restore_step = 40};
  for (int i = 0; i < 2; ++i) {
    NodePlan node{.node = i == 0 ? "n1" : "n2",
                  .group_rank = i,
                  .address = "10.0.0.1",
                  .data_port = 4000,
                  .workers = {},
                  .peers = {{i == 0 ? "n2" : "n1", "10.0.0.2:4000"}, {"n3", "10.0.0.3:4000"}}};
    for (int l = 0; l < 2; ++l) {
      node.workers.push_back({.rank = i * 2 + l,
                              .local_rank = l,
                              .restore = {.step = 40,
                                          .shard_rank = l,
                                          .shard_generation = 2,
                                          .crc_root = 5,
                                          .bytes = 6,
                                          .source_node = "n2",
                                          .source_address = "10.0.0.2:4000",
                                          .relay = static_cast<std::uint32_t>(l),
                                          .others = {{"n3", "10.0.0.3:4000"}}}});
    }
    plan.nodes.push_back(node);
  }
  return plan;
}

TEST(Convert, ActivateGivesANodeItsPartOfThePlan) {
  v1::Command command;
  command.set_target("train.py");
  PlanNumbers numbers;
  const auto plan = std::make_shared<const GenerationPlan>(TwoNodes());
  const v1::ControllerMessage m = ToWire(
      Command{"n2", 1, 1, ActivateCommand{plan, "n2", 2, {command.SerializeAsString()}, "key", 39}},
      &numbers);
  EXPECT_EQ(m.activate().plan_crc(), PlanCrc(*plan));
  ASSERT_TRUE(m.has_activate());
  const v1::Activate& a = m.activate();
  EXPECT_EQ(a.world_size(), 4u);
  EXPECT_EQ(a.group_world_size(), 2u);
  EXPECT_EQ(a.plan().node(), "n2");
  EXPECT_EQ(a.plan().group_rank(), 1);
  EXPECT_EQ(a.plan().workers(1).rank(), 3);
  EXPECT_EQ(a.plan().workers(1).restore().step(), 40);
  EXPECT_EQ(a.plan().workers(1).restore().source_address(), "10.0.0.2:4000");
  EXPECT_EQ(a.plan().workers(1).restore().relay(), 1u);
  EXPECT_EQ(a.plan().workers(1).restore().others(0).address(), "10.0.0.3:4000");
  ASSERT_EQ(a.plan().replica_nodes_size(), 2);
  EXPECT_EQ(a.plan().replica_nodes(0), "n1");
  EXPECT_EQ(a.plan().replica_addresses(1), "10.0.0.3:4000");
  EXPECT_EQ(wire::FromProto(a.plan()), plan->nodes[1]);
  EXPECT_EQ(a.command().target(), "train.py");
  EXPECT_EQ(a.restart_count(), 2u);
  EXPECT_EQ(a.committed_step(), 39);
  EXPECT_EQ(a.data_key(), "key");
}

TEST(Convert, EachCommandBecomesItsMessage) {
  PlanNumbers numbers;
  const auto wire = [&numbers](auto body) {
    return ToWire(Command{"n1", 1, 1, std::move(body)}, &numbers);
  };
  const auto registered =
      wire(RegisteredCommand{4, Milliseconds(250), Milliseconds(1500), {"train"}});
  EXPECT_EQ(registered.registered().heartbeat_interval_ms(), 250u);
  EXPECT_EQ(registered.registered().lease_ms(), 1500u);
  EXPECT_EQ(registered.registered().known_jobs(0), "train");
  EXPECT_EQ(registered.registered().controller_version(), kVersion);
  EXPECT_EQ(wire(WarmCommand{"train", {}, 2}).warm().nproc_per_node(), 2u);
  const auto prepare = wire(PrepareCommand{"train", 5, {}, 2, true, true, "key", {}, true});
  EXPECT_TRUE(prepare.prepare().park());
  EXPECT_EQ(prepare.prepare().generation(), 5u);
  EXPECT_TRUE(prepare.prepare().host_store());
  EXPECT_TRUE(prepare.prepare().failed());
  const auto stop = wire(StopJobCommand{"train", 5, true, false, Reason::kCancelled});
  EXPECT_TRUE(stop.stop_job().forget());
  EXPECT_EQ(stop.stop_job().reason(), "cancelled");
  EXPECT_EQ(wire(CommittedCommand{"train", 5, 17}).committed().step(), 17);
}

TEST(Status, AFaultTellsWhatItCost) {
  ClusterState state;
  JobStateView& job = state.jobs["train"];
  job.record.spec.job = "train";
  job.record.state = JobState::kRunning;
  job.plan = TwoNodes();
  job.step = 52;
  Fault fault{.id = 1,
              .reason = Reason::kWorkerKilled,
              .subject = "rank 1 on n1",
              .evidence = "signal=9",
              .action = "restart in place",
              .detected = {10'000'000'000},
              .occurred = {9'990'000'000},
              .recovered = {10'250'000'000},
              .generation_before = 2,
              .generation_after = 3,
              .step_before = 50,
              .step_after = 50};
  job.record.faults = {fault};
  const v1::JobStatus s = JobStatusOf(state, job, {20'000'000'000});
  ASSERT_EQ(s.faults_size(), 1);
  EXPECT_EQ(s.faults(0).reason(), "worker_killed");
  EXPECT_DOUBLE_EQ(s.faults(0).detect_seconds(), 0.01);
  EXPECT_DOUBLE_EQ(s.faults(0).recovery_seconds(), 0.25);
  EXPECT_EQ(s.faults(0).steps_lost(), 1);  // step 50 was done twice
  EXPECT_EQ(s.steps_lost(), 1);
  EXPECT_DOUBLE_EQ(s.seconds_lost(), 0.25);
  EXPECT_EQ(s.world_size(), 4u);
  EXPECT_EQ(s.members(1), "n2");
  EXPECT_EQ(s.ranks(3).node(), "n2");
  EXPECT_EQ(s.ranks(3).state(), "STARTING");
  EXPECT_EQ(s.step(), 52);
  job.commits.commits = {{.generation = 3, .step = 53}};
  EXPECT_EQ(JobStatusOf(state, job, {}).step(), 53) << "a step that is committed was made";
}

TEST(Status, TheRootCauseSpeaksTheScriptsOwnWords) {
  ClusterState state;
  JobStateView& job = state.jobs["train"];
  job.record.spec.job = "train";
  job.record.state = JobState::kFailed;
  job.plan = TwoNodes();
  const auto message = [&](const ExitInfo& exit) {
    job.record.failures = {{.rank = 3, .local_rank = 1, .pid = 7, .running = false, .exit = exit}};
    return JobStatusOf(state, job, {}).root_cause().message();
  };
  EXPECT_EQ(
      message({.code = 1,
               .error_json = R"({"message": {"message": "ValueError: no", "extraInfo": {}}})"}),
      "ValueError: no");
  EXPECT_EQ(message({.code = 1, .error_json = R"({"message": "plain"})"}), "plain");
  EXPECT_EQ(message({.code = 3, .error_json = "not json"}), "exit code 3");
  EXPECT_EQ(message({.code = -11}), "ended by signal 11");
  EXPECT_EQ(JobStatusOf(state, job, {}).root_cause().node(), "n2");
  EXPECT_EQ(JobStatusOf(state, job, {}).world_size(), 4u);
  EXPECT_EQ(JobStatusOf(state, job, {}).nodes(), 0u);
}

TEST(Status, AJobIsFoundByFourLettersWhenTheyAreEnough) {
  ClusterState state;
  for (const char* id : {"train-a", "train-b", "other"}) state.jobs[id].record.spec.job = id;
  std::string error;
  EXPECT_EQ(FindJobByPrefix(state, "othe", &error), &state.jobs["other"]);
  EXPECT_EQ(FindJobByPrefix(state, "train-a", &error), &state.jobs["train-a"]);
  EXPECT_EQ(FindJobByPrefix(state, "oth", &error), nullptr);
  EXPECT_NE(error.find("no job 'oth'"), std::string::npos) << error;
  EXPECT_EQ(FindJobByPrefix(state, "train", &error), nullptr);
  EXPECT_NE(error.find("train-a, train-b"), std::string::npos) << error;
}

TEST(Status, ANewcomerIsWarmingUntilItIsReady) {
  ClusterState state;
  NodeState& node = state.nodes["n3"];
  node.record.node = "n3";
  node.record.health = NodeHealth::kAlive;
  node.warm["train"] = Warmth::kAsked;
  JobStateView& job = state.jobs["train"];
  job.record.spec.job = "train";
  job.record.state = JobState::kRunning;
  job.message = "nodes=2 were=1";
  job.newcomers["n3"] = {};
  EXPECT_EQ(NodeStatusOf(state, node, {}).jobs(0), "train:warming");
  EXPECT_EQ(
      JobStatusOf(state, job, {}).message(),
      "nodes=2 were=1; node n3 is warming: the job trains on until it has imported what it needs");
  EXPECT_EQ(JobStatusOf(state, job, {}).spares(), 0u);
  node.warm["train"] = Warmth::kReady;
  EXPECT_EQ(NodeStatusOf(state, node, {}).jobs(0), "train:spare");
  EXPECT_EQ(JobStatusOf(state, job, {}).message(), "nodes=2 were=1");
}

TEST(Status, ANodesStateIsOneOfFive) {
  ClusterState state;
  NodeState& node = state.nodes["n1"];
  node.record.node = "n1";
  node.record.health = NodeHealth::kAlive;
  EXPECT_EQ(NodeStatusOf(state, node, {}).state(), "ALIVE");
  node.record.draining = true;
  node.record.drain_reason = "notice: source=spot deadline_ms=30000";
  node.drain_since = {1'000'000'000};
  node.warm["train"] = Warmth::kReady;
  const v1::NodeStatus drained = NodeStatusOf(state, node, {});
  EXPECT_EQ(drained.state(), "DRAINED");
  EXPECT_EQ(drained.reason(), "notice");
  EXPECT_EQ(drained.evidence(), "source=spot deadline_ms=30000");
  EXPECT_EQ(drained.since(), "1970-01-01T00:00:01.000Z");
  JobStateView& job = state.jobs["train"];
  job.record.spec.job = "train";
  job.record.state = JobState::kRunning;
  EXPECT_EQ(NodeStatusOf(state, node, {}).jobs_size(), 0) << "a drained node is no spare";
  job.plan = TwoNodes();
  EXPECT_EQ(NodeStatusOf(state, node, {}).state(), "DRAINING");
  EXPECT_EQ(NodeStatusOf(state, node, {}).jobs(0), "train:ranks 0-1");
  node.record.health = NodeHealth::kSuspect;
  EXPECT_EQ(NodeStatusOf(state, node, {}).state(), "SUSPECT");
  node.record.health = NodeHealth::kLost;
  node.reason = Reason::kNodeDied;
  node.evidence = "keeper pid 4711 is gone";
  node.since = {2'000'000'000};
  const v1::NodeStatus lost = NodeStatusOf(state, node, {});
  EXPECT_EQ(lost.state(), "LOST");
  EXPECT_EQ(lost.reason(), "node_died");
  EXPECT_EQ(lost.evidence(), "keeper pid 4711 is gone");
  EXPECT_EQ(lost.since(), "1970-01-01T00:00:02.000Z");
  EXPECT_EQ(lost.drain_since(), "1970-01-01T00:00:01.000Z");
}

TEST(Status, ASnapshotIsWhatASuccessorStartsFrom) {
  ClusterState state;
  state.nodes["n1"].record = {
      .node = "n1", .incarnation = 4, .keeper_id = 5, .health = NodeHealth::kAlive};
  JobStateView& job = state.jobs["train"];
  job.record.spec.job = "train";
  job.record.generation = 3;
  job.plan = TwoNodes();
  state.forgotten["old"].spec.job = "old";
  state.forgotten["old"].forgotten = true;
  const v1::StoreSnapshot snapshot = SnapshotOf(state, "c1");
  EXPECT_EQ(snapshot.header().cluster(), "c1");
  EXPECT_EQ(snapshot.nodes_size(), 1);
  EXPECT_EQ(snapshot.nodes(0).incarnation(), 4u);
  EXPECT_EQ(snapshot.jobs_size(), 2) << "the number of a forgotten job, too";
  ASSERT_EQ(snapshot.generations_size(), 1);
  EXPECT_EQ(snapshot.generations(0).nodes(1).workers(1).rank(), 3);
}

TEST(Metrics, BucketsCountFromBelowAndNamesAreEscaped) {
  Counters counters;
  counters.decision.Observe(std::chrono::microseconds(10));  // a bound belongs to its bucket
  counters.decision.Observe(std::chrono::nanoseconds(10'001));
  counters.decision.Observe(std::chrono::seconds(5));
  EXPECT_EQ(counters.decision.count(), 3u);
  const std::string page =
      MetricsText(ClusterState{}, counters, {.cluster = "a\"b\\c\nd", .version = "1"}, {});
  const auto has = [&page](const std::string& line) {
    return page.find(line + "\n") != std::string::npos;
  };
  EXPECT_TRUE(has("everstep_controller_info{cluster=\"a\\\"b\\\\c\\nd\",version=\"1\"} 1")) << page;
  EXPECT_TRUE(has("everstep_decision_duration_seconds_bucket{le=\"1e-05\"} 1")) << page;
  EXPECT_TRUE(has("everstep_decision_duration_seconds_bucket{le=\"5e-05\"} 2")) << page;
  EXPECT_TRUE(has("everstep_decision_duration_seconds_bucket{le=\"1\"} 2")) << page;
  EXPECT_TRUE(has("everstep_decision_duration_seconds_bucket{le=\"+Inf\"} 3")) << page;
  EXPECT_TRUE(has("everstep_decision_duration_seconds_count 3")) << page;
}

TEST(Options, AddressesAreHostAndPort) {
  std::string host;
  int port = 0;
  EXPECT_TRUE(SplitAddress("[::1]:80", &host, &port));
  EXPECT_EQ(host, "::1");
  EXPECT_EQ(port, 80);
  for (const char* bad :
       {"", "host", "host:", ":1", "host:-1", "host:65536", "host:1x", "host: 1"}) {
    EXPECT_FALSE(SplitAddress(bad, &host, &port)) << bad;
  }
}

std::uint64_t StartTimeOf(pid_t pid) {
  std::ifstream in("/proc/" + std::to_string(pid) + "/stat");
  std::string text;
  std::getline(in, text);
  std::istringstream fields(text.substr(text.rfind(')') + 1));
  std::string field;
  for (int i = 3; i <= 22; ++i) fields >> field;
  return std::stoull(field);
}

TEST(ProcessWatch, WhatCannotBeLookedAtIsNotTakenForDead) {
  std::atomic<int> dead{0};
  ProcessWatch watch([&](std::uint64_t) { ++dead; });
  const pid_t self = getpid();
  const std::uint64_t start = StartTimeOf(self);
#ifndef __SANITIZE_ADDRESS__  // UBSan makes a pipe to look at an object's type: it needs
                              // descriptors
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  // With no descriptor free; then with one, which the pidfd itself takes.
  const int next = dup(0);
  close(next);
  for (int room = 0; room < 2; ++room) {
    rlimit none = before;
    none.rlim_cur = static_cast<rlim_t>(next) + static_cast<rlim_t>(room);
    ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
    watch.Watch(1 + static_cast<std::uint64_t>(room), self, start);
    ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
    EXPECT_EQ(dead, 0) << "room for " << room;
  }
#endif
  watch.Watch(3, self, start + 1);
  EXPECT_EQ(dead, 1) << "the number was given to another process";
  const pid_t child = fork();
  if (child == 0) _exit(0);
  ASSERT_EQ(waitpid(child, nullptr, 0), child);
  watch.Watch(4, child, 1);
  EXPECT_EQ(dead, 2) << "it is gone";
}

}  // namespace
}  // namespace everstep::controller
