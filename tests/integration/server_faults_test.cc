// What everstep-controller does with bad input, bad peers and bad machines: a text that says who,
// what, the limit and what to do next, a documented code, and everybody else served on.
#include <arpa/inet.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <algorithm>

#include "tests/integration/controller_process.h"
#include "tests/integration/fake_agent.h"

namespace everstep::test {
namespace {

using ::testing::Test;

bool Contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

class ServerFaults : public Test {
 protected:
  void Serve(std::vector<std::string> more = {}) {
    ASSERT_TRUE(controller_.Start(std::move(more))) << controller_.output();
  }
  void TearDown() override {
    if (HasFailure()) std::cerr << controller_.output();
  }

  // Address of its HTTP side.
  std::string http() const {
    std::string address = ReadAll(controller_.state() + "/http.address");
    address.resize(address.find('\n'));
    return address;
  }

  TempDir dir_;
  ControllerProcess controller_{dir_.path() + "/state"};
};

// One HTTP/1.0 exchange; the whole answer.
std::string Http(const std::string& address, const std::string& request) {
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_addr.s_addr = ::htonl(INADDR_LOOPBACK);
  to.sin_port =
      ::htons(static_cast<std::uint16_t>(std::stoi(address.substr(address.rfind(':') + 1))));
  timeval patience{5, 0};
  ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  std::string answer;
  if (::connect(fd, reinterpret_cast<const sockaddr*>(&to), sizeof(to)) == 0 &&
      ::send(fd, request.data(), request.size(), MSG_NOSIGNAL) ==
          static_cast<ssize_t>(request.size())) {
    char chunk[4096];
    for (ssize_t n; (n = ::recv(fd, chunk, sizeof(chunk), 0)) > 0;)
      answer.append(chunk, static_cast<std::size_t>(n));
  }
  ::close(fd);
  return answer;
}

// --- peers ---

TEST_F(ServerFaults, AnotherProtocolVersionIsRefusedWithBothVersions) {
  Serve();
  FakeAgent agent("n1");
  agent.hello().set_protocol_version(kProtocolVersion + 6);
  agent.hello().set_version("9.9.9");
  EXPECT_FALSE(agent.Connect(controller_.address()));
  const grpc::Status status = agent.End();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_TRUE(Contains(status.error_message(), "9.9.9")) << status.error_message();
  EXPECT_TRUE(Contains(status.error_message(), kVersion)) << status.error_message();
  EXPECT_TRUE(Contains(status.error_message(), "protocol 7")) << status.error_message();
  EXPECT_TRUE(Contains(status.error_message(), "hint: ")) << status.error_message();
  EXPECT_EQ(controller_.NodeState("n1"), "");
}

TEST_F(ServerFaults, ASessionMustBeginWithRegister) {
  Serve();
  FakeAgent agent("n1");
  agent.Open(controller_.address());
  v1::AgentMessage beat;
  beat.mutable_heartbeat()->set_sequence(1);
  agent.Send(beat);
  const grpc::Status status = agent.End();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_TRUE(Contains(status.error_message(), "must be Register")) << status.error_message();
}

TEST_F(ServerFaults, ANodeNameThatIsNoneIsRefused) {
  Serve();
  for (const char* name : {"", "../../etc", "N1", "a b"}) {
    FakeAgent agent(name);
    EXPECT_FALSE(agent.Connect(controller_.address())) << name;
    EXPECT_TRUE(Contains(agent.End().error_message(), "[a-z0-9.-]{1,63}")) << name;
  }
}

TEST_F(ServerFaults, TwoRegistrationsOnOneStreamEndIt) {
  Serve();
  FakeAgent agent("n1");
  ASSERT_TRUE(agent.Connect(controller_.address()));
  v1::AgentMessage again;
  *again.mutable_register_() = agent.hello();
  agent.Send(again);
  const grpc::Status status = agent.End();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_TRUE(Contains(status.error_message(), "registered twice")) << status.error_message();
  EXPECT_TRUE(Eventually([&] { return controller_.NodeState("n1") == "LOST"; }));
}

TEST_F(ServerFaults, ALivingNodesNameIsNotGivenAwayAndADeadOnesIs) {
  Serve();
  FakeAgent first("n1");
  ASSERT_TRUE(first.Connect(controller_.address()));
  FakeAgent second("n1");
  second.hello().set_boot_id("another-machine");
  EXPECT_FALSE(second.Connect(controller_.address()));
  const grpc::Status status = second.End();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ALREADY_EXISTS);
  EXPECT_TRUE(Contains(status.error_message(), "--node")) << status.error_message();
  EXPECT_EQ(controller_.NodeState("n1"), "ALIVE");
  first.Break();
  EXPECT_TRUE(Eventually([&] { return second.Connect(controller_.address()); }));
  EXPECT_EQ(controller_.NodeState("n1"), "ALIVE");
}

TEST_F(ServerFaults, OneNodeTooManyIsToldTheLimit) {
  Serve({"--max-nodes", "2"});
  FakeAgent a("n1"), b("n2"), c("n3");
  ASSERT_TRUE(a.Connect(controller_.address()));
  ASSERT_TRUE(b.Connect(controller_.address()));
  EXPECT_FALSE(c.Connect(controller_.address()));
  const grpc::Status status = c.End();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(Contains(status.error_message(), "takes 2")) << status.error_message();
  EXPECT_TRUE(Contains(status.error_message(), "--max-nodes")) << status.error_message();
}

TEST_F(ServerFaults, AnOversizedMessageEndsItsStreamAlone) {
  Serve();
  FakeAgent agent("n1"), other("n2");
  ASSERT_TRUE(agent.Connect(controller_.address()));
  ASSERT_TRUE(other.Connect(controller_.address()));
  v1::AgentMessage message;
  message.mutable_keeper_lost()->set_message(std::string(17u << 20, 'x'));
  agent.Send(message);
  const grpc::Status status = agent.End();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << status.error_message();
  EXPECT_TRUE(Contains(status.error_message(), std::to_string(16 << 20))) << status.error_message();
  EXPECT_TRUE(Eventually([&] { return controller_.NodeState("n1") != "ALIVE"; }));
  EXPECT_EQ(controller_.NodeState("n2"), "ALIVE");
}

TEST_F(ServerFaults, BytesThatAreNoMessageEndTheirStreamAlone) {
  Serve();
  FakeAgent other("n2");
  ASSERT_TRUE(other.Connect(controller_.address()));
  // Well-framed gRPC, not our message.
  grpc::GenericStub stub(controller_.channel());
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kPatience);
  grpc::CompletionQueue queue;
  auto stream = stub.PrepareCall(&context, "/everstep.v1.AgentService/Session", &queue);
  const auto next = [&queue] {
    void* tag = nullptr;
    bool ok = false;
    queue.Next(&tag, &ok);
    return ok;
  };
  stream->StartCall(nullptr);
  ASSERT_TRUE(next());
  grpc::Slice garbage("\xff\xff\xff\xff not a protobuf \x01");
  stream->Write(grpc::ByteBuffer(&garbage, 1), nullptr);
  next();
  grpc::Status status;
  stream->Finish(&status, nullptr);
  next();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << status.error_message();
  // And no gRPC at all.
  EXPECT_FALSE(Contains(Http(controller_.address(), "GET / HTTP/1.0\r\n\r\n"), "200"));
  Http(controller_.address(), std::string(100'000, '\xff'));
  EXPECT_EQ(controller_.NodeState("n2"), "ALIVE");
}

TEST_F(ServerFaults, AMessageOfAnOldIncarnationIsDropped) {
  Serve({"--http", "127.0.0.1:0"});
  FakeAgent agent("n1");
  agent.Obey();
  ASSERT_TRUE(agent.Connect(controller_.address()));
  ASSERT_TRUE(controller_.Submit("train", 1, 1).ok());
  ASSERT_TRUE(controller_.JobIs("train", "RUNNING"));
  const auto activate = agent.WaitActivate(1);
  agent.Hold(activate->activate());
  ASSERT_TRUE(agent.Connect(controller_.address()));
  // What a delayed packet of the first registration would say, and one of another generation.
  v1::AgentMessage exited;
  exited.mutable_worker_exited()->set_job("train");
  exited.mutable_worker_exited()->set_generation(1);
  exited.mutable_worker_exited()->mutable_exit()->set_code(1);
  ASSERT_TRUE(agent.SendAs(1, exited));
  v1::Activate wrong = activate->activate();
  wrong.set_generation(7);
  agent.Exit(wrong, 1);
  EXPECT_TRUE(Eventually([&] {
    return Contains(Http(http(), "GET /metrics HTTP/1.0\r\n\r\n"),
                    "\neverstep_stale_messages_total 2\n");
  }));
  EXPECT_EQ(controller_.Job("train").state(), "RUNNING");
  EXPECT_EQ(controller_.Job("train").faults_size(), 0);
}

TEST_F(ServerFaults, AReaderThatDoesNotReadIsCutOffWithTheReasonAndNobodyWaits) {
  Serve();
  FakeAgent agent("n1");
  agent.Obey();
  ASSERT_TRUE(agent.Connect(controller_.address()));
  ASSERT_TRUE(controller_.Submit("train", 1, 1).ok());
  ASSERT_TRUE(controller_.JobIs("train", "RUNNING"));
  v1::TailJobLogsRequest request;
  request.set_job("train");
  request.set_rank(-1);
  request.set_follow(true);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kPatience);
  auto reader = controller_.admin().TailJobLogs(&context, request);
  const auto asked = agent.Wait([](const auto& m) { return m.has_tail_logs(); });
  ASSERT_TRUE(asked);
  // 24 MiB that nobody reads; the queue takes 16.
  v1::AgentMessage lines;
  lines.mutable_log_lines()->set_request(asked->tail_logs().request());
  lines.mutable_log_lines()->set_job("train");
  lines.mutable_log_lines()->set_data(std::string(64u << 10, 'x'));
  for (int i = 0; i < 24 * 16; ++i) ASSERT_TRUE(agent.Send(lines));
  // The agent is told to stop, the controller answers others all the time, the node stays alive.
  const auto cancelled =
      agent.Wait([&](const auto& m) { return m.has_tail_logs() && m.tail_logs().cancel(); });
  ASSERT_TRUE(cancelled);
  EXPECT_EQ(cancelled->tail_logs().request(), asked->tail_logs().request());
  EXPECT_EQ(controller_.NodeState("n1"), "ALIVE");
  // A reader that wakes up within a moment finds out why.
  v1::JobLogLines got;
  while (reader->Read(&got)) {
  }
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << status.error_message();
  EXPECT_TRUE(Contains(status.error_message(), "slow_reader")) << status.error_message();
}

TEST_F(ServerFaults, ASpecThatCannotRunIsRefused) {
  Serve();
  v1::SubmitJobRequest request;
  v1::SubmitJobReply reply;
  const auto submit = [&] {
    return controller_.Call(
        [&](auto* c) { return controller_.admin().SubmitJob(c, request, &reply); });
  };
  EXPECT_EQ(submit().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  request.mutable_spec()->mutable_command()->set_target("train.py");
  request.mutable_spec()->set_job("../up");
  EXPECT_TRUE(Contains(submit().error_message(), "[A-Za-z0-9_.-]{1,128}"));
  request.mutable_spec()->set_job("train");
  request.mutable_spec()->set_min_nodes(3);
  request.mutable_spec()->set_max_nodes(2);
  request.mutable_spec()->set_nproc_per_node(1);
  EXPECT_TRUE(Contains(submit().error_message(), "3 to 2 nodes"));
  request.mutable_spec()->set_max_nodes(3);
  request.mutable_spec()->set_nproc_per_node(5000);
  EXPECT_TRUE(Contains(submit().error_message(), "1024"));
  request.mutable_spec()->set_nproc_per_node(1);
  (*request.mutable_spec()->mutable_command()->mutable_env())["BIG"] = std::string(5u << 20, 'x');
  EXPECT_EQ(submit().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(controller_.Status().jobs_size(), 0);
}

// --- the machine ---

TEST_F(ServerFaults, ASecondControllerOnTheSameStateIsRefused) {
  Serve();
  ControllerProcess second(controller_.state());
  second.Launch(
      {"--log-file", dir_.path() + "/second.log", "--address-file", dir_.path() + "/second"});
  EXPECT_EQ(second.Wait(), 4);
  EXPECT_TRUE(Contains(second.output(), "has it open")) << second.output();
  EXPECT_TRUE(Contains(second.output(), "--state-dir")) << second.output();
  EXPECT_EQ(controller_.Status().starts(), 1u);  // the first one serves on
}

TEST_F(ServerFaults, APortInUseIsNamed) {
  Serve();
  ControllerProcess second(dir_.path() + "/second");
  second.Launch({"--listen", controller_.address()});
  EXPECT_EQ(second.Wait(), 3);
  EXPECT_TRUE(Contains(second.output(), controller_.address())) << second.output();
  EXPECT_TRUE(Contains(second.output(), "in use")) << second.output();
  ControllerProcess third(dir_.path() + "/third");
  third.Launch({"--listen", "192.0.2.7:0"});
  EXPECT_EQ(third.Wait(), 3);
  EXPECT_TRUE(Contains(third.output(), "192.0.2.7")) << third.output();
  ControllerProcess fourth(dir_.path() + "/fourth");
  fourth.Launch({"--http", controller_.address()});
  EXPECT_EQ(fourth.Wait(), 3);
  EXPECT_TRUE(Contains(fourth.output(), "--http")) << fourth.output();
}

TEST_F(ServerFaults, AStateDirectoryThatCannotBeWrittenIsNamed) {
  ControllerProcess below_a_file("/proc/version/state");
  below_a_file.Launch({"--address-file", dir_.path() + "/address"});
  EXPECT_EQ(below_a_file.Wait(), 5);
}

// A small file system of its own, when this machine lets us mount one.
class SmallDisk {
 public:
  explicit SmallDisk(std::string path) : path_(std::move(path)) {
    std::filesystem::create_directories(path_);
    mounted_ = ::mount("tmpfs", path_.c_str(), "tmpfs", 0, "size=24m") == 0;
  }
  ~SmallDisk() {
    if (mounted_) ::umount2(path_.c_str(), MNT_DETACH);
  }
  bool mounted() const { return mounted_; }
  void Fill() {
    std::ofstream filler(path_ + "/filler", std::ios::app);
    const std::string chunk(64 << 10, 'x');
    while (filler.write(chunk.data(), static_cast<std::streamsize>(chunk.size())).flush()) {
    }
  }

 private:
  const std::string path_;
  bool mounted_ = false;
};

TEST_F(ServerFaults, AFullDiskAtTheStartIsNamed) {
  SmallDisk disk(dir_.path() + "/disk");
  if (!disk.mounted()) GTEST_SKIP() << "may not mount here";
  ControllerProcess controller(dir_.path() + "/disk/s");
  std::filesystem::create_directories(controller.state());
  disk.Fill();
  controller.Launch({"--address-file", dir_.path() + "/address"});
  EXPECT_EQ(controller.Wait(), 5) << controller.output();
}

TEST_F(ServerFaults, ADiskThatFillsUpEndsTheController) {
  SmallDisk disk(dir_.path() + "/disk");
  if (!disk.mounted()) GTEST_SKIP() << "may not mount here";
  ControllerProcess controller(dir_.path() + "/disk/s", dir_.path() + "/disk.out");
  ASSERT_TRUE(controller.Start({"--log-file", "/dev/null"})) << controller.output();
  ASSERT_TRUE(controller.Submit("before", 1, 1).ok());
  disk.Fill();
  grpc::Status refused;
  // The store has laid some room by.
  for (int i = 0; i < 64 && refused.ok(); ++i) {
    refused = controller.Submit("after-" + std::to_string(i), 1, 1, 1, 1u << 20);
  }
  EXPECT_FALSE(refused.ok());
  EXPECT_EQ(controller.Wait(), 7) << controller.output();
  EXPECT_TRUE(Contains(controller.output(), "no space left")) << controller.output();
}

TEST_F(ServerFaults, AFailedWriteEndsTheControllerBeforeAnyAnswer) {
  Serve({"--log-file", "/dev/null"});
  FakeAgent agent("n1");
  agent.Obey();
  ASSERT_TRUE(agent.Connect(controller_.address()));
  ASSERT_TRUE(controller_.Submit("before", 1, 1).ok());
  ASSERT_TRUE(controller_.JobIs("before", "RUNNING"));
  // From here on no file of it may grow: as on a full disk.
  const rlimit none{0, 0};
  ASSERT_EQ(::prlimit(controller_.pid(), RLIMIT_FSIZE, &none, nullptr), 0);
  EXPECT_FALSE(controller_.Submit("after", 1, 1).ok());
  EXPECT_EQ(controller_.Wait(), 7) << controller_.output();
  for (const auto& message : agent.messages()) {
    EXPECT_FALSE(message.has_warm() && message.warm().job() == "after");
  }
  // The store holds what was answered, and nothing else has to be there.
  agent.Hold(agent.WaitActivate(1)->activate());
  ASSERT_TRUE(controller_.Start()) << controller_.output();
  ASSERT_TRUE(agent.Connect(controller_.address()));
  EXPECT_EQ(controller_.Job("before").state(), "RUNNING");
}

TEST_F(ServerFaults, ADamagedStoreIsNotUsed) {
  Serve();
  ASSERT_TRUE(controller_.Submit("train", 1, 1).ok());
  EXPECT_EQ(controller_.Terminate(), 0);
  // A byte in the middle of the newest log.
  std::string newest;
  for (const auto& entry : std::filesystem::directory_iterator(controller_.state() + "/db")) {
    const std::string path = entry.path().string();
    if (path.ends_with(".log") && entry.file_size() > 0) newest = std::max(newest, path);
  }
  ASSERT_FALSE(newest.empty());
  std::fstream file(newest, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(40);
  file.write("\x00\xff\x00\xff", 4);
  file.close();
  controller_.Launch();
  EXPECT_EQ(controller_.Wait(), 6) << controller_.output();
}

TEST_F(ServerFaults, TheCommandLineIsChecked) {
  const std::vector<std::pair<std::vector<std::string>, std::string>> wrong = {
      {{"--no-such-flag"}, "--no-such-flag"},
      {{"--listen", "nowhere"}, "HOST:PORT"},
      {{"--listen", "127.0.0.1:70000"}, "65535"},
      {{"--http", "127.0.0.1"}, "HOST:PORT"},
      {{"--lease-ms", "1"}, "200"},
      {{"--lease-ms", "1000", "--heartbeat-ms", "900"}, "500 ms"},
      {{"--recover-snapshot", "/dev/null/none"}, "no snapshot"}};
  for (const auto& [flags, text] : wrong) {
    controller_.Launch(flags);
    EXPECT_EQ(controller_.Wait(), 2) << text;
    EXPECT_TRUE(Contains(controller_.output(), text)) << controller_.output();
  }
}

TEST_F(ServerFaults, AnAddressThatIsNotLoopbackSaysThatTheChannelIsOpen) {
  Serve({"--listen", "0.0.0.0:0"});
  EXPECT_TRUE(Contains(controller_.output(), "not encrypted")) << controller_.output();
}

// --- its end ---

TEST_F(ServerFaults, SigtermEndsItInOrder) {
  Serve();
  FakeAgent agent("n1");
  ASSERT_TRUE(agent.Connect(controller_.address()));
  EXPECT_EQ(controller_.Terminate(), 0);
  EXPECT_EQ(agent.End().error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_FALSE(std::filesystem::exists(controller_.state() + "/pid"));
}

TEST_F(ServerFaults, ShutdownIsForThoseWhoAllowedIt) {
  Serve();
  const auto shutdown = [&] {
    v1::ShutdownReply reply;
    return controller_.Call([&](auto* c) { return controller_.admin().Shutdown(c, {}, &reply); });
  };
  const grpc::Status refused = shutdown();
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_TRUE(Contains(refused.error_message(), "--allow-shutdown"));
  EXPECT_EQ(controller_.Terminate(), 0);
  Serve({"--allow-shutdown"});
  EXPECT_TRUE(shutdown().ok());
  EXPECT_EQ(controller_.Wait(), 0);
}

// --- a successor ---

TEST_F(ServerFaults, ASuccessorStartsFromASnapshotAndKnowsTheDead) {
  Serve();
  FakeAgent a("n1"), b("n2");
  a.Obey();
  b.Obey();
  ASSERT_TRUE(a.Connect(controller_.address()));
  ASSERT_TRUE(b.Connect(controller_.address()));
  ASSERT_TRUE(controller_.Submit("train", 1, 2).ok());
  ASSERT_TRUE(controller_.JobIs("train", "RUNNING"));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kPatience);
  v1::FollowJobRequest follow;
  follow.set_job("train");
  follow.set_with_snapshot(true);
  auto reader = controller_.admin().FollowJob(&context, follow);
  v1::JobStatus status;
  ASSERT_TRUE(reader->Read(&status));
  ASSERT_FALSE(status.snapshot().empty());
  context.TryCancel();
  reader->Finish();
  const auto survivor = b.WaitActivate(1);
  controller_.Kill();

  const std::string file = dir_.path() + "/snapshot";
  std::ofstream(file, std::ios::binary) << status.snapshot();
  ControllerProcess next(dir_.path() + "/next");
  ASSERT_TRUE(next.Start({"--from-snapshot", file, "--known-dead", "n1"})) << next.output();
  EXPECT_EQ(next.NodeState("n1"), "LOST");
  b.Hold(survivor->activate());
  ASSERT_TRUE(b.Connect(next.address()));
  const auto activate = b.WaitActivate(2);
  ASSERT_TRUE(activate) << next.output();
  EXPECT_EQ(activate->activate().world_size(), 1u);
  EXPECT_TRUE(next.JobIs("train", "RUNNING"));
}

// --- for machines ---

TEST_F(ServerFaults, MetricsAndHealthAreServed) {
  Serve({"--http", "127.0.0.1:0"});
  FakeAgent agent("n1");
  agent.Obey();
  ASSERT_TRUE(agent.Connect(controller_.address()));
  ASSERT_TRUE(controller_.Submit("train", 1, 1).ok());
  ASSERT_TRUE(controller_.JobIs("train", "RUNNING"));
  const std::string page = Http(http(), "GET /metrics HTTP/1.0\r\n\r\n");
  EXPECT_TRUE(Contains(page, "200 OK"));
  EXPECT_TRUE(Contains(page, "text/plain; version=0.0.4"));
  EXPECT_TRUE(Contains(page, "\neverstep_nodes{state=\"alive\"} 1\n")) << page;
  EXPECT_TRUE(Contains(page, "\neverstep_jobs{state=\"RUNNING\"} 1\n")) << page;
  EXPECT_TRUE(Contains(page, "\neverstep_job_generation{job=\"train\"} 1\n")) << page;
  EXPECT_TRUE(Contains(page, "\neverstep_sessions 1\n")) << page;
  EXPECT_TRUE(Contains(page, "\neverstep_store_write_duration_seconds_bucket{le=\"+Inf\"} "))
      << page;
  // Each family that is documented is served once, with its type; and nothing else.
  std::istringstream documented(ReadAll(EVERSTEP_SOURCE_DIR "/docs/reference/metrics.md"));
  std::size_t families = 0;
  for (std::string line; std::getline(documented, line);) {
    if (line.rfind("| `", 0) != 0) continue;
    const std::string name = line.substr(3, line.find('`', 3) - 3);
    const std::size_t type = line.find("| ", line.find('`', 3)) + 2;
    const std::string wanted =
        "\n# TYPE " + name + " " + line.substr(type, line.find(' ', type) - type) + "\n";
    EXPECT_TRUE(Contains(page, wanted)) << wanted;
    ++families;
  }
  std::size_t served = 0;
  for (std::size_t at = page.find("# TYPE "); at != std::string::npos;
       at = page.find("# TYPE ", at + 1))
    ++served;
  EXPECT_EQ(families, served);
  EXPECT_GT(families, 20u);
  EXPECT_TRUE(Contains(Http(http(), "GET /healthz HTTP/1.0\r\n\r\n"), "200 OK"));
  EXPECT_TRUE(Contains(Http(http(), "GET /etc/passwd HTTP/1.0\r\n\r\n"), "404"));
  // A controller that stands still is not healthy.
  ::kill(controller_.pid(), SIGSTOP);
  ::kill(controller_.pid(), SIGCONT);
  EXPECT_TRUE(Contains(Http(http(), "GET /healthz HTTP/1.0\r\n\r\n"), "200 OK"));
}

TEST_F(ServerFaults, TheGrpcHealthServiceAnswers) {
  Serve();
  grpc::GenericStub stub(controller_.channel());
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kPatience);
  grpc::CompletionQueue queue;
  const grpc::ByteBuffer empty;
  grpc::Slice nothing("");
  auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check",
                                    grpc::ByteBuffer(&nothing, 1), &queue);
  call->StartCall();
  grpc::ByteBuffer answer;
  grpc::Status status;
  call->Finish(&answer, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  ASSERT_TRUE(status.ok()) << status.error_message();
  grpc::Slice slice;
  ASSERT_TRUE(answer.DumpToSingleSlice(&slice).ok());
  ASSERT_EQ(slice.size(), 2u);
  EXPECT_EQ(slice.begin()[1], 1);  // SERVING
}

}  // namespace
}  // namespace everstep::test
