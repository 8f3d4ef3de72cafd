#include "checkpoint/transfer/for_each.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <vector>

#include "checkpoint/transfer/socket.h"

namespace everstep::checkpoint {

Outcome ForEach(std::size_t count, std::size_t threads,
                const std::function<Outcome(std::size_t)>& task) {
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::optional<Error> error;
  const auto run = [&] {
    for (std::size_t i; (i = next.fetch_add(1)) < count;) {
      auto done = task(i);
      if (done.ok()) continue;
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = done.error();
      next.store(count);
    }
  };
  std::vector<std::thread> helpers;
  helpers.reserve(threads);
  for (std::size_t i = 1; i < std::min(threads, count); ++i) {
    try {
      helpers.emplace_back([&run] {
        BlockSigpipe();
        run();
      });
    } catch (const std::system_error&) {
      break;  // no thread is free: it takes longer
    }
  }
  run();
  for (std::thread& t : helpers) t.join();
  if (error) return *error;
  return Done{};
}

}  // namespace everstep::checkpoint
