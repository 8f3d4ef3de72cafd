#include "tests/sim/kernel/network.h"

#include <algorithm>

namespace everstep::sim {

Duration Network::Delay() {
  Random& random = timeline_->random();
  const Duration base{random.Between(options_.min_delay.count(), options_.max_delay.count())};
  if (!random.Chance(options_.slow_per_mille)) return base;
  return base + Duration(random.Between(0, options_.slow_delay.count()));
}

void Network::Send(const std::string& from, const std::string& to, const std::string& label,
                   const Deliver& deliver) {
  ++sent_;
  if (Cut(from, to) || timeline_->random().Chance(options_.drop_per_mille)) {
    ++dropped_;
    return;
  }
  int copies = 1;
  if (timeline_->random().Chance(options_.duplicate_per_mille)) {
    ++duplicated_;
    copies = 2;
  }
  for (int i = 0; i < copies; ++i) {
    timeline_->After(Delay(), label, [this, from, to, deliver] {
      if (Cut(from, to)) {  // cut while under way
        ++dropped_;
        return;
      }
      ++delivered_;
      deliver();
    });
  }
}

StreamId Network::Open(const std::string& a, const std::string& b) {
  const StreamId id = next_stream_++;
  Stream stream;
  stream.a = a;
  stream.b = b;
  streams_.emplace(id, std::move(stream));
  return id;
}

Network::Direction* Network::Find(StreamId stream, bool to_b) {
  const auto it = streams_.find(stream);
  if (it == streams_.end()) return nullptr;
  return to_b ? &it->second.to_b : &it->second.to_a;
}

bool Network::SendOn(StreamId stream, const std::string& from, const std::string& label,
                     Deliver deliver) {
  ++sent_;
  const auto it = streams_.find(stream);
  if (it == streams_.end()) {
    ++dropped_;
    return false;
  }
  const bool to_b = from == it->second.a;
  Direction& direction = to_b ? it->second.to_b : it->second.to_a;
  const std::uint64_t sequence = direction.next++;
  direction.queue.emplace(sequence, InFlight{0, label, std::move(deliver)});
  if (!Cut(from, to_b ? it->second.b : it->second.a)) Launch(stream, to_b, sequence);
  return true;
}

// Gives a message its delivery time: never before that of the message ahead of it.
void Network::Launch(StreamId stream, bool to_b, std::uint64_t sequence) {
  Direction* direction = Find(stream, to_b);
  InFlight& message = direction->queue.at(sequence);
  const Timestamp when =
      std::max(timeline_->now() + Delay(), direction->last + std::chrono::nanoseconds(1));
  direction->last = when;
  message.event = timeline_->At(when, message.label, [this, stream, to_b, sequence] {
    Direction* d = Find(stream, to_b);
    if (d == nullptr) return;
    const Stream& s = streams_.at(stream);
    InFlight& m = d->queue.at(sequence);
    if (to_b ? Cut(s.a, s.b) : Cut(s.b, s.a)) {
      m.event = 0;  // stalled; every later one stalls too, at its own time
      return;
    }
    const Deliver deliver = std::move(m.deliver);
    d->queue.erase(sequence);
    ++delivered_;
    deliver();
  });
}

void Network::Break(StreamId stream) {
  const auto it = streams_.find(stream);
  if (it == streams_.end()) return;
  Stream broken = std::move(it->second);
  streams_.erase(it);
  for (Direction* direction : {&broken.to_a, &broken.to_b}) {
    for (auto& [sequence, message] : direction->queue) {
      if (message.event == 0 || !timeline_->Cancel(message.event) ||
          !timeline_->random().Chance(options_.late_per_mille)) {
        ++dropped_;
        continue;
      }
      timeline_->After(Delay(), message.label + " (late)",
                       [this, deliver = std::move(message.deliver)] {
                         ++delivered_;
                         deliver();
                       });
    }
  }
}

void Network::Partition(const std::string& a, const std::string& b) {
  PartitionOneWay(a, b);
  PartitionOneWay(b, a);
}

void Network::PartitionOneWay(const std::string& from, const std::string& to) {
  cut_.emplace(from, to);
}

void Network::Heal(const std::string& a, const std::string& b) {
  cut_.erase({a, b});
  cut_.erase({b, a});
  Release();
}

void Network::HealAll() {
  cut_.clear();
  Release();
}

// Sends on what partitions held back, in order. Messages that are still under way behind held ones
// are launched anew, so that nothing overtakes.
void Network::Release() {
  for (auto& [id, stream] : streams_) {
    for (const bool to_b : {true, false}) {
      if (to_b ? Cut(stream.a, stream.b) : Cut(stream.b, stream.a)) continue;
      Direction& direction = to_b ? stream.to_b : stream.to_a;
      bool held = false;
      for (auto& [sequence, message] : direction.queue) {
        held = held || message.event == 0;
        if (!held) continue;
        if (message.event != 0) timeline_->Cancel(message.event);
        Launch(id, to_b, sequence);
      }
    }
  }
}

bool Network::Cut(const std::string& from, const std::string& to) const {
  return cut_.contains({from, to});
}

}  // namespace everstep::sim
