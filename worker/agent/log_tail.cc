#include "worker/agent/log_tail.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <utility>

namespace everstep::agent {
namespace {

constexpr auto kPoll = std::chrono::milliseconds(100);

// Where the last `lines` lines of the file begin, looking back at most `limit` bytes.
off_t TailOffset(int fd, off_t size, std::int64_t lines, off_t limit) {
  if (lines < 0) return 0;
  if (lines == 0) return size;
  char block[4096];
  off_t at = size;
  std::int64_t found = 0;
  const off_t floor = std::max<off_t>(0, size - limit);
  while (at > floor) {
    const off_t from = std::max<off_t>(floor, at - static_cast<off_t>(sizeof block));
    const ssize_t n = pread(fd, block, static_cast<std::size_t>(at - from), from);
    if (n <= 0) return at;
    for (off_t i = n - 1; i >= 0; --i) {
      if (block[i] != '\n' || from + i + 1 == size) continue;  // the file's own last newline
      if (++found == lines) return from + i + 1;
    }
    at = from;
  }
  return floor;
}

}  // namespace

struct LogTailer::Open {
  TailFile file;
  std::int64_t lines = -1;
  int fd = -1;
  off_t offset = 0;
  bool done = false;  // not followed, and read to its end

  explicit Open(TailFile f, std::int64_t n) : file(std::move(f)), lines(n) {}
  Open(const Open&) = delete;
  Open& operator=(const Open&) = delete;
  ~Open() {
    if (fd >= 0) close(fd);
  }
};

struct LogTailer::Request {
  bool follow = false;
  std::vector<std::unique_ptr<Open>> files;
};

LogTailer::LogTailer(std::function<void(TailChunk)> emit, std::function<std::size_t()> waiting)
    : emit_(std::move(emit)), waiting_(std::move(waiting)), thread_([this] { Run(); }) {}

LogTailer::~LogTailer() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

bool LogTailer::Start(std::uint64_t request, std::vector<TailFile> files, bool follow,
                      std::int64_t lines) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (requests_.size() >= kMaxRequests && requests_.count(request) == 0) return false;
  auto r = std::make_unique<Request>();
  r->follow = follow;
  if (files.size() > kMaxFiles) files.resize(kMaxFiles);
  for (TailFile& f : files) r->files.push_back(std::make_unique<Open>(std::move(f), lines));
  requests_[request] = std::move(r);
  wake_.notify_all();
  return true;
}

void LogTailer::Add(std::uint64_t request, std::vector<TailFile> files) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = requests_.find(request);
  if (it == requests_.end() || !it->second->follow) return;
  auto& open = it->second->files;
  // Old generations are read to their end long before this many pile up.
  while (!open.empty() && open.size() + files.size() > kMaxFiles) open.erase(open.begin());
  for (TailFile& f : files) open.push_back(std::make_unique<Open>(std::move(f), -1));
  wake_.notify_all();
}

void LogTailer::Cancel(std::uint64_t request) {
  std::lock_guard<std::mutex> lock(mutex_);
  requests_.erase(request);
}

void LogTailer::CancelAll() {
  std::lock_guard<std::mutex> lock(mutex_);
  requests_.clear();
}

void LogTailer::Run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_) {
    bool busy = false;
    if (waiting_() <= kMaxWaiting) {
      for (auto it = requests_.begin(); it != requests_.end();) {
        busy |= Pump(it->first, it->second.get());
        const bool over = !it->second->follow &&
                          std::all_of(it->second->files.begin(), it->second->files.end(),
                                      [](const std::unique_ptr<Open>& f) { return f->done; });
        if (over) {
          emit_({it->first, {}, "", /*end=*/true});
          it = requests_.erase(it);
        } else {
          ++it;
        }
      }
    }
    if (busy) {
      // Lets Cancel in between two rounds of a large file.
      lock.unlock();
      std::this_thread::yield();
      lock.lock();
    } else if (requests_.empty()) {
      wake_.wait(lock, [this] { return stop_ || !requests_.empty(); });
    } else {
      wake_.wait_for(lock, kPoll);
    }
  }
}

bool LogTailer::Pump(std::uint64_t id, Request* request) {
  bool busy = false;
  for (auto& open : request->files) {
    if (waiting_() > kMaxWaiting) break;
    busy |= PumpFile(id, request, open.get());
  }
  return busy;
}

bool LogTailer::PumpFile(std::uint64_t id, Request* request, Open* open) {
  if (open->done) return false;
  if (open->fd < 0) {
    open->fd = ::open(open->file.path.c_str(), O_RDONLY | O_CLOEXEC);
    if (open->fd < 0) {
      open->done = !request->follow;
      return false;
    }
    struct stat st = {};
    if (fstat(open->fd, &st) == 0) {
      open->offset = TailOffset(open->fd, st.st_size, open->lines, kMaxBackwardScan);
    }
  }
  std::string data(kMaxChunk, '\0');
  const ssize_t n = pread(open->fd, data.data(), data.size(), open->offset);
  if (n <= 0) {
    if (!(n < 0 && errno == EINTR)) open->done = !request->follow;
    return false;
  }
  data.resize(static_cast<std::size_t>(n));
  const bool full = data.size() == kMaxChunk;
  const auto newline = data.rfind('\n');
  if (newline != std::string::npos) {
    data.resize(newline + 1);
  } else if (!full && request->follow) {
    return false;  // a line that is still being written
  }
  open->offset += static_cast<off_t>(data.size());
  emit_({id, open->file, std::move(data), /*end=*/false});
  return true;
}

}  // namespace everstep::agent
