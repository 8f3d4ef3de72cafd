// everstep-controller as a process, with scripted agents over real gRPC on loopback.
//
//   test ── admin calls ──> everstep-controller <── Session ── FakeAgent n1, n2, ...
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "tests/integration/controller_process.h"
#include "tests/integration/fake_agent.h"

namespace everstep::test {
namespace {

class ServerTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(controller_.Start()) << controller_.output(); }
  void TearDown() override {
    if (HasFailure()) std::cerr << controller_.output();
  }

  // Nodes n1..nN that obey, registered.
  void Join(int count) {
    for (int i = 1; i <= count; ++i) {
      agents_.push_back(std::make_unique<FakeAgent>("n" + std::to_string(i)));
      agents_.back()->hello().set_keeper_pid(1000 + i);
      agents_.back()->Obey();
      ASSERT_TRUE(agents_.back()->Connect(controller_.address()));
    }
  }
  FakeAgent& agent(int i) { return *agents_.at(static_cast<std::size_t>(i - 1)); }

  bool Saw(const std::string& type, const std::string& reason, const std::string& node = "") {
    for (const v1::Event& event : controller_.Events()) {
      if (event.type() == type && event.reason() == reason &&
          (node.empty() || event.node() == node)) {
        return true;
      }
    }
    return false;
  }

  TempDir dir_;
  ControllerProcess controller_{dir_.path() + "/state"};
  std::vector<std::unique_ptr<FakeAgent>> agents_;
};

TEST_F(ServerTest, AnAgentRegistersBeatsAndIsListed) {
  FakeAgent agent("n1");
  agent.hello().set_slots(4);
  (*agent.hello().mutable_labels())["rack"] = "r7";
  ASSERT_TRUE(agent.Connect(controller_.address()));
  const auto answer = agent.messages().front();
  EXPECT_EQ(answer.incarnation(), 1u);
  EXPECT_EQ(answer.sequence(), 1u);
  EXPECT_EQ(answer.registered().heartbeat_interval_ms(), 50u);
  EXPECT_EQ(answer.registered().lease_ms(), 600u);
  EXPECT_EQ(answer.registered().controller_version(), kVersion);
  const v1::ClusterStatus status = controller_.Status();
  EXPECT_EQ(answer.registered().cluster(), status.cluster());
  EXPECT_EQ(status.controller_pid(), static_cast<std::uint32_t>(controller_.pid()));
  EXPECT_EQ(status.starts(), 1u);
  EXPECT_EQ(status.store(), "rocksdb ok");
  ASSERT_EQ(status.nodes_size(), 1);
  EXPECT_EQ(status.nodes(0).state(), "ALIVE");
  EXPECT_EQ(status.nodes(0).slots(), 4u);
  EXPECT_EQ(status.nodes(0).labels().at("rack"), "r7");
  // Beats go on: after two leases it is alive still.
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(1300);
  EXPECT_FALSE(Eventually([&] { return controller_.NodeState("n1") != "ALIVE"; },
                          std::chrono::duration_cast<std::chrono::milliseconds>(
                              until - std::chrono::steady_clock::now())));
}

TEST_F(ServerTest, AJobGoesFromSubmissionToItsEnd) {
  Join(2);
  ASSERT_TRUE(controller_.Submit("train", 2, 2, 2).ok());
  // Whoever follows sees the end and the stream's end.
  std::vector<std::string> states;
  std::thread follower([&] {
    controller_.Call([&](grpc::ClientContext* c) {
      v1::FollowJobRequest request;
      request.set_job("train");
      auto reader = controller_.admin().FollowJob(c, request);
      v1::JobStatus status;
      while (reader->Read(&status)) states.push_back(status.state());
      return reader->Finish();
    });
  });
  const auto activate = agent(1).WaitActivate(1);
  ASSERT_TRUE(activate);
  EXPECT_EQ(activate->activate().world_size(), 4u);
  EXPECT_EQ(activate->activate().group_world_size(), 2u);
  EXPECT_EQ(activate->activate().master_port(), 29500u);
  EXPECT_EQ(activate->activate().command().target(), "train.py");
  EXPECT_EQ(activate->activate().plan().workers_size(), 2);
  EXPECT_NE(activate->activate().plan_crc(), 0u);
  EXPECT_EQ(activate->activate().data_key().size(), 32u);
  ASSERT_TRUE(controller_.JobIs("train", "RUNNING"));
  const v1::JobStatus running = controller_.Job("trai");  // four letters of its name will do
  EXPECT_EQ(running.job(), "train");
  EXPECT_EQ(running.ranks_size(), 4);
  EXPECT_EQ(running.ranks(3).state(), "RUNNING");
  for (int i = 1; i <= 2; ++i) agent(i).Exit(agent(i).WaitActivate(1)->activate(), 0);
  EXPECT_TRUE(controller_.JobIs("train", "SUCCEEDED"));
  follower.join();
  ASSERT_FALSE(states.empty());
  EXPECT_EQ(states.back(), "SUCCEEDED");
  EXPECT_TRUE(Saw("job_ended", "completed"));
  // Commands of one registration are numbered without a gap.
  std::uint64_t sequence = 0;
  for (const auto& message : agent(1).messages()) EXPECT_EQ(message.sequence(), ++sequence);
}

