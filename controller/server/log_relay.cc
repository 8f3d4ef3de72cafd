#include "controller/server/log_relay.h"

#include <iterator>
#include <utility>
#include <vector>

namespace everstep::controller {

void LogRelay::Open(std::uint64_t request, Reader reader, std::set<std::string> nodes,
                    bool follow) {
  std::lock_guard<std::mutex> lock(mutex_);
  open_[request] = {std::make_shared<Reader>(std::move(reader)), std::move(nodes), follow};
}

bool LogRelay::Deliver(const std::string& node, const v1::LogLines& lines) {
  std::shared_ptr<Reader> reader;
  bool ended = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = open_.find(lines.request());
    if (it == open_.end()) return lines.end();  // what is over need not be cancelled
    reader = it->second.reader;
    if (lines.end()) {
      it->second.waiting.erase(node);
      ended = it->second.waiting.empty() && !it->second.follow;
      if (ended) open_.erase(it);
    }
  }
  if (!lines.data().empty()) {
    bytes_ += lines.data().size();
    v1::JobLogLines out;
    out.set_rank(lines.rank());
    out.set_node(node);
    out.set_from_stderr(lines.from_stderr());
    out.set_data(lines.data());
    out.set_generation(lines.generation());
    if (!reader->lines(std::move(out))) {
      Close(lines.request());
      return false;
    }
  }
  if (ended) reader->end();
  return true;
}

void LogRelay::NodeGone(const std::string& node) {
  std::vector<std::shared_ptr<Reader>> ended;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = open_.begin(); it != open_.end();) {
      Entry& entry = it->second;
      const bool over = entry.waiting.erase(node) > 0 && entry.waiting.empty() && !entry.follow;
      if (over) ended.push_back(std::move(entry.reader));
      it = over ? open_.erase(it) : std::next(it);
    }
  }
  for (const auto& reader : ended) reader->end();
}

void LogRelay::End(std::uint64_t request) {
  std::shared_ptr<Reader> reader;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = open_.find(request);
    if (it == open_.end()) return;
    reader = std::move(it->second.reader);
    open_.erase(it);
  }
  reader->end();
}

void LogRelay::Close(std::uint64_t request) {
  std::lock_guard<std::mutex> lock(mutex_);
  open_.erase(request);
}

}  // namespace everstep::controller
