#include "controller/server/log_relay.h"

#include <utility>
#include <vector>

namespace everstep::controller {

std::uint64_t LogRelay::Open(Reader reader, std::set<std::string> nodes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const std::uint64_t request = ++last_;
  open_[request] = {std::make_shared<Reader>(std::move(reader)), std::move(nodes)};
  return request;
}

bool LogRelay::Deliver(const std::string& node, const v1::LogLines& lines) {
  std::shared_ptr<Reader> reader;
  bool ended = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = open_.find(lines.request());
    if (it == open_.end()) return false;
    reader = it->second.reader;
    if (lines.end()) {
      it->second.waiting.erase(node);
      ended = it->second.waiting.empty();
      if (ended) open_.erase(it);
    }
  }
  if (!lines.data().empty()) {
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
      if (it->second.waiting.erase(node) > 0 && it->second.waiting.empty()) {
        ended.push_back(it->second.reader);
        it = open_.erase(it);
      } else {
        ++it;
      }
    }
  }
  for (const auto& reader : ended) reader->end();
}

void LogRelay::Close(std::uint64_t request) {
  std::lock_guard<std::mutex> lock(mutex_);
  open_.erase(request);
}

}  // namespace everstep::controller