TEST_F(ServerTest, ABrokenStreamIsSuspicionAtOnceAndALossAfterTheLease) {
  Join(3);
  ASSERT_TRUE(controller_.Submit("train", 2, 2).ok());
  ASSERT_TRUE(controller_.JobIs("train", "RUNNING"));
  const auto broke = std::chrono::steady_clock::now();
  agent(2).Break();
  EXPECT_TRUE(Eventually([&] { return controller_.NodeState("n2") == "SUSPECT"; }));
  EXPECT_LT(std::chrono::steady_clock::now() - broke, std::chrono::milliseconds(500));
  // The spare takes its place in generation 2.
  const auto activate = agent(3).WaitActivate(2);
  ASSERT_TRUE(activate);
  EXPECT_EQ(activate->activate().plan().group_rank(), 1);
  EXPECT_EQ(controller_.NodeState("n2"), "LOST");
  ASSERT_TRUE(controller_.JobIs("train", "RUNNING"));
  const v1::JobStatus job = controller_.Job("train");
  ASSERT_EQ(job.faults_size(), 1);
  EXPECT_EQ(job.faults(0).reason(), "node_lost");
  EXPECT_EQ(job.faults(0).subject(), "node n2");
  EXPECT_TRUE(Saw("node_lost", "node_lost", "n2"));
}

TEST_F(ServerTest, AStreamThatBreaksAndReturnsInTimeIsNoLoss) {
  Join(1);
  ASSERT_TRUE(controller_.Submit("train", 1, 1).ok());
  ASSERT_TRUE(controller_.JobIs("train", "RUNNING"));
  agent(1).Hold(agent(1).WaitActivate(1)->activate());
  ASSERT_TRUE(agent(1).Connect(controller_.address()));
  EXPECT_TRUE(Saw("node_reattached", "reattached", "n1"));
  EXPECT_EQ(agent(1).incarnation(), 2u);
  const v1::JobStatus job = controller_.Job("train");
  EXPECT_EQ(job.state(), "RUNNING");
  EXPECT_EQ(job.generation(), 1u);
  EXPECT_EQ(job.faults_size(), 0);
}

TEST_F(ServerTest, ANodeWhoseKeeperIsKnownDeadIsLostBeforeItsLease) {
  // A real process stands for the keeper; the controller sees it end by itself.
  const pid_t keeper = ::fork();
  if (keeper == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;) ::pause();
  }
  FakeAgent agent("n1");
  agent.hello().set_keeper_pid(keeper);
  std::string stat = ReadAll("/proc/" + std::to_string(keeper) + "/stat");
  std::istringstream fields(stat.substr(stat.rfind(')') + 2));
  std::string field;
  for (int i = 3; i <= 22; ++i) fields >> field;
  agent.hello().set_keeper_start_time(std::stoull(field));
  std::string boot = ReadAll("/proc/sys/kernel/random/boot_id");
  boot.resize(boot.find('\n'));
  agent.hello().set_boot_id(boot);
  struct stat ns {};
  ASSERT_EQ(::stat("/proc/self/ns/pid", &ns), 0);
  agent.hello().set_pid_namespace(ns.st_ino);
  ASSERT_TRUE(agent.Connect(controller_.address()));
  ::kill(keeper, SIGKILL);
  ::waitpid(keeper, nullptr, 0);
  // The agent lives: its keeper's death is its own to tell.
  EXPECT_EQ(controller_.NodeState("n1"), "ALIVE");
  const auto broke = std::chrono::steady_clock::now();
  agent.Break();
  EXPECT_TRUE(Eventually([&] { return controller_.NodeState("n1") == "LOST"; }));
  EXPECT_LT(std::chrono::steady_clock::now() - broke,
            std::chrono::milliseconds(550));  // the lease is 600
  EXPECT_TRUE(Saw("node_lost", "node_died", "n1"));
}

