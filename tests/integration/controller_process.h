// A real everstep-controller on loopback, for tests: any free port, a state directory of its own,
// short leases. Ends with the test, by pid.
#pragma once

#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "admin.grpc.pb.h"

namespace everstep::test {

inline constexpr std::chrono::seconds kPatience{20};

// A folder that goes with the test.
class TempDir {
 public:
  TempDir() {
    std::string pattern =
        (std::filesystem::temp_directory_path() / "everstep-server-XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline std::string ReadAll(const std::string& path) {
  std::ifstream in(path);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

// Looks again every few milliseconds until it holds; false: not in time.
inline bool Eventually(const std::function<bool()>& holds,
                       std::chrono::milliseconds patience = kPatience) {
  const auto deadline = std::chrono::steady_clock::now() + patience;
  while (!holds()) {
    if (std::chrono::steady_clock::now() >= deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return true;
}

class ControllerProcess {
 public:
  // `output`: where its standard output and error go; beside the state directory when empty.
  explicit ControllerProcess(std::string state, std::string output = "")
      : state_(std::move(state)), output_(output.empty() ? state_ + ".out" : std::move(output)) {}
  ~ControllerProcess() { Kill(); }
  ControllerProcess(const ControllerProcess&) = delete;
  ControllerProcess& operator=(const ControllerProcess&) = delete;

  // Starts the program and waits until it serves. False: it ended or did not come (see output()).
  // The first start takes any port, later ones the same.
  bool Start(std::vector<std::string> more = {}) {
    Launch(std::move(more));
    const bool serves = Eventually([this] {
      address_ = ReadAll(address_file());
      return !address_.empty() || Ended();
    });
    if (!serves || address_.empty()) return false;
    while (!address_.empty() && address_.back() == '\n') address_.pop_back();
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    arguments.SetMaxReceiveMessageSize(64 << 20);
    channel_ = grpc::CreateCustomChannel(address_, grpc::InsecureChannelCredentials(), arguments);
    admin_ = v1::AdminService::NewStub(channel_);
    return true;
  }

  // Starts the program without waiting for it.
  void Launch(std::vector<std::string> more = {}) {
    std::error_code ignored;
    std::filesystem::create_directories(state_, ignored);
    std::filesystem::remove(address_file(), ignored);
    std::vector<std::string> words = {std::string(EVERSTEP_BINARY_DIR) + "/bin/everstep-controller",
                                      "--state-dir",
                                      state_,
                                      "--listen",
                                      address_.empty() ? "127.0.0.1:0" : address_,
                                      "--address-file",
                                      address_file(),
                                      "--lease-ms",
                                      "600",
                                      "--heartbeat-ms",
                                      "50"};
    words.insert(words.end(), more.begin(), more.end());
    std::vector<char*> argv;
    argv.reserve(words.size() + 1);
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    exit_ = -1;
    const pid_t parent = ::getpid();
    pid_ = ::fork();
    if (pid_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (::getppid() != parent) ::_exit(126);
      const int out = ::open(output_file().c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
      ::dup2(out, 1);
      ::dup2(out, 2);
      ::execv(argv[0], argv.data());
      ::_exit(127);
    }
  }

  // True once the process is no more; then exit_code() is its code, or -signal.
  bool Ended() {
    if (pid_ <= 0) return true;
    int status = 0;
    if (::waitpid(pid_, &status, WNOHANG) != pid_) return false;
    exit_ = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    pid_ = -1;
    return true;
  }
  // Waits for the end; -1000: it did not end in time.
  int Wait() {
    return Eventually([this] { return Ended(); }) ? exit_ : -1000;
  }
  void Kill() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }
  int Terminate() {
    ::kill(pid_, SIGTERM);
    return Wait();
  }

  pid_t pid() const { return pid_; }
  const std::string& address() const { return address_; }
  const std::string& state() const { return state_; }
  std::string output() const { return ReadAll(output_file()); }
  v1::AdminService::Stub& admin() { return *admin_; }
  std::shared_ptr<grpc::Channel> channel() const { return channel_; }

  // --- the admin service in a line each; every call has a deadline ---
  v1::ClusterStatus Status() {
    v1::ClusterStatus status;
    Call([&](grpc::ClientContext* c) { return admin_->GetStatus(c, {}, &status); });
    return status;
  }
  v1::JobStatus Job(const std::string& job) {
    v1::GetJobRequest request;
    request.set_job(job);
    v1::JobStatus status;
    Call([&](grpc::ClientContext* c) { return admin_->GetJob(c, request, &status); });
    return status;
  }
  // ALIVE, SUSPECT, ...; empty: there is no such node.
  std::string NodeState(const std::string& name) {
    const v1::ClusterStatus status = Status();
    for (const v1::NodeStatus& node : status.nodes()) {
      if (node.node() == name) return node.state();
    }
    return {};
  }
  bool JobIs(const std::string& job, const std::string& state) {
    return Eventually([&] { return Job(job).state() == state; });
  }
  // padding: bytes of environment that go with it.
  grpc::Status Submit(const std::string& job, std::uint32_t min_nodes, std::uint32_t max_nodes,
                      std::uint32_t workers = 1, std::size_t padding = 0) {
    v1::SubmitJobRequest request;
    v1::JobSpec* spec = request.mutable_spec();
    spec->set_job(job);
    spec->set_min_nodes(min_nodes);
    spec->set_max_nodes(max_nodes);
    spec->set_nproc_per_node(workers);
    spec->set_max_restarts(3);
    spec->set_last_call_ms(10);
    spec->mutable_command()->set_kind(v1::Command::SCRIPT);
    spec->mutable_command()->set_python("/usr/bin/python3");
    spec->mutable_command()->set_target("train.py");
    if (padding > 0)
      (*spec->mutable_command()->mutable_env())["PADDING"] = std::string(padding, 'x');
    v1::SubmitJobReply reply;
    return Call([&](grpc::ClientContext* c) { return admin_->SubmitJob(c, request, &reply); });
  }
  std::vector<v1::Event> Events(std::uint64_t since = 0) {
    v1::WatchEventsRequest request;
    request.set_since_sequence(since);
    std::vector<v1::Event> events;
    Call([&](grpc::ClientContext* c) {
      auto reader = admin_->WatchEvents(c, request);
      v1::Event event;
      while (reader->Read(&event)) events.push_back(event);
      return reader->Finish();
    });
    return events;
  }
  template <typename Body>
  grpc::Status Call(Body body) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + kPatience);
    context.set_wait_for_ready(true);
    return body(&context);
  }

 private:
  std::string address_file() const { return state_ + "/address"; }
  const std::string& output_file() const { return output_; }

  const std::string state_;
  const std::string output_;
  std::string address_;
  pid_t pid_ = -1;
  int exit_ = -1;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::AdminService::Stub> admin_;
};

}  // namespace everstep::test
