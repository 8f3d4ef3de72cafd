#include "proto/base/whole_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>

#include <fmt/format.h>

#include "proto/base/errno_text.h"

namespace everstep {
namespace {

int WriteAll(int fd, std::string_view content) {
  while (!content.empty()) {
    const ssize_t n = ::write(fd, content.data(), content.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n < 0 ? errno : ENOSPC;
    content.remove_prefix(static_cast<std::size_t>(n));
  }
  return 0;
}

int SyncDirectoryOf(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  const std::string directory = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  const int fd = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return errno;
  const int error = ::fsync(fd) == 0 ? 0 : errno;
  ::close(fd);
  return error;
}

}  // namespace

int WriteWhole(const std::string& path, std::string_view content, Durable durable) {
  const std::string beside = fmt::format("{}.{}.new", path, ::getpid());
  const int fd = ::open(beside.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return errno;
  int error = WriteAll(fd, content);
  if (error == 0 && durable == Durable::kYes && ::fsync(fd) != 0) error = errno;
  // Some file systems find out here that the disk is full.
  if (::close(fd) != 0 && error == 0) error = errno;
  if (error == 0 && ::rename(beside.c_str(), path.c_str()) != 0) error = errno;
  if (error != 0) {
    ::unlink(beside.c_str());
    return error;
  }
  return durable == Durable::kYes ? SyncDirectoryOf(path) : 0;
}

std::string CannotWrite(const std::string& path, int error) {
  return fmt::format("cannot write {}: {}", path, ErrnoText(error));
}

}  // namespace everstep
