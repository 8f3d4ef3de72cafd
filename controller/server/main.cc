// everstep-controller: opens the store, serves gRPC (and HTTP), runs the brain until told to end.
#include <malloc.h>
#include <netdb.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include <fmt/format.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>

#include "controller/server/admin_service.h"
#include "controller/server/agent_service.h"
#include "controller/server/brain.h"
#include "controller/server/http.h"
#include "controller/server/memory.h"
#include "controller/server/options.h"
#include "controller/store/rocks_store.h"
#include "proto/base/endpoint.h"
#include "proto/base/errno_text.h"
#include "proto/base/file_lock.h"
#include "proto/base/log.h"
#include "proto/base/version.h"
#include "proto/base/whole_file.h"

namespace everstep::controller {
namespace {

constexpr std::uint64_t kLeastRoomBytes = 8u << 20;
constexpr std::uint64_t kReserveBytes = 4u << 20;  // below it the store is not written any more
constexpr int kMaxReceiveBytes = 16 << 20;
constexpr int kMaxSendBytes = 64 << 20;
constexpr std::chrono::seconds kScrapeWithin{2};
constexpr Duration kHealthySilence = Seconds(5);
constexpr std::chrono::milliseconds kLastWords{300};

void Say(const std::string& text) {
  std::fprintf(stderr, "%s\n", text.c_str());
}

// Waits for a controller that was killed a moment ago to give up the store's lock.
std::unique_ptr<RocksStore> OpenStore(const ServerOptions& options, StoreStatus* status) {
  const auto deadline = std::chrono::steady_clock::now() + kLockPatience;
  while (true) {
    std::unique_ptr<RocksStore> store = RocksStore::Open({.directory = options.state_dir + "/db",
                                                          .cluster = options.cluster,
                                                          .product_version = kVersion},
                                                         status);
    if (status->code != StoreCode::kLocked || std::chrono::steady_clock::now() >= deadline) {
      return store;
    }
    std::this_thread::sleep_for(Milliseconds(50));
  }
}

// Made, writable, and with room: RocksDB ends the process when its first files do not fit. Empty:
// fine.
std::string CheckStateDir(const std::string& dir) {
  std::error_code error;
  std::filesystem::create_directories(dir, error);
  if (error) return error.message();
  if (access(dir.c_str(), R_OK | W_OK | X_OK) != 0) return ErrnoText(errno);
  struct statvfs disk {};
  if (statvfs(dir.c_str(), &disk) == 0) {
    const std::uint64_t room = static_cast<std::uint64_t>(disk.f_bavail) * disk.f_frsize;
    if (room < kLeastRoomBytes) return fmt::format("{} bytes are free on its disk", room);
  }
  // What access() cannot know: quotas, read-only mounts under root, a disk that does not answer.
  const std::string probe = dir + "/probe";
  const int wrong = WriteWhole(probe, std::string(64 << 10, '\0'));
  std::filesystem::remove(probe, error);
  return wrong == 0 ? std::string() : CannotWrite(probe, wrong);
}

StoreStatus CheckRoom(const std::string& dir) {
  struct statvfs disk {};
  if (statvfs(dir.c_str(), &disk) != 0) return {};  // the write itself will tell
  const std::uint64_t room = static_cast<std::uint64_t>(disk.f_bavail) * disk.f_frsize;
  if (room >= kReserveBytes) return {};
  return {StoreCode::kNoSpace,
          fmt::format("no space left for the store in {}: {} bytes are free on its disk, at least "
                      "{} are needed; free "
                      "some or move the state directory, then start the controller again",
                      dir, room, kReserveBytes)};
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

// Why an address cannot be bound, in the system's words; gRPC does not tell.
std::string BindTrouble(const std::string& address) {
  std::string host;
  int port = 0;
  SplitAddress(address, &host, &port);
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  if (const int wrong = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
      wrong != 0) {
    return gai_strerror(wrong);
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, freeaddrinfo);
  const int probe = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int yes = 1;
  setsockopt(probe, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  const bool bound = bind(probe, found->ai_addr, found->ai_addrlen) == 0 && listen(probe, 1) == 0;
  const int error = errno;
  if (probe >= 0) close(probe);
  return bound ? "it was taken for a moment" : ErrnoText(error);
}

// One stream, one descriptor, one more for its keeper: thousands of nodes need more than the usual
// 1,024.
void RaiseDescriptorLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

// The page of /metrics, made on the brain's thread.
bool Scrape(Brain* brain, Timestamp started, std::string* page) {
  struct Answer {
    std::mutex mutex;
    std::condition_variable came;
    std::string text;
  };
  auto answer = std::make_shared<Answer>();
  const bool posted = brain->Post([brain, started, answer] {
    brain->counters().log_bytes_relayed = brain->relay().bytes();
    std::string text = MetricsText(brain->state(), brain->counters(),
                                   {.cluster = brain->store_info().cluster,
                                    .version = kVersion,
                                    .started = started,
                                    .store_starts = brain->store_info().starts,
                                    .mailbox_depth = brain->mailbox_depth(),
                                    .sessions = brain->sessions(),
                                    .watchers = brain->watchers()},
                                   brain->now());
    std::lock_guard<std::mutex> lock(answer->mutex);
    answer->text = std::move(text);
    answer->came.notify_one();
  });
  if (!posted) return false;
  std::unique_lock<std::mutex> lock(answer->mutex);
  if (!answer->came.wait_for(lock, kScrapeWithin, [&] { return !answer->text.empty(); }))
    return false;
  *page = std::move(answer->text);
  return true;
}

std::string Trouble(const Brain& brain) {
  if (brain.stopping()) return "the controller ends";
  const Duration silence = brain.silence();
  if (silence < kHealthySilence) return {};
  return fmt::format(
      "the controller's thread has not come round for {:.1f} s (limit {:.0f} s): is the disk of "
      "its "
      "state directory stuck?",
      ToSeconds(silence), ToSeconds(kHealthySilence));
}

std::unique_ptr<grpc::Server> BuildServer(const ServerOptions& options, AgentService* agents,
                                          AdminService* admin, int* port) {
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  builder.AddListeningPort(options.listen, grpc::InsecureServerCredentials(), port);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT,
                             0);  // a port in use is an error, not a share
  builder.SetMaxReceiveMessageSize(kMaxReceiveBytes);
  builder.SetMaxSendMessageSize(kMaxSendBytes);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, 128);  // of one connection
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 1000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  // Connections of machines that vanished; the lease has found the loss long before.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 60'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20'000);
  // What nobody here uses costs 2 KiB for each agent.
  builder.AddChannelArgument("grpc.per_message_compression", 0);
  builder.AddChannelArgument("grpc.per_message_decompression", 0);
  builder.AddChannelArgument(GRPC_ARG_ENABLE_CHANNELZ, 0);
  builder.AddChannelArgument(GRPC_ARG_MAX_CHANNEL_TRACE_EVENT_MEMORY_PER_NODE, 0);
  builder.RegisterService(agents);
  builder.RegisterService(admin);
  return builder.BuildAndStart();
}

// Serves until the brain ends. The exit code.
int Serve(const ServerOptions& options, Brain* brain, const Clock& clock) {
  const Timestamp started = clock.Now();
  AgentService agents(brain, options.max_nodes + 256u);
  AdminService admin(brain, {.started = FormatTimestamp(started),
                             .started_at = started,
                             .shutdown = options.allow_shutdown ? [brain] { brain->Stop(); }
                                                                : std::function<void()>()});
  int port = 0;
  const std::unique_ptr<grpc::Server> server = BuildServer(options, &agents, &admin, &port);
  if (server == nullptr || port == 0) {
    Say(
        fmt::format("error: cannot listen on {}: {}\n  hint: ss -ltnp shows who has a port; port 0 "
                    "takes any free one",
                    options.listen, BindTrouble(options.listen)));
    return kExitAddress;
  }
  const std::string address =
      fmt::format("{}:{}", options.listen.substr(0, options.listen.rfind(':')), port);
  std::unique_ptr<HttpServer> http;
  if (!options.http.empty()) {
    std::string wrong;
    http = HttpServer::Start(
        options.http,
        {.metrics = [=](std::string* page) { return Scrape(brain, started, page); },
         .trouble = [=] { return Trouble(*brain); }},
        &wrong);
    if (http == nullptr) {
      Say("error: " + wrong);
      return kExitAddress;
    }
  }
  std::string wrong;
  const auto write = [&wrong](const std::string& path, const std::string& text) {
    if (!wrong.empty()) return;
    if (const int error = WriteWhole(path, text); error != 0) wrong = CannotWrite(path, error);
  };
  write(options.state_dir + "/pid", fmt::format("{}\n", getpid()));
  if (http) write(options.state_dir + "/http.address", http->address() + "\n");
  if (!options.address_file.empty()) write(options.address_file, address + "\n");
  if (!wrong.empty()) {
    Say("error: " + wrong + "\n  hint: give another --state-dir or --address-file, or make room");
    return kExitStateDir;
  }
  for (const std::string& open : {address, http ? http->address() : std::string("127.0.0.1:0")}) {
    if (IsLoopback(open)) continue;
    Say(
        fmt::format("warning: {} is not loopback, and the channel is not encrypted yet: use it in "
                    "a network you trust",
                    open));
    LogWarning("not_encrypted", {{"address", open}});
  }
  LogInfo("serving", {{"address", address},
                      {"http", http ? http->address() : "-"},
                      {"state_dir", options.state_dir},
                      {"version", kVersion},
                      {"pid", getpid()}});
  GiveBackMemory();  // most of what start-up touched is not wanted again
  const StoreStatus status = brain->Run();
  if (!status.ok()) {
    // Nothing of the failed batch may get out by any way: no orderly end.
    Say(
        fmt::format("error: {}\n  what was decided but not written has not been carried out; jobs "
                    "run on, and a "
                    "controller started again continues from the last durable state",
                    status.message));
    std::fflush(nullptr);
    _exit(kExitStoreFailed);
  }
  http.reset();
  server->Shutdown(std::chrono::system_clock::now() + kLastWords);
  std::remove((options.state_dir + "/pid").c_str());
  LogInfo("stopped", {});
  return kExitOk;
}

int Start(const ServerOptions& options) {
  // Before any thread: a process of many threads otherwise keeps one heap for each; signals come to
  // one.
  mallopt(M_ARENA_MAX, 2);  // NOLINT(concurrency-mt-unsafe): no thread yet
  sigset_t signals;
  sigemptyset(&signals);
  for (const int s : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&signals, s);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN);  // a file size limit is an error of a write
  RaiseDescriptorLimit();

