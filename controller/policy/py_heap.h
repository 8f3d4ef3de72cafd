// A binary heap that leaves its elements in the same places as Python's heapq, equal ones too:
// Oobleck's published simulator looks at the array of its heap, so its numbers depend on them.
// (heapq of CPython: sifting down goes to a leaf first and then up again.) Pure.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace everstep::policy {

struct PaperEvent {
  std::int64_t ms = 0;
  int kind = 0;
  std::string node;          // of adds, removes, readies
  std::int64_t version = 0;  // of steps

  friend bool operator<(const PaperEvent& a, const PaperEvent& b) {
    return a.ms != b.ms ? a.ms < b.ms : a.kind < b.kind;
  }
};

class PyHeap {
 public:
  void Push(PaperEvent event);
  PaperEvent Pop();  // REQUIRES not empty
  void Heapify();
  const std::vector<PaperEvent>& items() const { return items_; }

 private:
  void Rise(std::size_t start, std::size_t at);
  void Sink(std::size_t at);

  std::vector<PaperEvent> items_;
};

}  // namespace everstep::policy
