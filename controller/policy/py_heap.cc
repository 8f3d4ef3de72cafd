#include "controller/policy/py_heap.h"

#include <utility>

#include "proto/base/check.h"

namespace everstep::policy {

void PyHeap::Rise(std::size_t start, std::size_t at) {
  PaperEvent moved = std::move(items_[at]);
  while (at > start) {
    const std::size_t parent = (at - 1) / 2;
    if (!(moved < items_[parent])) break;
    items_[at] = std::move(items_[parent]);
    at = parent;
  }
  items_[at] = std::move(moved);
}

void PyHeap::Sink(std::size_t at) {
  const std::size_t start = at;
  PaperEvent moved = std::move(items_[at]);
  for (std::size_t child = 2 * at + 1; child < items_.size(); child = 2 * at + 1) {
    const std::size_t right = child + 1;
    if (right < items_.size() && !(items_[child] < items_[right])) child = right;
    items_[at] = std::move(items_[child]);
    at = child;
  }
  items_[at] = std::move(moved);
  Rise(start, at);
}

void PyHeap::Push(PaperEvent event) {
  items_.push_back(std::move(event));
  Rise(0, items_.size() - 1);
}

PaperEvent PyHeap::Pop() {
  EVERSTEP_CHECK(!items_.empty());
  PaperEvent last = std::move(items_.back());
  items_.pop_back();
  if (items_.empty()) return last;
  PaperEvent first = std::move(items_.front());
  items_.front() = std::move(last);
  Sink(0);
  return first;
}

void PyHeap::Heapify() {
  for (std::size_t at = items_.size() / 2; at > 0; --at) Sink(at - 1);
}

}  // namespace everstep::policy