  if (const std::string wrong = CheckStateDir(options.state_dir); !wrong.empty()) {
    Say(
        fmt::format("error: cannot use the state directory {}: {}\n  hint: give another "
                    "--state-dir, or make this one "
                    "writable for uid {} with {} MiB of room",
                    options.state_dir, wrong, getuid(), kLeastRoomBytes >> 20));
    return kExitStateDir;
  }
  LogInit({.process = "controller", .file = options.log_file, .json = options.log_json});
  StoreStatus status;
  std::unique_ptr<RocksStore> store = OpenStore(options, &status);
  if (!status.ok()) {
    LogError("store_unusable", {{"code", StoreCodeName(status.code)}, {"message", status.message}});
    Say("error: " + status.message);
    return ExitOf(status.code);
  }
  v1::StoreSnapshot snapshot;
  if (!options.snapshot.empty() && !ReadSnapshot(options.snapshot, &snapshot)) {
    Say(
        fmt::format("error: {} holds no snapshot of a controller\n  hint: leave --recover-snapshot "
                    "away to start from "
                    "the store alone",
                    options.snapshot));
    return kExitUsage;
  }
  const RealClock clock;
  Brain::Config config;
  config.core.lease = Milliseconds(options.lease_ms);
  config.core.heartbeat_interval = Milliseconds(options.heartbeat_ms);
  config.core.max_nodes = options.max_nodes;
  config.core.failed_retention = Seconds(options.keep_failed_s);
  config.room = [dir = options.state_dir] { return CheckRoom(dir); };
  Brain brain(config, std::move(store), &clock);
  status = brain.Recover(options.snapshot.empty() ? nullptr : &snapshot, options.known_dead);
  if (!status.ok()) {
    Say("error: " + status.message);
    return ExitOf(status.code);
  }
  std::thread([&brain, signals] {
    int signal = 0;
    sigwait(&signals, &signal);
    LogInfo("stopping", {{"signal", signal}});
    brain.Stop();
  }).detach();
  const int code = Serve(options, &brain, clock);
  std::fflush(nullptr);
  _exit(code);  // one thread still waits for signals
}

}  // namespace
}  // namespace everstep::controller

int main(int argc, char** argv) {
  // Its errors reach people through ours. NOLINTNEXTLINE(concurrency-mt-unsafe): no thread yet
  setenv("GRPC_VERBOSITY", "NONE", 0);
  everstep::controller::ServerOptions options;
  const int code = everstep::controller::ParseOptions(argc, argv, &options);
  return code >= 0 ? code : everstep::controller::Start(options);
}
