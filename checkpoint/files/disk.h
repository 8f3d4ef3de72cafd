// The one seam between the file tier and a file system, so that tests can fill it, break it and cut
// its power. Paths are absolute. Errors name the path and what the system said (kNotFound for a
// missing file, kInternal for the rest); nothing here is tried again.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/store/result.h"

namespace everstep::checkpoint {

class DiskWriter {  // closes when it goes; what was not synced may be lost
 public:
  virtual ~DiskWriter() = default;
  virtual Outcome Write(const void* data, std::uint64_t size) = 0;  // appends
  virtual Outcome Sync() = 0;  // what was written is on the medium, or an error
};

class DiskReader {
 public:
  virtual ~DiskReader() = default;
  virtual std::uint64_t bytes() const = 0;  // when it was opened
  // Exactly `size` bytes at `offset`; fewer is an error ("it ends at ...").
  virtual Outcome Read(std::uint64_t offset, void* to, std::uint64_t size) = 0;
};

class Disk {
 public:
  virtual ~Disk() = default;
  virtual Outcome MakeDirectory(const std::string& path) = 0;  // with parents; there already: fine
  virtual Result<std::unique_ptr<DiskWriter>> Create(const std::string& path) = 0;  // anew, empty
  virtual Result<std::unique_ptr<DiskReader>> Open(const std::string& path) = 0;
  virtual Outcome Rename(const std::string& from, const std::string& to) = 0;  // replaces
  virtual Outcome Remove(const std::string& path) = 0;  // a file or an empty directory
  virtual Outcome SyncDirectory(const std::string& path) = 0;
  virtual Result<std::vector<std::string>> List(const std::string& path) = 0;  // names, sorted
};

// The process's own file system. Thread-safe; lives for ever.
Disk* PosixDisk();

}  // namespace everstep::checkpoint
