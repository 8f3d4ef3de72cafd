// An arena's header is memory that a trainer can write: whatever stands there, an agent that looks
// at it neither reads nor writes outside of the file, and trusts no slot that fails its checksums.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "checkpoint/store/arena.h"
#include "checkpoint/store/slot_writer.h"

using namespace everstep::checkpoint;  // NOLINT: a fuzzer of one namespace

namespace {

constexpr std::size_t kFile = kArenaHeaderBytes + std::size_t{64} * 1024;

// One whole slot, so that small changes of a good arena are tried as well.
void MakeGood(int fd) {
  auto arena = Arena::Open(dup(fd));
  if (!arena.ok()) __builtin_trap();
  auto writer = SlotWriter::Begin(&arena.value(), 0, 5000);
  if (!writer.ok()) __builtin_trap();
  const char bytes[5000] = {1, 2, 3};
  if (!writer.value().Append(bytes, sizeof bytes).ok()) __builtin_trap();
  if (!writer.value().Finish({.generation = 1, .step = 1, .rank = 0, .world_size = 1}, 100).ok()) {
    __builtin_trap();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  auto made = CreateArenaFd({.job = "job", .rank = 0, .replica = false, .slot_bytes = 20'000});
  if (!made.ok()) return 0;
  const int fd = made.value();
  if (ftruncate(fd, kFile) != 0) __builtin_trap();
  MakeGood(fd);
  // Pairs of (offset, byte) change the header behind its magic; the last 64 bytes go to slot 0's
  // fields.
  auto* header =
      static_cast<unsigned char*>(mmap(nullptr, kFile, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
  if (header == MAP_FAILED) __builtin_trap();
  std::size_t at = 0;
  for (; at + 3 <= size && at < 300; at += 3) {
    const std::size_t where =
        16 + (data[at] | std::size_t{data[at + 1]} << 8) % (sizeof(ArenaHeader) - 16);
    header[where] = data[at + 2];
  }
  if (size > at) {
    std::memcpy(&reinterpret_cast<ArenaHeader*>(header)->slot[0].extent_offset, data + at,
                std::min<std::size_t>(size - at, 64));
  }
  munmap(header, kFile);

  auto opened = Arena::Open(fd);
  if (!opened.ok()) return 0;
  Arena& arena = opened.value();
  (void)arena.Name();
  (void)arena.Restore();
  (void)arena.Newest();
  for (std::uint32_t i = 0; i < kSlots; ++i) {
    const auto view = arena.Look(i);
    if (!view) continue;
    const bool good = arena.Verify(*view).ok();
    const unsigned char* payload = arena.Payload(*view);
    if (good && payload != nullptr && view->fields.payload_bytes > 0) {
      volatile unsigned char last = payload[view->fields.payload_bytes - 1];
      (void)last;
    }
  }
  for (std::uint32_t i = 0; i < kSlots; ++i) {
    auto writer = SlotWriter::Begin(&arena, i, 3000);
    if (!writer.ok()) continue;
    if (!writer.value().Append("x", 1).ok()) __builtin_trap();
    const auto view =
        writer.value().Finish({.generation = 2, .step = 2, .rank = 0, .world_size = 1}, 0);
    if (!view.ok() || !arena.Verify(view.value()).ok()) __builtin_trap();
  }
  return 0;
}
