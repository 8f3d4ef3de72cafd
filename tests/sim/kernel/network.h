// The simulated network: named endpoints, messages as actions. Two services over the same links:
//   datagrams  may be late, lost, doubled, overtaken;
//   streams    keep their order and lose nothing until they break, as TCP does. A break loses what
//   is
//              in flight, but for what had already arrived in the receiver's mailbox:
//              late_per_mille of it is still delivered, after the break.
// A partition is directed pairs of endpoints: datagrams across it vanish, streams across it stall.
//
//   n1 ──Send──▶ [delay, drop, double, reorder] ──▶ deliver()
//   n1 ══Stream═▶ [delay, in order, stall, break] ══▶ deliver()
//
// Single-threaded; must not outlive its Timeline.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "tests/sim/kernel/timeline.h"

namespace everstep::sim {

struct NetworkOptions {
  Duration min_delay = std::chrono::microseconds(50);
  Duration max_delay = Milliseconds(2);
  std::uint32_t drop_per_mille = 0;       // datagrams
  std::uint32_t duplicate_per_mille = 0;  // datagrams
  std::uint32_t slow_per_mille = 0;  // messages that take up to slow_delay: datagrams overtake them
  Duration slow_delay = Milliseconds(200);
  std::uint32_t late_per_mille = 300;  // of a broken stream's messages in flight
};

using StreamId = std::uint64_t;

class Network {
 public:
  using Deliver = std::function<void()>;

  Network(Timeline* timeline, NetworkOptions options) : timeline_(timeline), options_(options) {}

  NetworkOptions& options() { return options_; }

  void Send(const std::string& from, const std::string& to, const std::string& label,
            const Deliver& deliver);

  // A stream between two endpoints; both directions keep their own order.
  StreamId Open(const std::string& a, const std::string& b);
  bool IsOpen(StreamId stream) const { return streams_.contains(stream); }
  // From `from` to the other end. False when the stream is broken: the message is lost.
  bool SendOn(StreamId stream, const std::string& from, const std::string& label, Deliver deliver);
  void Break(StreamId stream);

  // Cuts the pair in both directions, or one way only. Idempotent.
  void Partition(const std::string& a, const std::string& b);
  void PartitionOneWay(const std::string& from, const std::string& to);
  // Heals the pair in both directions; what streams held back is delivered from now on, in order.
  void Heal(const std::string& a, const std::string& b);
  void HealAll();
  bool Cut(const std::string& from, const std::string& to) const;

  std::uint64_t sent() const { return sent_; }
  std::uint64_t dropped() const { return dropped_; }
  std::uint64_t duplicated() const { return duplicated_; }
  std::uint64_t delivered() const { return delivered_; }

 private:
  struct InFlight {
    EventId event = 0;  // 0: held back by a partition
    std::string label;
    Deliver deliver;
  };
  struct Direction {
    Timestamp last;                           // delivery time of the newest message sent
    std::map<std::uint64_t, InFlight> queue;  // by sequence
    std::uint64_t next = 1;
  };
  struct Stream {
    std::string a, b;
    Direction to_a, to_b;
  };

  Duration Delay();
  void Launch(StreamId stream, bool to_b, std::uint64_t sequence);
  void Release();
  Direction* Find(StreamId stream, bool to_b);

  Timeline* const timeline_;
  NetworkOptions options_;
  std::set<std::pair<std::string, std::string>> cut_;
  std::map<StreamId, Stream> streams_;
  StreamId next_stream_ = 1;
  std::uint64_t sent_ = 0, dropped_ = 0, duplicated_ = 0, delivered_ = 0;
};

}  // namespace everstep::sim
