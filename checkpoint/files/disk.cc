#include "checkpoint/files/disk.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <system_error>

namespace everstep::checkpoint {
namespace {

namespace fs = std::filesystem;

Error Refused(const std::string& what, const std::string& path, int number) {
  return Error{number == ENOENT ? ErrorCode::kNotFound : ErrorCode::kInternal,
               fmt::format("{} {}: {}", what, path, ErrnoText(number))};
}

class PosixWriter final : public DiskWriter {
 public:
  PosixWriter(std::string path, int fd) : path_(std::move(path)), fd_(fd) {}
  ~PosixWriter() override { close(fd_); }
  Outcome Write(const void* data, std::uint64_t size) override {
    const auto* at = static_cast<const char*>(data);
    while (size > 0) {
      const ssize_t n = write(fd_, at, std::min<std::uint64_t>(size, 1 << 26));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return Refused("writing", path_, n == 0 ? ENOSPC : errno);
      at += n;
      size -= static_cast<std::uint64_t>(n);
    }
    return Done{};
  }
  Outcome Sync() override {
    if (fsync(fd_) != 0) return Refused("syncing", path_, errno);
    return Done{};
  }

 private:
  const std::string path_;
  const int fd_;
};

class PosixReader final : public DiskReader {
 public:
  PosixReader(std::string path, int fd, std::uint64_t bytes)
      : path_(std::move(path)), fd_(fd), bytes_(bytes) {}
  ~PosixReader() override { close(fd_); }
  std::uint64_t bytes() const override { return bytes_; }
  Outcome Read(std::uint64_t offset, void* to, std::uint64_t size) override {
    auto* at = static_cast<char*>(to);
    while (size > 0) {
      const ssize_t n =
          pread(fd_, at, std::min<std::uint64_t>(size, 1 << 26), static_cast<off_t>(offset));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return Refused("reading", path_, errno);
      if (n == 0) {
        return Error{
            ErrorCode::kCorrupt,
            fmt::format("reading {}: it ends at {}, {} bytes too soon", path_, offset, size)};
      }
      at += n;
      offset += static_cast<std::uint64_t>(n);
      size -= static_cast<std::uint64_t>(n);
    }
    return Done{};
  }

 private:
  const std::string path_;
  const int fd_;
  const std::uint64_t bytes_;
};

class Posix final : public Disk {
 public:
  Outcome MakeDirectory(const std::string& path) override {
    std::error_code error;
    fs::create_directories(path, error);
    if (error) return Refused("making directory", path, error.value());
    return Done{};
  }
  Result<std::unique_ptr<DiskWriter>> Create(const std::string& path) override {
    const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) return Refused("creating", path, errno);
    return std::unique_ptr<DiskWriter>(std::make_unique<PosixWriter>(path, fd));
  }
  Result<std::unique_ptr<DiskReader>> Open(const std::string& path) override {
    // A fifo or a device in the folder must not stop its reader.
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return Refused("opening", path, errno);
    struct stat facts {};
    if (fstat(fd, &facts) != 0 || !S_ISREG(facts.st_mode)) {
      close(fd);
      return Error{ErrorCode::kInvalid, fmt::format("opening {}: it is no plain file", path)};
    }
    return std::unique_ptr<DiskReader>(
        std::make_unique<PosixReader>(path, fd, static_cast<std::uint64_t>(facts.st_size)));
  }
  Outcome Rename(const std::string& from, const std::string& to) override {
    if (rename(from.c_str(), to.c_str()) != 0) return Refused("renaming to", to, errno);
    return Done{};
  }
  Outcome Remove(const std::string& path) override {
    if (remove(path.c_str()) != 0) return Refused("removing", path, errno);
    return Done{};
  }
  Outcome SyncDirectory(const std::string& path) override {
    const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return Refused("opening", path, errno);
    const int failed = fsync(fd) == 0 ? 0 : errno;
    close(fd);
    // Some network file systems have no such call; they keep names in order by themselves.
    if (failed != 0 && failed != EINVAL && failed != ENOTSUP) {
      return Refused("syncing", path, failed);
    }
    return Done{};
  }
  Result<std::vector<std::string>> List(const std::string& path) override {
    std::error_code error;
    fs::directory_iterator it(path, error);
    if (error) return Refused("listing", path, error.value());
    std::vector<std::string> names;
    for (const fs::directory_iterator end; it != end;) {
      names.push_back(it->path().filename().string());
      it.increment(error);
      if (error) return Refused("listing", path, error.value());
    }
    std::sort(names.begin(), names.end());
    return names;
  }
};

}  // namespace

Disk* PosixDisk() {
  static Posix disk;
  return &disk;
}

}  // namespace everstep::checkpoint
