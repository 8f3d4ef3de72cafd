#include "tests/sim/kernel/timeline.h"

#include <algorithm>
#include <utility>

namespace everstep::sim {

Timeline::Timeline(std::uint64_t seed, Timestamp start, std::uint64_t max_events)
    : random_(seed), ties_(random_.Fork()), now_(start), max_events_(max_events) {
  digest_.Add(seed);
}

EventId Timeline::At(Timestamp when, std::string label, std::function<void()> action) {
  const EventId id = next_id_++;
  const Key key{std::max(when, now_).ns, ties_.Next(), id};
  queue_.emplace(key, Entry{std::move(label), std::move(action)});
  keys_.emplace(id, key);
  return id;
}

EventId Timeline::After(Duration delay, std::string label, std::function<void()> action) {
  return At(now_ + delay, std::move(label), std::move(action));
}

bool Timeline::Cancel(EventId id) {
  const auto it = keys_.find(id);
  if (it == keys_.end()) return false;
  queue_.erase(it->second);
  keys_.erase(it);
  return true;
}

bool Timeline::RunOne() {
  if (queue_.empty() || exhausted()) return false;
  const auto first = queue_.begin();
  const auto [time, tie, id] = first->first;
  Entry entry = std::move(first->second);
  queue_.erase(first);
  keys_.erase(id);
  now_ = Timestamp{time};
  ++events_run_;
  digest_.Add(static_cast<std::uint64_t>(time));
  digest_.Add(entry.label);
  if (tracer_) tracer_(now_, entry.label);
  entry.action();
  return true;
}

bool Timeline::RunUntil(Timestamp deadline, const std::function<bool()>& done) {
  while (!queue_.empty() && std::get<0>(queue_.begin()->first) <= deadline.ns) {
    if (!RunOne()) return false;
    if (done && done()) return true;
  }
  now_ = std::max(now_, deadline);
  return false;
}

}  // namespace everstep::sim