TEST_F(ServerTest, AKilledControllerComesBackAndNothingRestarts) {
  Join(2);
  ASSERT_TRUE(controller_.Submit("train", 2, 2).ok());
  ASSERT_TRUE(controller_.JobIs("train", "RUNNING"));
  const std::size_t events = controller_.Events().size();
  for (int i = 1; i <= 2; ++i) agent(i).Hold(agent(i).WaitActivate(1)->activate());
  controller_.Kill();
  ASSERT_TRUE(controller_.Start()) << controller_.output();
  for (int i = 1; i <= 2; ++i) ASSERT_TRUE(agent(i).Connect(controller_.address()));
  const v1::JobStatus job = controller_.Job("train");
  EXPECT_EQ(job.state(), "RUNNING");
  EXPECT_EQ(job.generation(), 1u);
  EXPECT_EQ(job.faults_size(), 0);
  EXPECT_EQ(job.ranks(1).state(), "RUNNING");
  EXPECT_EQ(controller_.Status().starts(), 2u);
  EXPECT_GT(controller_.Events().size(), events);  // history goes on, nothing of it is lost
  // And it goes on to its end.
  for (int i = 1; i <= 2; ++i) agent(i).Exit(agent(i).WaitActivate(1)->activate(), 0);
  EXPECT_TRUE(controller_.JobIs("train", "SUCCEEDED"));
}

TEST_F(ServerTest, AnAgentThatDoesNotComeBackAfterARestartIsLost) {
  Join(2);
  ASSERT_TRUE(controller_.Submit("train", 1, 2).ok());
  ASSERT_TRUE(controller_.JobIs("train", "RUNNING"));
  agent(1).Hold(agent(1).WaitActivate(1)->activate());
  controller_.Kill();
  ASSERT_TRUE(controller_.Start()) << controller_.output();
  ASSERT_TRUE(agent(1).Connect(controller_.address()));
  ASSERT_TRUE(agent(1).WaitActivate(2));
  EXPECT_EQ(controller_.NodeState("n2"), "LOST");
  EXPECT_TRUE(Eventually([&] { return controller_.Job("train").nodes() == 1; }));
}

