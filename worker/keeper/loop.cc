#include "worker/keeper/loop.h"

#include <sys/epoll.h>

#include <utility>

#include "proto/base/check.h"

namespace everstep::keeper {

Loop::Loop() : epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
  EVERSTEP_CHECK(epoll_.get() >= 0, "epoll_create1 failed");
}

Loop::Token Loop::Add(int fd, std::uint32_t events, Handler handler) {
  const Token token = next_++;
  epoll_event event{};
  event.events = events;
  event.data.u64 = token;
  EVERSTEP_CHECK(::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0, "epoll_ctl add failed");
  entries_[token] = Entry{fd, std::make_shared<Handler>(std::move(handler))};
  return token;
}

void Loop::Modify(Token token, std::uint32_t events) {
  const auto it = entries_.find(token);
  if (it == entries_.end()) return;
  epoll_event event{};
  event.events = events;
  event.data.u64 = token;
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, it->second.fd, &event);
}

void Loop::Remove(Token token) {
  const auto it = entries_.find(token);
  if (it == entries_.end()) return;
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, it->second.fd, nullptr);
  entries_.erase(it);
}

void Loop::RunOnce(int timeout_ms) {
  epoll_event ready[64];
  const int n = ::epoll_wait(epoll_.get(), ready, 64, timeout_ms);
  for (int i = 0; i < n; ++i) {
    const auto it = entries_.find(ready[i].data.u64);
    if (it == entries_.end()) continue;  // removed by a handler before it in this batch
    const std::shared_ptr<Handler> handler = it->second.handler;
    (*handler)(ready[i].events);
  }
}

}  // namespace everstep::keeper
