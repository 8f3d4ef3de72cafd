#include "worker/agent/node_dir.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <netdb.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <system_error>

#include "proto/base/file_lock.h"
#include "proto/base/process_stat.h"
#include "proto/base/whole_file.h"
#include "worker/agent/dial_backoff.h"

namespace everstep::agent {
namespace {

constexpr std::size_t kMaxAddressFile = 64u << 10;

std::string ReadFile(const std::string& path, std::size_t limit) {
  std::ifstream file(path, std::ios::binary);
  std::string text(limit, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<std::size_t>(file.gcount()));
  return text;
}

}  // namespace

NodeDirLock::~NodeDirLock() {
  if (fd_ < 0) return;
  unlink(path_.c_str());
  close(fd_);
}

bool NodeDirLock::Take(const std::string& node_dir, std::string* error) {
  std::error_code ec;
  std::filesystem::create_directories(node_dir, ec);
  if (ec) {
    *error = fmt::format("cannot make the node's directory {}: {}; choose another --state-dir",
                         node_dir, ec.message());
    return false;
  }
  path_ = node_dir + "/agent.pid";
  for (int attempt = 0; attempt < 16; ++attempt) {
    const int fd = open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0) {
      *error = fmt::format("cannot write {}: {}; choose another --state-dir", path_,
                           std::generic_category().message(errno));
      return false;
    }
    if (!LockFile(fd, kLockPatience)) {
      const std::string pid = ReadFile(path_, 32);
      *error = fmt::format(
          "another agent (pid {}) runs this node in {}; end it, or choose another "
          "--node or --state-dir",
          pid.substr(0, pid.find('\n')), node_dir);
      close(fd);
      return false;
    }
    // The one before may have unlinked the file between our open and our lock.
    struct stat ours = {}, there = {};
    if (fstat(fd, &ours) != 0 || stat(path_.c_str(), &there) != 0 || ours.st_ino != there.st_ino) {
      close(fd);
      continue;
    }
    const std::string pid = fmt::format("{}\n", getpid());
    if (ftruncate(fd, 0) != 0 ||
        write(fd, pid.data(), pid.size()) != static_cast<ssize_t>(pid.size())) {
      *error = fmt::format("cannot write {}: {}; free the disk or choose another --state-dir",
                           path_, std::generic_category().message(errno));
      close(fd);
      return false;
    }
    fd_ = fd;
    return true;
  }
  *error =
      fmt::format("{} is made and removed by others all the time; choose another --node", path_);
  return false;
}

std::vector<std::string> ReadControllers(const std::string& node_dir) {
  std::vector<std::string> bad;
  return ParseAddresses(ReadFile(node_dir + "/controller", kMaxAddressFile), &bad);
}

bool WriteControllers(const std::string& node_dir, const std::vector<std::string>& addresses,
                      std::string* error) {
  const std::string path = node_dir + "/controller";
  const int wrong = WriteWhole(path, fmt::format("{}\n", fmt::join(addresses, "\n")));
  if (wrong == 0) return true;
  *error = CannotWrite(path, wrong) + "; free the disk or choose another --state-dir";
  return false;
}

void WriteKeeperPid(const std::string& node_dir, std::int32_t pid) {
  const std::string path = node_dir + "/keeper.pid";
  if (pid <= 0) {
    unlink(path.c_str());
    return;
  }
  // For people and drills: what cannot be written is found out by them.
  WriteWhole(path, fmt::format("{}\n", pid));
}

std::uint16_t ReadDataPort(const std::string& node_dir) {
  const std::string text = ReadFile(node_dir + "/data.port", 16);
  unsigned port = 0;
  std::from_chars(text.data(), text.data() + text.size(), port);
  return port < 65536 ? static_cast<std::uint16_t>(port) : std::uint16_t{0};
}

void WriteDataPort(const std::string& node_dir, std::uint16_t port) {
  // What cannot be written: a successor takes any port then.
  WriteWhole(node_dir + "/data.port", fmt::format("{}\n", port));
}

std::string BootId() {
  std::string id = ReadFile("/proc/sys/kernel/random/boot_id", 64);
  while (!id.empty() && id.back() == '\n') id.pop_back();
  return id;
}

std::uint64_t PidNamespace() {
  struct stat st = {};
  return stat("/proc/self/ns/pid", &st) == 0 ? st.st_ino : 0;
}

char ProcessState(std::int32_t pid) {
  const auto stat = ReadProcessStat(pid);
  return stat ? stat->state : '\0';
}

std::uint64_t ProcessStartTime(std::int32_t pid) {
  const auto stat = ReadProcessStat(pid);
  return stat && !stat->dead() ? stat->start_time : 0;
}

std::string LocalAddressTowards(const std::string& controller) {
  const auto colon = controller.rfind(':');
  std::string host = controller.substr(0, colon);
  if (host.size() > 2 && host.front() == '[') host = host.substr(1, host.size() - 2);
  const std::string port = colon == std::string::npos ? "1" : controller.substr(colon + 1);
  addrinfo hints = {};
  hints.ai_socktype = SOCK_DGRAM;  // connect() of it sends nothing
  addrinfo* found = nullptr;
  std::string out = "127.0.0.1";
  if (getaddrinfo(host.c_str(), port.c_str(), &hints, &found) != 0) return out;
  for (const addrinfo* a = found; a != nullptr; a = a->ai_next) {
    const int fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, 0);
    if (fd < 0) continue;
    sockaddr_storage local = {};
    socklen_t size = sizeof local;
    char text[NI_MAXHOST];
    const bool done = connect(fd, a->ai_addr, a->ai_addrlen) == 0 &&
                      getsockname(fd, reinterpret_cast<sockaddr*>(&local), &size) == 0 &&
                      getnameinfo(reinterpret_cast<sockaddr*>(&local), size, text, sizeof text,
                                  nullptr, 0, NI_NUMERICHOST) == 0;
    close(fd);
    if (done) {
      out = text;
      break;
    }
  }
  freeaddrinfo(found);
  return out;
}

std::uint32_t FreePort(const std::string& address) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(address.c_str(), "0", &hints, &found) != 0) return 0;
  const int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_storage local = {};
  socklen_t size = sizeof local;
  const bool done = fd >= 0 && bind(fd, found->ai_addr, found->ai_addrlen) == 0 &&
                    getsockname(fd, reinterpret_cast<sockaddr*>(&local), &size) == 0;
  if (fd >= 0) close(fd);
  freeaddrinfo(found);
  if (!done) return 0;
  // sin_port and sin6_port lie at the same place.
  return ntohs(reinterpret_cast<const sockaddr_in*>(&local)->sin_port);
}

}  // namespace everstep::agent