TEST_F(ServerTest, NodesAreDrainedAndTakenBack) {
  Join(2);
  ASSERT_TRUE(controller_.Submit("train", 1, 1).ok());
  ASSERT_TRUE(controller_.JobIs("train", "RUNNING"));
  const std::string member = controller_.Job("train").members(0);
  v1::DrainNodeRequest drain;
  drain.set_node(member);
  drain.set_reason("memory errors");
  drain.set_deadline_ms(90'000);
  v1::NodeStatus node;
  ASSERT_TRUE(
      controller_.Call([&](auto* c) { return controller_.admin().DrainNode(c, drain, &node); })
          .ok());
  EXPECT_TRUE(Eventually([&] { return controller_.NodeState(member) == "DRAINED"; }));
  EXPECT_NE(controller_.Job("train").members(0), member);
  const auto events = controller_.Events();
  EXPECT_TRUE(std::any_of(events.begin(), events.end(), [](const v1::Event& e) {
    return e.type() == "node_draining" &&
           e.evidence().find("memory errors (goes away in 90 s)") != std::string::npos;
  }));
  // The other one is needed now.
  drain.set_node(controller_.Job("train").members(0));
  const grpc::Status refused =
      controller_.Call([&](auto* c) { return controller_.admin().DrainNode(c, drain, &node); });
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_NE(refused.error_message().find("--allow-pause"), std::string::npos)
      << refused.error_message();
  v1::UndrainNodeRequest undrain;
  undrain.set_node(member);
  ASSERT_TRUE(
      controller_.Call([&](auto* c) { return controller_.admin().UndrainNode(c, undrain, &node); })
          .ok());
  EXPECT_EQ(node.state(), "ALIVE");
  undrain.set_node("n9");
  EXPECT_EQ(
      controller_.Call([&](auto* c) { return controller_.admin().UndrainNode(c, undrain, &node); })
          .error_code(),
      grpc::StatusCode::NOT_FOUND);
}

TEST_F(ServerTest, CancelEndsAJobAndNamesAreTold) {
  Join(1);
  ASSERT_TRUE(controller_.Submit("train", 1, 1).ok());
  ASSERT_TRUE(controller_.JobIs("train", "RUNNING"));
  EXPECT_EQ(controller_.Submit("train", 1, 1).error_code(), grpc::StatusCode::ALREADY_EXISTS);
  v1::CancelJobRequest cancel;
  v1::CancelJobReply reply;
  cancel.set_job("nope");
  EXPECT_EQ(
      controller_.Call([&](auto* c) { return controller_.admin().CancelJob(c, cancel, &reply); })
          .error_code(),
      grpc::StatusCode::NOT_FOUND);
  cancel.set_job("train");
  cancel.set_reason("changed my mind");
  ASSERT_TRUE(
      controller_.Call([&](auto* c) { return controller_.admin().CancelJob(c, cancel, &reply); })
          .ok());
  ASSERT_TRUE(controller_.JobIs("train", "CANCELLED"));
  EXPECT_EQ(controller_.Job("train").message(), "changed my mind");
  EXPECT_EQ(controller_.Job("train").exit_code(), 1);
  EXPECT_EQ(
      controller_.Call([&](auto* c) { return controller_.admin().CancelJob(c, cancel, &reply); })
          .error_code(),
      grpc::StatusCode::FAILED_PRECONDITION);
}

TEST_F(ServerTest, EventsAreReplayedThenFollowed) {
  Join(1);
  const auto before = controller_.Events();
  ASSERT_FALSE(before.empty());
  v1::WatchEventsRequest request;
  request.set_follow(true);
  request.set_node("n1");
  request.set_limit(1);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kPatience);
  auto reader = controller_.admin().WatchEvents(&context, request);
  v1::Event event;
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_EQ(event.type(), "node_registered");
  EXPECT_EQ(event.node(), "n1");
  agent(1).Break();
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_EQ(event.type(), "node_suspect");
  EXPECT_EQ(event.reason(), "stream_broken");
  EXPECT_EQ(event.severity(), "WARNING");
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_EQ(event.type(), "node_lost");
  context.TryCancel();
  reader->Finish();
}

TEST_F(ServerTest, LogLinesComeThroughAndEndWithTheNodesThatHaveThem) {
  Join(2);
  ASSERT_TRUE(controller_.Submit("train", 2, 2).ok());
  ASSERT_TRUE(controller_.JobIs("train", "RUNNING"));
  v1::TailJobLogsRequest request;
  request.set_job("train");
  request.set_rank(-1);
  request.set_tail_lines(10);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kPatience);
  auto reader = controller_.admin().TailJobLogs(&context, request);
  for (int i = 1; i <= 2; ++i) {
    const auto asked = agent(i).Wait([](const auto& m) { return m.has_tail_logs(); });
    ASSERT_TRUE(asked);
    EXPECT_EQ(asked->tail_logs().job(), "train");
    EXPECT_EQ(asked->tail_logs().tail_lines(), 10);
    v1::AgentMessage lines;
    lines.mutable_log_lines()->set_request(asked->tail_logs().request());
    lines.mutable_log_lines()->set_job("train");
    lines.mutable_log_lines()->set_rank(i - 1);
    lines.mutable_log_lines()->set_data("hello from " + std::to_string(i - 1) + "\n");
    agent(i).Send(lines);
    lines.mutable_log_lines()->clear_data();
    lines.mutable_log_lines()->set_end(true);
    agent(i).Send(lines);
  }
  std::set<std::string> seen;
  v1::JobLogLines lines;
  while (reader->Read(&lines)) seen.insert(lines.node() + ": " + lines.data());
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(seen, (std::set<std::string>{"n1: hello from 0\n", "n2: hello from 1\n"}));
}

