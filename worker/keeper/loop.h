// The keeper's one thread: epoll over descriptors, handlers by token. A handler may add and remove
// any handler, itself included.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>

#include "worker/keeper/fd.h"

namespace everstep::keeper {

class Loop {
 public:
  using Handler = std::function<void(std::uint32_t events)>;
  using Token = std::uint64_t;  // never used twice; 0: none

  Loop();

  // The descriptor stays the caller's and must outlive the token.
  Token Add(int fd, std::uint32_t events, Handler handler);
  void Modify(Token token, std::uint32_t events);
  void Remove(Token token);
  bool Has(Token token) const { return entries_.count(token) != 0; }

  // Waits at most timeout_ms (-1: for ever) and runs the handlers of what is ready.
  void RunOnce(int timeout_ms);

 private:
  struct Entry {
    int fd = -1;
    std::shared_ptr<Handler> handler;
  };
  OwnedFd epoll_;
  std::map<Token, Entry> entries_;
  Token next_ = 1;
};

}  // namespace everstep::keeper
