// A file system in memory that can be filled, broken and cut off from its power: what was not
// synced is gone then, as a disk may lose it.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/files/disk.h"

namespace everstep::checkpoint {

class MemoryDisk final : public Disk {
 public:
  enum class Fault { kNone, kRefuse, kPowerCut };

  // The n-th operation from now that changes something (0: the next) fails: refused with `text`
  // once, or it and all after it fail until PowerOn.
  void FailAt(int n, Fault fault, std::string text = "No space left on device") {
    at_ = n;
    fault_ = fault;
    text_ = std::move(text);
    count_ = 0;
  }
  int operations() const { return count_; }
  bool dead() const { return dead_; }
  // Only what was synced is there: contents by Sync, names by SyncDirectory.
  void PowerOn() {
    dead_ = false;
    fault_ = Fault::kNone;
    names_ = durable_names_;
    for (auto& [id, file] : files_) file.data = file.durable;
  }
  std::string& Data(const std::string& path) { return files_.at(names_.at(path)).data; }
  bool Has(const std::string& path) const { return names_.contains(path); }

  Outcome MakeDirectory(const std::string& path) override {
    if (auto ok = Operation("making directory", path); !ok.ok()) return ok;
    // As a journalled file system: a directory is there when it was made.
    for (std::size_t at = path.find('/', 1);; at = path.find('/', at + 1)) {
      directories_.insert(path.substr(0, at));
      if (at == std::string::npos) return Done{};
    }
  }
  Result<std::unique_ptr<DiskWriter>> Create(const std::string& path) override {
    if (auto ok = Operation("creating", path); !ok.ok()) return ok.error();
    const int id = next_++;
    files_[id] = {};
    names_[path] = id;
    return std::unique_ptr<DiskWriter>(std::make_unique<Writer>(this, id, path));
  }
  Result<std::unique_ptr<DiskReader>> Open(const std::string& path) override {
    if (dead_) return Error{ErrorCode::kInternal, "reading " + path + ": Input/output error"};
    const auto found = names_.find(path);
    if (found == names_.end()) return Missing(path);
    return std::unique_ptr<DiskReader>(std::make_unique<Reader>(files_.at(found->second).data));
  }
  Outcome Rename(const std::string& from, const std::string& to) override {
    if (auto ok = Operation("renaming to", to); !ok.ok()) return ok;
    const auto found = names_.find(from);
    if (found == names_.end()) return Missing(from);
    names_[to] = found->second;
    names_.erase(from);
    return Done{};
  }
  Outcome Remove(const std::string& path) override {
    if (auto ok = Operation("removing", path); !ok.ok()) return ok;
    return names_.erase(path) + directories_.erase(path) > 0 ? Outcome(Done{}) : Missing(path);
  }
  Outcome SyncDirectory(const std::string& path) override {
    if (auto ok = Operation("syncing", path); !ok.ok()) return ok;
    const auto within = [&path](const auto& entry) {
      return entry.first.starts_with(path + "/") &&
             entry.first.find('/', path.size() + 1) == std::string::npos;
    };
    std::erase_if(durable_names_, within);
    for (const auto& entry : names_) {
      if (within(entry)) durable_names_.insert(entry);
    }
    return Done{};
  }
  Result<std::vector<std::string>> List(const std::string& path) override {
    if (dead_) return Error{ErrorCode::kInternal, "listing " + path + ": Input/output error"};
    if (!directories_.contains(path)) return Missing(path);
    std::set<std::string> out;
    const auto add = [&](const std::string& name) {
      if (name.starts_with(path + "/") && name.find('/', path.size() + 1) == std::string::npos) {
        out.insert(name.substr(path.size() + 1));
      }
    };
    for (const auto& [name, id] : names_) add(name);
    for (const std::string& name : directories_) add(name);
    return std::vector<std::string>(out.begin(), out.end());
  }

 private:
  struct File {
    std::string data, durable;
  };
  class Writer final : public DiskWriter {
   public:
    Writer(MemoryDisk* disk, int id, std::string path)
        : disk_(*disk), id_(id), path_(std::move(path)) {}
    Outcome Write(const void* data, std::uint64_t size) override {
      const std::string_view bytes(static_cast<const char*>(data), size);
      // A write that fails has written its first half.
      auto ok = disk_.Operation("writing", path_);
      disk_.files_[id_].data += ok.ok() ? bytes : bytes.substr(0, size / 2);
      return ok;
    }
    Outcome Sync() override {
      if (auto ok = disk_.Operation("syncing", path_); !ok.ok()) return ok;
      disk_.files_[id_].durable = disk_.files_[id_].data;
      return Done{};
    }

   private:
    MemoryDisk& disk_;
    const int id_;
    const std::string path_;
  };
  class Reader final : public DiskReader {
   public:
    explicit Reader(const std::string& data) : data_(data) {}
    std::uint64_t bytes() const override { return data_.size(); }
    Outcome Read(std::uint64_t offset, void* to, std::uint64_t size) override {
      if (offset > data_.size() || size > data_.size() - offset) {
        return Error{ErrorCode::kCorrupt, "it ends too soon"};
      }
      std::copy_n(data_.data() + offset, size, static_cast<char*>(to));
      return Done{};
    }

   private:
    const std::string data_;
  };

  static Error Missing(const std::string& path) {
    return {ErrorCode::kNotFound, path + ": No such file or directory"};
  }
  Outcome Operation(const char* what, const std::string& path) {
    const bool hit = fault_ != Fault::kNone && count_ == at_;
    ++count_;
    if (hit && fault_ == Fault::kPowerCut) dead_ = true;
    if (dead_ || hit)
      return Error{ErrorCode::kInternal, fmt::format("{} {}: {}", what, path, text_)};
    return Done{};
  }

  std::map<int, File> files_;
  std::map<std::string, int> names_, durable_names_;
  std::set<std::string> directories_;
  int next_ = 1, at_ = 0, count_ = 0;
  Fault fault_ = Fault::kNone;
  bool dead_ = false;
  std::string text_;
};

}  // namespace everstep::checkpoint