TEST_F(ServerTest, FollowedLogsGoOnThroughGenerationsAndEndWithTheJob) {
  Join(2);
  ASSERT_TRUE(controller_.Submit("train", 1, 1).ok());
  ASSERT_TRUE(controller_.JobIs("train", "RUNNING"));
  const int first = controller_.Job("train").members(0) == "n1" ? 1 : 2;
  FakeAgent& old_member = agent(first);
  FakeAgent& new_member = agent(3 - first);
  v1::TailJobLogsRequest request;
  request.set_job("train");
  request.set_rank(0);
  request.set_follow(true);
  request.set_tail_lines(0);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kPatience);
  auto reader = controller_.admin().TailJobLogs(&context, request);
  ASSERT_TRUE(old_member.Wait([](const auto& m) { return m.has_tail_logs(); }));
  old_member.Break();
  const auto activate = new_member.WaitActivate(2);
  ASSERT_TRUE(activate);
  // The one that takes over is asked before its workers start, for all that they will say.
  const auto asked = new_member.Wait([](const auto& m) { return m.has_tail_logs(); });
  ASSERT_TRUE(asked);
  EXPECT_LT(asked->sequence(), activate->sequence());
  EXPECT_EQ(asked->tail_logs().tail_lines(), -1);
  v1::AgentMessage lines;
  lines.mutable_log_lines()->set_request(asked->tail_logs().request());
  lines.mutable_log_lines()->set_data("generation 2\n");
  new_member.Send(lines);
  v1::JobLogLines got;
  ASSERT_TRUE(reader->Read(&got));
  EXPECT_EQ(got.data(), "generation 2\n");
  ASSERT_TRUE(controller_.JobIs("train", "RUNNING"));
  new_member.Exit(activate->activate(), 0);
  EXPECT_FALSE(reader->Read(&got));
  EXPECT_TRUE(reader->Finish().ok());
  // Its agents have the files still, and are asked once.
  const std::size_t before = new_member.count();
  grpc::ClientContext late;
  late.set_deadline(std::chrono::system_clock::now() + kPatience);
  auto ended = controller_.admin().TailJobLogs(&late, request);
  const auto again = new_member.Wait(
      [](const auto& m) { return m.has_tail_logs() && !m.tail_logs().cancel(); }, before);
  ASSERT_TRUE(again);
  EXPECT_FALSE(again->tail_logs().follow());
  lines.mutable_log_lines()->set_request(again->tail_logs().request());
  lines.mutable_log_lines()->set_end(true);
  new_member.Send(lines);
  EXPECT_TRUE(ended->Read(&got));
  EXPECT_FALSE(ended->Read(&got));
  EXPECT_TRUE(ended->Finish().ok());
  // With nobody left to ask, the error says where the files are.
  new_member.Break();
  EXPECT_TRUE(
      Eventually([&] { return controller_.NodeState(first == 1 ? "n2" : "n1") == "LOST"; }));
  grpc::ClientContext alone;
  alone.set_deadline(std::chrono::system_clock::now() + kPatience);
  auto nothing = controller_.admin().TailJobLogs(&alone, request);
  EXPECT_FALSE(nothing->Read(&got));
  const grpc::Status status = nothing->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_NE(status.error_message().find("jobs/train"), std::string::npos) << status.error_message();
}

TEST_F(ServerTest, ADrillReachesTheNodeOfTheRank) {
  Join(1);
  ASSERT_TRUE(controller_.Submit("train", 1, 1).ok());
  ASSERT_TRUE(controller_.JobIs("train", "RUNNING"));
  v1::DrillRequest drill;
  drill.set_job("train");
  drill.set_rank(0);
  drill.set_signal(SIGKILL);
  v1::DrillReply reply;
  ASSERT_TRUE(
      controller_.Call([&](auto* c) { return controller_.admin().Drill(c, drill, &reply); }).ok());
  EXPECT_EQ(reply.node(), "n1");
  EXPECT_EQ(reply.pid(), 5000);
  const auto told = agent(1).Wait([](const auto& m) { return m.has_kill_for_drill(); });
  ASSERT_TRUE(told);
  EXPECT_EQ(told->kill_for_drill().signal(), SIGKILL);
  drill.set_rank(7);
  EXPECT_EQ(controller_.Call([&](auto* c) { return controller_.admin().Drill(c, drill, &reply); })
                .error_code(),
            grpc::StatusCode::FAILED_PRECONDITION);
}

}  // namespace
}  // namespace everstep::test
