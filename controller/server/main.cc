// everstep-controller: opens the store, serves gRPC (and HTTP), runs the brain until told to end.
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <utility>

#include <fmt/format.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>

#include "controller/server/admin_service.h"
#include "controller/server/agent_service.h"
#include "controller/server/brain.h"
#include "controller/server/options.h"
#include "controller/store/rocks_store.h"
#include "proto/base/log.h"
#include "proto/base/version.h"

namespace everstep::controller {
namespace {

constexpr int kMaxMessageBytes = 16 << 20;
constexpr std::size_t kMaxThreads = 8;

void Say(const std::string& text) { std::fprintf(stderr, "%s\n", text.c_str()); }

// Written beside and renamed: a reader never sees half of it. Empty: done.
std::string WriteAtomically(const std::string& path, const std::string& text) {
  const std::string beside = path + ".tmp";
  {
    std::ofstream out(beside, std::ios::trunc);
    out << text;
    out.flush();
    if (!out) return fmt::format("cannot write {}: {}", beside, std::strerror(errno));
  }
  if (std::rename(beside.c_str(), path.c_str()) != 0) {
    return fmt::format("cannot rename {} to {}: {}", beside, path, std::strerror(errno));
  }
  return {};
}

int ExitOf(StoreCode code) {
  switch (code) {
    case StoreCode::kOk: return kExitOk;
    case StoreCode::kLocked: return kExitLocked;
    case StoreCode::kCorrupt:
    case StoreCode::kTooNew: return kExitDamaged;
    case StoreCode::kNoSpace:
    case StoreCode::kUnavailable: return kExitStateDir;
  }
  return kExitOther;
}

bool ReadSnapshot(const std::string& path, v1::StoreSnapshot* out) {
  std::ifstream in(path, std::ios::binary);
  return in && out->ParseFromIstream(&in);
}

int Serve(const ServerOptions& options) {
  std::error_code error;
  std::filesystem::create_directories(options.state_dir, error);
  if (error || access(options.state_dir.c_str(), W_OK) != 0) {
    Say(fmt::format("error: cannot write the state directory {}: {}\n  hint: give another --state-dir, or make this "
                    "one writable for uid {}",
                    options.state_dir, error ? error.message() : std::strerror(errno), getuid()));
    return kExitStateDir;
  }
  LogInit({.process = "controller", .file = options.log_file, .json = options.log_json});

  StoreStatus status;
  std::unique_ptr<RocksStore> store = RocksStore::Open(
      {.directory = options.state_dir + "/db", .cluster = options.cluster, .product_version = kVersion}, &status);
  if (!status.ok()) {
    LogError("store_unusable", {{"code", StoreCodeName(status.code)}, {"message", status.message}});
    Say("error: " + status.message);
    return ExitOf(status.code);
  }
  v1::StoreSnapshot snapshot;
  if (!options.snapshot.empty() && !ReadSnapshot(options.snapshot, &snapshot)) {
    Say(fmt::format("error: {} holds no snapshot of a controller\n  hint: leave --from-snapshot away to start from "
                    "the store alone",
                    options.snapshot));
    return kExitUsage;
  }

  // Signals come to one thread, which stops the brain.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);

  const RealClock clock;
  Brain::Config config;
  config.core.lease = Milliseconds(options.lease_ms);
  config.core.heartbeat_interval = Milliseconds(options.heartbeat_ms);
  config.core.max_nodes = options.max_nodes;
  Brain brain(config, std::move(store), &clock);
  status = brain.Recover(options.snapshot.empty() ? nullptr : &snapshot, options.known_dead);
  if (!status.ok()) {
    Say("error: " + status.message);
    return ExitOf(status.code);
  }

  LogRelay relay;
  AgentService agents(&brain, &relay, options.max_nodes);
  AdminService admin(&brain, &relay,
                     {.started = FormatTimestamp(clock.Now()),
                      .started_at = clock.Now(),
                      .shutdown = options.allow_shutdown ? [&brain] { brain.Stop(); } : std::function<void()>()});
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ResourceQuota quota("controller");
  quota.SetMaxThreads(kMaxThreads);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(options.listen, grpc::InsecureServerCredentials(), &port);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // a port in use is an error, not a share
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.SetMaxSendMessageSize(64 << 20);
  builder.SetResourceQuota(quota);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 1000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.RegisterService(&agents);
  builder.RegisterService(&admin);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr || port == 0) {
    Say(fmt::format("error: cannot listen on {}: the port is in use, or the address is not this machine's\n  hint: "
                    "ss -ltnp shows who has it; port 0 takes any free one",
                    options.listen));
    return kExitAddress;
  }
  const std::string address =
      fmt::format("{}:{}", options.listen.substr(0, options.listen.rfind(':')), port);
  std::string wrong = WriteAtomically(options.state_dir + "/pid", fmt::format("{}\n", getpid()));
  if (wrong.empty() && !options.address_file.empty()) wrong = WriteAtomically(options.address_file, address + "\n");
  if (!wrong.empty()) {
    Say("error: " + wrong);
    return kExitStateDir;
  }
  if (!IsLoopback(options.listen)) {
    Say(fmt::format("warning: {} is not loopback, and the channel is not encrypted: use it in a network you trust",
                    address));
  }
  LogInfo("serving", {{"address", address}, {"state_dir", options.state_dir}, {"version", kVersion}, {"pid", getpid()}});

  std::thread([&brain, signals] {
    int signal = 0;
    sigwait(&signals, &signal);
    LogInfo("stopping", {{"signal", signal}});
    brain.Stop();
  }).detach();

  status = brain.Run();
  // Streams get their last words; requests that nobody answers any more would keep Shutdown waiting, so the
  // process ends without it.
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  if (!status.ok()) {
    Say(fmt::format("error: {}\n  what was decided but not written has not been carried out; jobs go on, and a "
                    "controller started again continues from the last durable state",
                    status.message));
    _exit(kExitStoreFailed);
  }
  LogInfo("stopped", {});
  std::fflush(nullptr);
  _exit(kExitOk);
}

}  // namespace
}  // namespace everstep::controller

int main(int argc, char** argv) {
  setenv("GRPC_VERBOSITY", "NONE", 0);  // its errors reach people through ours
  everstep::controller::ServerOptions options;
  const int code = everstep::controller::ParseOptions(argc, argv, &options);
  return code >= 0 ? code : everstep::controller::Serve(options);
}
